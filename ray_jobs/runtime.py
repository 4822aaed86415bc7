"""Starting Ray, and turning what went wrong into one line for the user."""

import atexit
import contextlib
import errno
import logging
import os
import re
import secrets
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import typer

from ray_jobs.command_line import invoke
from recgpt import progress
from recgpt.errors import Stopped, UserError

OBJECT_STORE_BYTES = 512 * 1024**2
LARGE_OBJECT_STORE_BYTES = 3 * 1024**3  # at most; for what would go to disk and come back otherwise
SECONDS_TO_END = 5.0  # for Ray's workers, once it was shut down

# How a UserError looks at the end of a traceback that comes as text from another process.
_REMOTE_USER_ERROR = re.compile(rf"^{re.escape(UserError.__module__)}\.UserError: (.+)$", re.MULTILINE)

# How errors of files and of object stores look, at the end of a traceback or described alike.
_FILE_ERROR = re.compile(
    r"^(?P<kind>PermissionError|IsADirectoryError|NotADirectoryError|FileNotFoundError|OSError): "
    r"\[Errno (?P<number>\d+)\] .*?(?:: (?P<quote>['\"])(?P<path>.+?)(?P=quote)(?: -> .+)?)?$"
)
_STORE_ERROR = re.compile(
    r"^(?:botocore|aiobotocore|aiohttp)\.\w+\.(?P<kind>\w+): (?P<text>.*)$", re.MULTILINE
)
_STORE_REFUSAL = re.compile(r"An error occurred \((?P<code>[^)]*)\) when calling the (?P<operation>\w+)")
_NO_CONNECTION = {
    "AioReadTimeoutError",
    "ClientPayloadError",
    "ConnectionClosedError",
    "ConnectTimeoutError",
    "EndpointConnectionError",
    "HTTPClientError",
    "ProxyConnectionError",
    "ReadTimeoutError",
    "ResponseStreamingError",
    "SSLError",
}
_FILE_ADVICE = {
    "PermissionError": "permission denied; change its permissions or choose another path",
    "IsADirectoryError": "is a folder where a file is needed; choose another path",
    "NotADirectoryError": "goes through a file where a folder is needed; choose another path",
    "FileNotFoundError": "no such file or folder; check the path",
}
_RAY_DISK_FULL = "ray.exceptions.OutOfDiskError: "
# The line of a traceback that names an error; those of Ray only wrap the one before.
_ERROR_LINE = re.compile(r"^(?!ray\.)[\w.]+: .*$", re.MULTILINE)
_SECRET_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")


def start_ray(min_cpus: int, *, large_objects: bool = False) -> None:
    """Join the cluster that ``RAY_ADDRESS`` names, or start a local Ray; once per process.

    ``min_cpus``: logical CPUs the job needs at once. A local Ray declares at least that many,
    because a pipeline whose actors hold every CPU waits for ever for one to read its input with.
    ``large_objects``: the job hands much data from task to task; a local object store may then take an
    eighth of the machine's memory.
    """
    guard_local_ray()
    import ray

    if ray.is_initialized():
        return
    if not progress.is_verbose():
        # A job reports its first error. Ray would print those that came after it and nobody asked for.
        os.environ.setdefault("RAY_IGNORE_UNHANDLED_ERRORS", "1")
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=progress.is_verbose(), logging_level=_logging_level())
    else:
        _start_local_ray(min_cpus, _large_object_store() if large_objects else OBJECT_STORE_BYTES)
    if progress.is_verbose():
        folder = ray.get_runtime_context().get_session_dir()
        progress.note(f"recgpt: what Ray's processes say is kept in {folder}/logs on each machine")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _stop)  # in place of Ray's, which aborts the process
    configure_ray_data()


def _end_local_ray() -> None:
    """Shut it down, and kill those of its processes that hang on their way out.

    A worker whose interpreter deadlocks while it ends has taken leave of Ray, which forgets it.
    """
    import psutil
    import ray

    workers: list[psutil.Process] = []
    for process in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it ends by itself just now
            if process.name() == "raylet":
                workers += process.children(recursive=True)
    ray.shutdown()
    _, hanging = psutil.wait_procs(workers, timeout=SECONDS_TO_END)
    for process in hanging:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _start_local_ray(min_cpus: int, object_store_bytes: int) -> None:
    import ray

    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    # By default Ray's workers give way to whatever else wants to run on the machine.
    os.environ.setdefault("RAY_worker_niceness", "0")
    # How often Ray Train looks at its workers: a short training waits for its end no longer than this.
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    # How long it asks a worker that hangs to leave its group before it kills it.
    os.environ.setdefault("TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S", "5")
    try:
        ray.init(
            address="local",  # left out, a cluster that someone else started here would be joined
            num_cpus=max(min_cpus, os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=object_store_bytes,
            log_to_driver=progress.is_verbose(),
            logging_level=_logging_level(),
        )
    except Exception as error:
        if type(error) is not Exception:
            raise
        # Ray has no class of its own for a service of it that ended, or was too slow, while starting.
        raise UserError(f"Ray did not start here: {error} Give the same command again") from None
    atexit.unregister(_end_local_ray)
    atexit.register(_end_local_ray)  # after Ray's own, and so before it


def _logging_level() -> str:
    return "INFO" if progress.is_verbose() else "WARNING"


def _stop(number: int, frame: FrameType | None) -> None:
    raise Stopped("stopped by SIGTERM; the same command goes on with what is finished")


def _large_object_store() -> int:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(max(memory // 8, OBJECT_STORE_BYTES), LARGE_OBJECT_STORE_BYTES)


def configure_ray_data() -> None:
    """Blocks in their order, and no bars or messages of Ray Data's own; once per process that reads."""
    import ray

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):  # its log file keeps everything
            handler.setLevel(logging.CRITICAL)


def guard_local_ray() -> None:
    """Let only this process and its children use the local Ray, unless the environment says otherwise.

    Ray's services listen on every network interface, and whoever reaches them without a token can
    run code. Ray reads these variables while it is imported: once that has happened, Ray's own
    default holds, which from Ray 2.59 on is a token as well, kept in the user's home.
    """
    if "ray" in sys.modules or os.environ.get("RAY_ADDRESS"):
        return
    mode = os.environ.setdefault("RAY_AUTH_MODE", "token")
    if mode == "token" and "RAY_AUTH_TOKEN_PATH" not in os.environ:
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def run_command(app: typer.Typer) -> None:
    """Run a command line; what the user can put right becomes one line and exit status 2.

    That is a ``UserError``, and an error of the file system or the object store, here or in a Ray worker.
    ``--debug`` anywhere on the command line shows the traceback as well.
    """
    try:
        invoke(app)
    except KeyboardInterrupt:
        sys.exit(130)
    except Stopped as stop:
        _end_as_stopped(stop)
    except Exception as error:
        # Raised in the midst of Ray's compiled code, it arrives as the cause of another error.
        stop = next((cause for cause in _causes(error) if isinstance(cause, Stopped)), None)
        if stop is not None:
            _end_as_stopped(stop)
        message = user_message(error) or storage_message(error) or lost_ray_message(error)
        if message is None:
            raise
        if "--debug" in sys.argv:
            traceback.print_exc()
        print(f"recgpt: error: {message}", file=sys.stderr)
        sys.exit(2)


def _end_as_stopped(stop: BaseException) -> NoReturn:
    print(f"recgpt: {stop}", file=sys.stderr)
    sys.exit(128 + signal.SIGTERM)


def user_message(error: BaseException) -> str | None:
    """The message of the ``UserError`` behind an error, or None if there is none.

    Ray hands on an error of another process under several classes and with a cause that does not
    always survive the way; the text of the remote traceback always does.
    """
    for cause in _causes(error):
        found = _REMOTE_USER_ERROR.findall(str(cause))
        if found:
            return found[-1].strip()
        if isinstance(cause, UserError):
            return str(cause)
    return None


def lost_ray_message(error: BaseException) -> str | None:
    """One line if Ray, or a process of Ray's that the job cannot do without, is gone; else None."""
    import ray

    lost = (
        ray.exceptions.RayActorError,
        ray.exceptions.LocalRayletDiedError,
        ray.exceptions.NodeDiedError,
        ray.exceptions.ObjectLostError,
        ray.exceptions.RaySystemError,
    )
    for cause in _causes(error):
        if isinstance(cause, lost):
            return (
                f"a part of the Ray cluster that the job needs was lost ({type(cause).__name__}); "
                "run the same command again to go on"
            )
    return None


def storage_message(error: BaseException) -> str | None:
    """One line on the file or object store behind an error, or None if the error is of another kind.

    It holds no credentials: of what an object store answers, only the kind of refusal.
    """
    described = [_described(cause) for cause in _causes(error)]
    # An error of the object store also appears as a file error, which does not say as much.
    for found in _STORE_ERROR.finditer("\n".join(described)):
        problem = _store_problem(found["kind"], found["text"])
        if problem is not None:
            urls = [argument for argument in sys.argv[1:] if "://" in argument]
            place = f"object store ({', '.join(urls)})" if urls else "object store"
            return _SECRET_IN_URL.sub("", f"{place}: {problem}")
    if any(_RAY_DISK_FULL in text for text in described):
        return "Ray's temporary folder: no space left on the disk; free some, or set RAY_TMPDIR to another"
    for text in described:
        # A traceback may tell of errors that were dealt with; the last one is what went wrong.
        last = next(reversed(_ERROR_LINE.findall(text)), "")
        if (file_error := _FILE_ERROR.match(last)) and (problem := _file_problem(file_error)):
            return problem
    return None


def _file_problem(found: re.Match[str]) -> str | None:
    path = found["path"]
    if int(found["number"]) in (errno.ENOSPC, errno.EDQUOT):
        return f"{path or 'a local disk'}: no space left on the disk; free some or write elsewhere"
    if not path or found["kind"] not in _FILE_ADVICE:
        return None
    return f"{path}: {_FILE_ADVICE[found['kind']]}"


def _store_problem(kind: str, text: str) -> str | None:
    if kind == "NoCredentialsError":
        keys = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        return f"no credentials found; set {keys}, or give the machine a role"
    if kind in _NO_CONNECTION:
        return f"{text.split(': <')[0]}; check the network and AWS_ENDPOINT_URL"
    refusal = _STORE_REFUSAL.match(text)
    if refusal is None:
        return None
    return (
        f"{refusal['operation']} was refused with {refusal['code']}; "
        "check that the bucket exists and what the credentials may do there"
    )


def _described(error: BaseException) -> str:
    """An error as the last line of its traceback shows it; one from Ray holds a traceback as text."""
    kind = type(error)
    return f"{'' if kind.__module__ == 'builtins' else kind.__module__ + '.'}{kind.__qualname__}: {error}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__
