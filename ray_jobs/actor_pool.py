"""A pool of Ray actors that share out tasks, and grows while there is work for more of them."""

import os
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from recgpt import progress
from recgpt.errors import UserError

# A task whose actor dies, with its machine or by itself, is done again, at most so often. Actors are
# started again without end: machines that disappear shall not end a long job.
TASK_RETRIES = 5
SECONDS_UNTIL_WARNING = 30.0  # that actors wait for a CPU

# With these an actor's memory stays as it is after the first part. A tensor is an aligned block: glibc cuts a
# sliver off its front, and keeps slivers for each thread ("tcache"). Small objects that stay get them, and
# then hold apart what was free memory in one piece, so that the heap grows with every part. Without that
# cache it does not, at the same speed. Arrow's own allocator keeps what it once had; malloc gives it back.
STEADY_MEMORY = {"GLIBC_TUNABLES": "glibc.malloc.tcache_count=0", "ARROW_DEFAULT_MEMORY_POOL": "system"}


class ActorRange(NamedTuple):
    """How many actors a pool has."""

    least: int
    """Started at once."""
    most: int
    """Started one by one, while more tasks than actors wait."""

    @classmethod
    def parse(cls, text: str, option: str = "--actors") -> "ActorRange":
        """``"4"`` or ``"1:8"``. Raises ``UserError`` for anything else, naming the option it was given to."""
        least, colon, most = text.partition(":")
        try:
            parsed = cls(int(least), int(most if colon else least))
        except ValueError:
            parsed = cls(0, 0)
        if not 1 <= parsed.least <= parsed.most:
            raise UserError(f"{option} {text}: expected a number from 1, or MIN:MAX such as 1:8")
        return parsed


ONE_ACTOR = ActorRange(1, 1)


def run_on_actors(
    worker: type,
    arguments: Sequence[Any],
    method: str,
    tasks: Sequence[Any],
    actors: ActorRange,
) -> Iterator[tuple[int, Any]]:
    """Actors ``worker(*arguments)``, one CPU each, do ``method(task)`` for each task, in their order.

    The method is a generator. Yields (number of the task, value) as soon as a task yields a value; those
    of one task come in their order, once each even if the task is done again. The worker's ``load()`` is
    called first and is where slow or failing things belong: an error in it reaches the caller as itself,
    one in ``__init__`` does not. It is not called again when an actor is started again: the worker then
    loads at first use.
    Only an actor that is up gets tasks, so that a cluster with fewer free CPUs than actors still finishes;
    one for which there is no room yet makes Ray's autoscaler add a machine.
    Raises ``UserError`` for a task at which actors are lost again and again.
    """
    import ray

    try:
        yield from _run(_Pool(worker, arguments), method, tasks, actors)
    except ray.exceptions.RayActorError as error:
        raise UserError(
            f"an actor was lost {TASK_RETRIES + 1} times at the same task, perhaps for want of memory "
            f"({' '.join(str(error).split())[:200]}); run the same command again to go on"
        ) from None


def _run(pool: "_Pool", method: str, tasks: Sequence[Any], actors: ActorRange) -> Iterator[tuple[int, Any]]:
    import ray

    waiting = list(reversed(range(len(tasks))))
    unfinished = len(tasks)
    try:
        for _ in range(min(actors.least, len(tasks))):
            pool.start()
        if unfinished:
            wait_for_room(pool.actors, 1, "actors")
        while unfinished:
            if len(pool.actors) < actors.most and not pool.starting and len(waiting) > len(pool.actors):
                pool.start()
            (ready,), _ = ray.wait(list(pool.running), num_returns=1)
            actor, number = pool.running.pop(ready)
            if number is None:
                ray.get(ready)  # the actor has loaded what it needs
            elif (value := next(ready, None)) is not None:
                pool.running[ready] = actor, number
                yield number, ray.get(value)
                continue
            else:
                unfinished -= 1
            if waiting:
                number = waiting.pop()
                values = getattr(actor, method).options(num_returns="streaming").remote(tasks[number])
                pool.running[values] = actor, number
            else:
                pool.release(actor)
            if not waiting:
                pool.release_starting()  # or a machine would be added for nothing
    finally:
        for actor in list(pool.actors):
            pool.release(actor)


def actor_class(worker: type, retries: int) -> Any:
    """A worker as Ray actors of one CPU each, which are started again without end.

    ``retries``: how often something is asked again when the actor died over it.
    """
    import ray

    # In the environment, as a process that runs cannot change them any more.
    environment = {name: value for name, value in STEADY_MEMORY.items() if name not in os.environ}
    return ray.remote(
        num_cpus=1, max_restarts=-1, max_task_retries=retries, runtime_env={"env_vars": environment}
    )(worker)


def wait_for_room(actors: Sequence[Any], least: int, what: str) -> None:
    """Return when ``least`` of the actors have got their CPUs; if that takes long, a line on stderr says so.

    Ray itself waits without a word, and there is no end to it where no machine will be added.
    """
    import ray

    up = [actor.__ray_ready__.remote() for actor in actors]
    started, waiting = ray.wait(up, num_returns=least, timeout=SECONDS_UNTIL_WARNING)
    if len(started) < least and ray.available_resources().get("CPU", 0) < 1:  # else they are about to start
        cpus = ray.cluster_resources().get("CPU", 0)
        progress.warn(
            f"{len(waiting)} of {len(up)} {what} wait for a CPU each; the cluster has "
            f"{cpus:g} CPUs in all. They start when it has room: add machines, or ask for fewer"
        )
    ray.wait(up, num_returns=least)


class _Pool:
    """The actors that are up or starting, and what each of them does."""

    def __init__(self, worker: type, arguments: Sequence[Any]):
        import ray

        self._actor_class = actor_class(worker, TASK_RETRIES)
        self._arguments = [ray.put(argument) for argument in arguments]
        self.actors: list[Any] = []
        self.running: dict[Any, tuple[Any, int | None]] = {}
        """By what it gives: (actor, number of its task, or None while it loads)."""

    @property
    def starting(self) -> bool:
        return any(number is None for _, number in self.running.values())

    def start(self) -> None:
        actor = self._actor_class.remote(*self._arguments)
        self.actors.append(actor)
        self.running[actor.load.remote()] = actor, None

    def release(self, actor: Any) -> None:
        """Give the actor's CPU back, and with it perhaps a machine."""
        import ray

        ray.kill(actor)
        self.actors.remove(actor)
        self.running = {value: doing for value, doing in self.running.items() if doing[0] is not actor}

    def release_starting(self) -> None:
        for actor, number in list(self.running.values()):
            if number is None:
                self.release(actor)
