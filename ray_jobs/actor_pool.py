"""A pool of Ray actors that share out tasks."""

from collections.abc import Iterator, Sequence
from typing import Any

# An actor that dies, with its machine or by itself, is started again and its task done again.
ACTOR_RESTARTS = 5


def run_on_actors(
    worker: type, arguments: Sequence[Any], method: str, tasks: Sequence[Any], actors: int
) -> Iterator[tuple[int, Any]]:
    """Start ``actors`` times ``worker(*arguments)``, one CPU each, which do ``method(task)`` for each task.

    Yields (number of the task, result) as tasks finish. The worker's ``load()`` is called first and is where
    slow or failing things belong: an error in it reaches the caller as itself, one in ``__init__``
    does not. It is not called again when an actor is started again: the worker then loads at first use.
    Only an actor that is up gets tasks, so that a cluster with fewer free CPUs than actors still finishes.
    """
    import ray

    options = {"num_cpus": 1, "max_restarts": ACTOR_RESTARTS, "max_task_retries": ACTOR_RESTARTS}
    actor_class = ray.remote(**options)(worker)
    pool = [actor_class.remote(*arguments) for _ in range(actors)]
    try:
        running: dict[Any, tuple[Any, int | None]] = {actor.load.remote(): (actor, None) for actor in pool}
        waiting = iter(range(len(tasks)))
        unfinished = len(tasks)
        while unfinished:
            (finished,), _ = ray.wait(list(running), num_returns=1)
            actor, number = running.pop(finished)
            result = ray.get(finished)
            following = next(waiting, None)
            if following is not None:
                running[getattr(actor, method).remote(tasks[following])] = actor, following
            if number is not None:
                unfinished -= 1
                yield number, result
    finally:
        for actor in pool:
            ray.kill(actor)
