"""The pool of actors: every value once and in order, errors as themselves, crashes survived."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from ray_jobs.actor_pool import run_on_actors
from recgpt.errors import UserError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


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


def test_every_value_comes_once_and_in_order_also_when_an_actor_dies(tmp_path):
    values: dict[int, list[int]] = {}
    for task, value in run_on_actors(Worker, (str(tmp_path),), "count", [1, 2, 3, 0, 5], actors=2):
        values.setdefault(task, []).append(value)
    assert values == {0: [1], 1: [1, 2], 2: [1, 2, 3], 4: [1, 2, 3, 4, 5]}
    assert (tmp_path / "crashed").exists()


def test_an_error_of_a_worker_reaches_the_caller_as_itself(tmp_path):
    with pytest.raises(UserError, match="-1 is negative"):
        list(run_on_actors(Worker, (str(tmp_path),), "count", [1, -1], actors=1))
