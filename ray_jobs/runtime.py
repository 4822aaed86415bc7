"""Starting Ray, and turning what went wrong into one line for the user."""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from recgpt.errors import UserError

OBJECT_STORE_BYTES = 512 * 1024**2


def start_ray(min_cpus: int) -> None:
    """Join the cluster that ``RAY_ADDRESS`` names, or start a local Ray on 127.0.0.1; once per process.

    ``min_cpus``: logical CPUs the job needs at once. A local Ray declares at least that many,
    because a pipeline whose actors hold every CPU waits for ever for one to read its input with.
    """
    import ray

    if ray.is_initialized():
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=False)
    else:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # local and loopback only
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        ray.init(
            num_cpus=max(min_cpus, os.cpu_count() or 1),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level="WARNING",
            _node_ip_address="127.0.0.1",
        )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.execution_options.preserve_order = True


def run_command(command: Callable[[], Any]) -> None:
    """Run a command line; a ``UserError``, also from a Ray worker, becomes one line and exit status 2.

    ``--debug`` anywhere on the command line shows the traceback instead of hiding it.
    """
    debug = "--debug" in sys.argv
    try:
        command()
    except Exception as error:
        user_error = next((e for e in _causes(error) if isinstance(e, UserError)), None)
        if user_error is None:
            raise
        if debug:
            traceback.print_exc()
        print(f"recgpt: error: {user_error}", file=sys.stderr)
        sys.exit(2)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and what it came from, innermost last; Ray hides causes in several attributes."""
    seen: set[int] = set()
    waiting: list[Any] = [error]
    while waiting:
        current = waiting.pop(0)
        if not isinstance(current, BaseException) or id(current) in seen:
            continue
        seen.add(id(current))
        hidden = getattr(current, "cause", None)
        if hidden is None:  # a RayTaskError shows the cause's type, with the remote traceback as its text
            yield current
        waiting += [hidden, current.__cause__, *getattr(current, "worker_failures", {}).values()]
