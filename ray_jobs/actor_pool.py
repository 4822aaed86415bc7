"""A pool of Ray actors that share out tasks."""

from collections.abc import Iterator, Sequence
from typing import Any

# An actor that dies, with its machine or by itself, is started again and its task done again.
ACTOR_RESTARTS = 5


def run_on_actors(
    worker: type, arguments: Sequence[Any], method: str, tasks: Sequence[Any], actors: int
) -> Iterator[tuple[int, Any]]:
    """Start ``actors`` times ``worker(*arguments)``, one CPU each, which do ``method(task)`` for each task.

    The method is a generator. Yields (number of the task, value) as soon as a task yields a value; those
    of one task come in their order, once each even if the task is done again. The worker's ``load()`` is
    called first and is where slow or failing things belong: an error in it reaches the caller as itself,
    one in ``__init__`` does not. It is not called again when an actor is started again: the worker then
    loads at first use.
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
            (ready,), _ = ray.wait(list(running), num_returns=1)
            actor, number = running.pop(ready)
            if number is None:
                ray.get(ready)  # the actor has loaded what it needs
            elif (value := next(ready, None)) is not None:
                running[ready] = actor, number
                yield number, ray.get(value)
                continue
            else:
                unfinished -= 1
            following = next(waiting, None)
            if following is not None:
                values = getattr(actor, method).options(num_returns="streaming").remote(tasks[following])
                running[values] = actor, following
    finally:
        for actor in pool:
            ray.kill(actor)
