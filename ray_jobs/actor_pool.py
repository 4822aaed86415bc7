"""A pool of Ray actors that share out tasks, and grows while there is work for more of them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from recgpt.errors import UserError

# A task whose actor dies, with its machine or by itself, is done again, at most so often. Actors are
# started again without end: machines that disappear shall not end a long job.
TASK_RETRIES = 5


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


class _Pool:
    """The actors that are up or starting, and what each of them does."""

    def __init__(self, worker: type, arguments: Sequence[Any]):
        import ray

        self._actor_class = ray.remote(num_cpus=1, max_restarts=-1, max_task_retries=TASK_RETRIES)(worker)
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
