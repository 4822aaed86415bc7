"""What the user can put right arrives as one line, also from another process."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ray_jobs.runtime import (
    guard_local_ray,
    lost_ray_message,
    run_command,
    start_ray,
    storage_message,
    user_message,
)
from recgpt.errors import UserError

MESSAGE = "log.csv: no column 'user'; name it with --user-column"


def fail(*_arguments):
    raise UserError(MESSAGE)


class FailsAtOnce:
    def __init__(self):
        fail()

    def call(self):
        return None


class FailsWhenCalled:
    def __call__(self, batch):
        fail()

    def call(self):
        fail()


def in_a_task():
    import ray

    ray.get(ray.remote(fail).remote())


def in_a_nested_task():
    import ray

    ray.get(ray.remote(in_a_task).remote())


def in_an_actor():
    import ray

    ray.get(ray.remote(FailsWhenCalled).remote().call.remote())


def in_the_making_of_an_actor():
    import ray

    ray.get(ray.remote(FailsAtOnce).remote().call.remote())


def in_a_data_task():
    import ray

    ray.data.range(4).map_batches(fail).materialize()


def in_a_data_actor():
    import ray

    ray.data.range(4).map_batches(FailsWhenCalled, compute=ray.data.ActorPoolStrategy(size=1)).materialize()


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
@pytest.mark.parametrize(
    "place",
    [
        in_a_task,
        in_a_nested_task,
        in_an_actor,
        in_the_making_of_an_actor,
        in_a_data_task,
        in_a_data_actor,
    ],
)
def test_the_message_survives_the_way_from_another_process(place):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        place()
    assert user_message(caught.value) == MESSAGE


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("local_ray")
def test_the_message_survives_the_way_from_a_training_worker(tmp_path):
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    trainer = TorchTrainer(
        fail,
        train_loop_config={},
        scaling_config=ScalingConfig(num_workers=1, use_gpu=False),
        run_config=RunConfig(name="run", storage_path=str(tmp_path)),
    )
    with pytest.raises(Exception) as caught:  # noqa: PT011
        trainer.fit()
    assert user_message(caught.value) == MESSAGE


def test_a_user_error_behind_another_error_is_found():
    with pytest.raises(RuntimeError) as caught:  # noqa: PT012
        try:
            fail()
        except UserError as error:
            raise RuntimeError("the job failed") from error
    assert user_message(caught.value) == MESSAGE


def test_another_error_has_no_message_for_the_user():
    assert user_message(ValueError("recgpt is fine")) is None


def store_error(name, text, cause=None):
    """An error of the client of object stores, which is told by the name of its module."""
    error = type(name, (Exception,), {"__module__": "botocore.exceptions"})(text)
    error.__cause__ = cause
    return error


def refusal(code, operation):
    return store_error(
        "ClientError", f"An error occurred ({code}) when calling the {operation} operation: for AKIASECRET"
    )


def translated(error):
    """What the file system of an object store makes of a refusal."""
    other = PermissionError("Forbidden")
    other.__cause__ = error
    return other


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a b"), "/a b: permission denied; change"),
        (PermissionError(errno.EACCES, "Permission denied", "/a", None, "/b"), "/a: permission denied; "),
        (PermissionError(errno.EACCES, "Permission denied", "/it's"), "/it's: permission denied; "),
        (IsADirectoryError(errno.EISDIR, "Is a directory", "/a"), "/a: is a folder where a file is needed; "),
        (
            NotADirectoryError(errno.ENOTDIR, "Not a directory", "/a"),
            "/a: goes through a file where a folder ",
        ),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a"), "/a: no such file or folder; "),
        (OSError(errno.ENOSPC, "No space left on device", "/a"), "/a: no space left on the disk; free some"),
        (OSError(errno.ENOSPC, "No space left on device"), "a local disk: no space left on the disk; "),
        (store_error("NoCredentialsError", "Unable to locate credentials"), "no credentials found; set AWS_"),
        (
            store_error("EndpointConnectionError", 'Could not connect to: "http://me:word@host:9/b"'),
            'Could not connect to: "http://host:9/b"; check the network',
        ),
        (store_error("ReadTimeoutError", "Read timeout on endpoint"), "Read timeout on endpoint; check the "),
        (refusal("NoSuchBucket", "PutObject"), "PutObject was refused with NoSuchBucket; check that the "),
        (translated(refusal("403", "HeadObject")), "HeadObject was refused with 403; check that the bucket"),
    ],
)
def test_a_storage_error_is_one_line_that_says_what_to_do(monkeypatch, error, message):
    monkeypatch.setattr("sys.argv", ["recgpt", "--output", "s3://key:word@bucket/out"])
    line = storage_message(error)
    place = (
        "object store (s3://bucket/out): " if "botocore" in f"{type(error)}{type(error.__cause__)}" else ""
    )
    assert line.startswith(place + message)
    assert not [text for text in ("AKIASECRET", "word", "\n") if text in line]


@pytest.mark.parametrize(
    "error",
    [
        ValueError("recgpt is wrong"),
        FileNotFoundError("of our own making"),
        OSError(errno.EINVAL, "Invalid argument", "/a"),
        store_error("ParamValidationError", "Parameter validation failed"),
    ],
)
def test_other_errors_are_not_taken_for_storage_errors(error):
    assert storage_message(error) is None


def open_missing(*_arguments):
    Path("/no/such/folder/file").read_bytes()


def handle_missing_badly():
    try:
        open_missing()
    except FileNotFoundError:
        raise ValueError("a mistake of ours") from None


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
def test_a_storage_error_survives_the_way_from_another_process():
    import ray

    with pytest.raises(Exception, match="no/such") as caught:
        ray.get(ray.remote(open_missing).remote())
    assert storage_message(caught.value).startswith("/no/such/folder/file: no such file or folder")
    with pytest.raises(Exception, match="no/such") as caught:
        ray.data.range(4).map_batches(open_missing).materialize()
    assert storage_message(caught.value).startswith("/no/such/folder/file: no such file or folder")
    with pytest.raises(ValueError, match="mistake of ours") as caught:
        ray.get(ray.remote(handle_missing_badly).remote())
    assert storage_message(caught.value) is None


FAILS_UNASKED = """
import ray
from ray_jobs.runtime import start_ray

class Worker:
    def work(self, number):
        return int(number)

start_ray(1)
worker = ray.remote(Worker).remote()
failure = worker.work.remote("no number")
ray.get(worker.work.remote("1"))  # comes after the failure
del failure
print("done")
"""


@pytest.mark.ray
def test_an_error_that_nobody_asks_for_is_not_printed():
    call = [sys.executable, "-c", FAILS_UNASKED]
    ended = subprocess.run(call, capture_output=True, text=True, check=True, timeout=100)
    assert ended.stdout == "done\n"
    assert "no number" not in ended.stderr


@pytest.mark.parametrize("debug", [[], ["--debug"]])
def test_a_command_ends_with_status_2_for_a_storage_error(monkeypatch, capsys, debug):
    monkeypatch.setattr("sys.argv", ["recgpt", *debug])
    monkeypatch.setattr("ray_jobs.runtime.invoke", open_missing)
    with pytest.raises(SystemExit) as stopped:
        run_command(None)
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("recgpt: error: /no/such/folder/file: no such file or folder")
    assert lines[0].startswith("Traceback") if debug else len(lines) == 1


@pytest.fixture
def environment(monkeypatch):
    """An empty environment of a process that has not imported Ray yet."""
    variables = {}
    monkeypatch.setattr(os, "environ", variables)
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    return variables


def test_a_local_ray_gets_a_token_of_its_own(environment):
    guard_local_ray()
    assert environment["RAY_AUTH_MODE"] == "token"
    assert len(environment["RAY_AUTH_TOKEN"]) == 64


@pytest.mark.parametrize(("name", "value"), [("RAY_ADDRESS", "10.0.0.1:6379"), ("RAY_AUTH_MODE", "disabled")])
def test_what_the_environment_says_about_ray_is_kept(environment, name, value):
    environment[name] = value
    guard_local_ray()
    assert {key: environment[key] for key in environment if key.startswith("RAY_")} == {name: value}


# Stopped, and left alone

WAITS = """
import time
from ray_jobs.command_line import verb_app
from ray_jobs.runtime import run_command, start_ray

def command():
    start_ray(1)
    print("up", flush=True)
    time.sleep(60)

run_command(verb_app(command))
"""


@pytest.mark.ray
def test_sigterm_ends_a_job_with_one_line_and_its_status():
    process = subprocess.Popen(
        [sys.executable, "-c", WAITS], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "up\n"
    process.send_signal(signal.SIGTERM)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == 143
    assert stderr == "recgpt: stopped by SIGTERM; the same command goes on with what is finished\n"


HANGS_ON_ITS_WAY_OUT = """
import atexit, os, time
from ray_jobs.runtime import start_ray
start_ray(1)
import ray

@ray.remote
class Hangs:
    def process(self):
        return os.getpid()

    def leave(self):
        atexit.register(time.sleep, 600)
        ray.actor.exit_actor()

actor = Hangs.remote()
print(ray.get(actor.process.remote()), flush=True)
try:
    ray.get(actor.leave.remote())
except ray.exceptions.RayActorError:
    pass
"""


@pytest.mark.ray
def test_a_worker_that_hangs_on_its_way_out_is_not_left_behind():
    call = [sys.executable, "-c", HANGS_ON_ITS_WAY_OUT]
    ended = subprocess.run(call, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    try:
        status = psutil.Process(int(ended.stdout)).status()
    except psutil.NoSuchProcess:
        return
    assert status == psutil.STATUS_ZOMBIE, "nobody has waited for it yet"


@pytest.mark.ray
def test_a_process_of_ray_that_was_lost_is_one_line(local_ray):
    import ray

    class Dies:
        def die(self):
            os._exit(1)

    actor = ray.remote(num_cpus=0)(Dies).remote()
    with pytest.raises(ray.exceptions.RayActorError) as lost:
        ray.get(actor.die.remote())
    assert "was lost (ActorDiedError); run the same command again" in lost_ray_message(lost.value)
    assert lost_ray_message(ValueError("a defect")) is None


def test_a_ray_that_does_not_start_is_one_line(monkeypatch):
    import ray

    def init(**_):
        raise Exception("The current node timed out during startup.")  # noqa: TRY002

    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(UserError, match=r"^Ray did not start here: The current node.* same command again$"):
        start_ray(min_cpus=1)
