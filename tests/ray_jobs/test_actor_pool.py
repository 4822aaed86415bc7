"""The pool of actors: every value once and in order, errors as themselves, crashes survived."""

import os
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_jobs.actor_pool import STEADY_MEMORY, ActorRange, actor_class, run_on_actors, wait_for_room
from recgpt.errors import UserError

with_ray = pytest.mark.usefixtures("local_ray")


class Worker:
    """Counts to a number; exits in the middle of the task 3, once; complains about negative numbers."""

    def __init__(self, folder: str):
        self.marker = Path(folder) / "crashed"

    def load(self) -> None:
        pass

    def count(self, number: int) -> Iterator[int]:
        if number < 0:
            raise UserError(f"{number} is negative")
        for value in range(1, number + 1):
            if value == number == 3 and not self.marker.exists():
                self.marker.touch()
                os._exit(1)
            yield value


@pytest.mark.ray
@with_ray
def test_every_value_comes_once_and_in_order_also_when_an_actor_dies(tmp_path):
    values: dict[int, list[int]] = {}
    for task, value in run_on_actors(Worker, (str(tmp_path),), "count", [1, 2, 3, 0, 5], ActorRange(2, 2)):
        values.setdefault(task, []).append(value)
    assert values == {0: [1], 1: [1, 2], 2: [1, 2, 3], 4: [1, 2, 3, 4, 5]}
    assert (tmp_path / "crashed").exists()


@pytest.mark.ray
@with_ray
def test_an_error_of_a_worker_reaches_the_caller_as_itself(tmp_path):
    with pytest.raises(UserError, match="-1 is negative"):
        list(run_on_actors(Worker, (str(tmp_path),), "count", [1, -1], ActorRange(1, 1)))


class Waiter:
    """Says which process it is, and ends a task only when a file is there."""

    def load(self) -> None:
        pass

    def wait_for(self, file: str) -> Iterator[int]:
        yield os.getpid()
        while not Path(file).exists():
            time.sleep(0.05)


@pytest.mark.ray
@with_ray
def test_a_pool_grows_while_tasks_wait_and_gives_back_what_has_nothing_to_do(tmp_path):
    early, late = tmp_path / "early", tmp_path / "late"
    end = threading.Thread(target=touch_when_one_actor_is_left, args=(late,))
    processes = []
    tasks = [str(early), str(early), str(early), str(late)]
    for _, process in run_on_actors(Waiter, (), "wait_for", tasks, ActorRange(1, 2)):
        processes.append(process)
        if len(processes) == 2:  # at the same time, as no task has ended
            early.touch()
        if len(processes) == len(tasks):
            end.start()
    assert len(set(processes)) == 2


@pytest.mark.ray
@with_ray
def test_an_actor_for_which_there_is_no_room_does_not_hold_up_the_end(tmp_path):
    (tmp_path / "now").touch()
    tasks = [str(tmp_path / "now")] * 12
    values = list(run_on_actors(Waiter, (), "wait_for", tasks, ActorRange(6, 6)))  # on four CPUs
    assert sorted(task for task, _ in values) == list(range(12))


@pytest.mark.ray
@with_ray
def test_actors_that_wait_for_a_cpu_are_told_of_in_one_line(monkeypatch, capsys):
    import ray

    actors = [actor_class(Waiter, 0).remote() for _ in range(6)]  # on four CPUs
    try:
        wait_for_room(actors, 4, "waiters")
        assert capsys.readouterr().err == ""
        monkeypatch.setattr("ray_jobs.actor_pool.SECONDS_UNTIL_WARNING", 1.0)
        room = threading.Timer(5, lambda: [ray.kill(actor) for actor in actors[:4]])
        room.start()
        wait_for_room(actors, 6, "waiters")
        expected = r"recgpt: warning: 2 of 6 waiters wait for a CPU each; the cluster has 4 CPUs in all.*\n"
        assert re.fullmatch(expected, capsys.readouterr().err)
    finally:
        for actor in actors:
            ray.kill(actor)


@pytest.mark.ray
@with_ray
def test_actors_start_with_allocators_that_keep_their_memory_steady(tmp_path):
    class Environment:
        def load(self) -> None:
            pass

        def of(self, name: str) -> Iterator[str]:
            yield os.environ[name]

    values = list(run_on_actors(Environment, (), "of", list(STEADY_MEMORY), ActorRange(1, 1)))
    assert values == list(enumerate(STEADY_MEMORY.values()))


def touch_when_one_actor_is_left(file: Path) -> None:
    import ray

    while ray.available_resources().get("CPU", 0) < 3:  # of four
        time.sleep(0.05)
    file.touch()


@pytest.mark.parametrize(("text", "parsed"), [("1", (1, 1)), ("4", (4, 4)), ("1:8", (1, 8)), ("3:3", (3, 3))])
def test_numbers_of_actors(text, parsed):
    assert ActorRange.parse(text) == parsed


@pytest.mark.parametrize("text", ["0", "-1", "", "2:1", "0:4", "1:", ":3", "1:2:3", "many"])
def test_numbers_of_actors_that_are_none(text):
    with pytest.raises(UserError, match=f"--actors {text}: expected a number from 1, or MIN:MAX"):
        ActorRange.parse(text)
