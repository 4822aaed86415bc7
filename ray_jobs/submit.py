"""`recgpt submit VERB ...`: a verb as a job of a Ray cluster, followed until it ends."""

import asyncio
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recgpt import progress
from recgpt.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

VERBS = (
    "prepare",
    "train",
    "index",
    "generate",
    "verify-candidates",
    "evaluate",
    "tune-quotas",
    "ablate",
    "report",
    "scale",
    "laws",
    "project",
    "validate",
    "plan",
    "doctor",
)
PACKAGES = ("recgpt", "ray_jobs")
SETTINGS = ("configs", "deepspeed_configs")  # beside the code in a checkout; inside it when it is installed
# Settings and lists of ids; data lies where every machine reaches it.
UPLOADED_SUFFIXES = {".yaml", ".yml", ".json", ".txt"}
MOST_BYTES = 10 * 2**20
SECONDS_TO_TAKE_JOBS = 60.0
_OF_RAY = re.compile(r"^([\d :,-]+\tINFO job_manager\.py|Running entrypoint for job ).*\n", re.MULTILINE)
ADDRESS_VARIABLE = "RAY_API_SERVER_ADDRESS"


def submit(address: str, verb: str, arguments: Sequence[str], *, follow: bool = True) -> int:
    """Run a verb on the cluster behind ``address``; returns its exit status, or 0 if it is not followed.

    The code of this installation goes with it, and the small files of the working folder that the
    arguments name; credentials do not: the machines have their own.
    Raises ``UserError`` if the verb cannot be submitted.
    """
    if verb not in VERBS:
        raise UserError(f"recgpt submit {verb}: no verb that can be submitted; one of {', '.join(VERBS)}")
    client = _client(address)
    with tempfile.TemporaryDirectory() as folder:
        _pack(Path(folder), arguments)
        job = _submit(client, address, shlex.join(_entrypoint(verb, arguments)), folder)
    progress.note(f"recgpt: submitted as {job}; to stop it: ray job stop {job} --address {address}")
    if not follow:
        return 0
    asyncio.run(_follow(client, job))
    return _exit_status(client, job)


def _entrypoint(verb: str, arguments: Sequence[str]) -> list[str]:
    module = {"scale": "scaling"}.get(verb, verb.replace("-", "_"))
    return ["python", "-m", f"ray_jobs.{module}", *arguments]


def _submit(client: "JobSubmissionClient", address: str, entrypoint: str, folder: str) -> str:
    """The job's number. A cluster that has only just started takes no jobs yet: it is given a while."""
    deadline = time.monotonic() + SECONDS_TO_TAKE_JOBS
    while True:
        try:
            return client.submit_job(entrypoint=entrypoint, runtime_env={"working_dir": folder})
        except RuntimeError as error:
            if time.monotonic() > deadline:
                reason = " ".join(str(error).split())[:200]
                raise UserError(f"{address}: the cluster does not take the job ({reason})") from None
        time.sleep(1)


def _client(address: str) -> "JobSubmissionClient":
    from ray.exceptions import AuthenticationError
    from ray.job_submission import JobSubmissionClient

    logging.disable(logging.INFO)  # Ray's modules each set a level of their own
    try:
        return JobSubmissionClient(address)
    except AuthenticationError:
        raise UserError(
            f"{address}: the cluster refuses the token of this machine; put the cluster's into "
            "~/.ray/auth_token or RAY_AUTH_TOKEN, and set RAY_AUTH_MODE=token"
        ) from None
    except (ConnectionError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{address}: no job API of a Ray cluster there ({reason}); "
            "is `ray dashboard cluster.yaml` open, and is RAY_AUTH_MODE=token set?"
        ) from None


def _pack(folder: Path, arguments: Sequence[str]) -> None:
    """Put this installation's code, and the files that the arguments name, into a folder.

    Raises ``UserError`` for data, for files outside the working folder, and for too many bytes.
    """
    source = Path(__file__).parent.parent
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    is_checkout = (source / "pyproject.toml").is_file()
    for name in (*PACKAGES, *(SETTINGS if is_checkout else ())):
        shutil.copytree(source / name, folder / name, ignore=ignored)
    total = 0
    for name in arguments:
        file = Path(name)
        if "://" in name or not file.is_file():
            continue
        if file.suffix not in UPLOADED_SUFFIXES:
            raise UserError(
                f"{name}: data is not uploaded; put it where the cluster reaches it, such as s3://"
            )
        if file.is_absolute() or ".." in file.parts:
            raise UserError(f"{name}: is outside the working folder, which alone is uploaded; name it inside")
        total += file.stat().st_size
        if total > MOST_BYTES:
            raise UserError(
                f"{name}: more than {MOST_BYTES // 2**20} MiB would be uploaded; use s3:// instead"
            )
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, folder / file)


async def _follow(client: "JobSubmissionClient", job: str) -> None:
    """Print the job's log as it grows, until the job ends; what Ray says of the job only if it is wanted."""
    async for lines in client.tail_job_logs(job):
        typer.echo(lines if progress.is_verbose() else _OF_RAY.sub("", lines), nl=False)


def _exit_status(client: "JobSubmissionClient", job: str) -> int:
    """The status of the verb; 1 if Ray could not even start it."""
    from ray.job_submission import JobStatus

    info = client.get_job_info(job)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    if info.driver_exit_code is None:
        typer.echo(f"recgpt: {job} ended as {info.status}: {info.message}", err=True)
    return info.driver_exit_code or 1


def command(
    context: typer.Context,
    verb: Annotated[str, typer.Argument(help=f"One of {', '.join(VERBS)}.")],
    address: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            help="Job API of the cluster, as `ray dashboard cluster.yaml` forwards it. "
            "Example: --address http://127.0.0.1:8265",
            show_default=f"the variable {ADDRESS_VARIABLE}, else http://127.0.0.1:8265",
        ),
    ] = None,
    no_wait: Annotated[
        bool, typer.Option("--no-wait", help="Do not follow the job; its number is printed.")
    ] = False,
) -> None:
    """Run a verb on a Ray cluster: submit it, print its log, and end with its exit status.

    What stands behind the verb goes to the verb; options of submit itself stand before it. Datasets, runs
    and candidates must lie where the cluster reaches them. Ctrl-C leaves the job running.

    Example: `recgpt submit --address http://127.0.0.1:8265 train --dataset s3://bucket/data --output s3://bucket/run`
    """
    address = address or os.environ.get(ADDRESS_VARIABLE) or "http://127.0.0.1:8265"
    status = submit(address, verb, context.args, follow=not no_wait)
    if status:
        raise typer.Exit(status)
