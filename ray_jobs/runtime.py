"""Starting Ray, and turning what went wrong into one line for the user."""

import logging
import os
import re
import secrets
import sys
import traceback
from collections.abc import Iterator

import typer

from ray_jobs.command_line import invoke
from recgpt.errors import UserError

OBJECT_STORE_BYTES = 512 * 1024**2

# How a UserError looks at the end of a traceback that comes as text from another process.
_REMOTE_USER_ERROR = re.compile(rf"^{re.escape(UserError.__module__)}\.UserError: (.+)$", re.MULTILINE)


def start_ray(min_cpus: int) -> None:
    """Join the cluster that ``RAY_ADDRESS`` names, or start a local Ray; once per process.

    ``min_cpus``: logical CPUs the job needs at once. A local Ray declares at least that many,
    because a pipeline whose actors hold every CPU waits for ever for one to read its input with.
    """
    guard_local_ray()
    import ray

    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    else:
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        ray.init(
            num_cpus=max(min_cpus, os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level="WARNING",
        )
    configure_ray_data()


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
    """Run a command line; a ``UserError``, also from a Ray worker, becomes one line and exit status 2.

    ``--debug`` anywhere on the command line shows the traceback as well.
    """
    guard_local_ray()
    try:
        invoke(app)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        message = user_message(error)
        if message is None:
            raise
        if "--debug" in sys.argv:
            traceback.print_exc()
        print(f"recgpt: error: {message}", file=sys.stderr)
        sys.exit(2)


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


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__
