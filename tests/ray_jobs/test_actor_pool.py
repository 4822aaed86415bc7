"""The pool of actors: every task once, errors as themselves, crashes survived."""

import os
from pathlib import Path

import pytest

from ray_jobs.actor_pool import run_on_actors
from recgpt.errors import UserError

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


class Worker:
    """Doubles numbers; exits in the middle of the task 3, once; complains about negative numbers."""

    def __init__(self, folder: str):
        self.marker = Path(folder) / "crashed"

    def load(self) -> None:
        pass

    def double(self, number: int) -> int:
        if number == 3 and not self.marker.exists():
            self.marker.touch()
            os._exit(1)
        if number < 0:
            raise UserError(f"{number} is negative")
        return 2 * number


def test_every_task_is_done_once_also_when_an_actor_dies(tmp_path):
    done = list(run_on_actors(Worker, (str(tmp_path),), "double", [1, 2, 3, 4, 5], actors=2))
    assert sorted(done) == [(0, 2), (1, 4), (2, 6), (3, 8), (4, 10)]
    assert (tmp_path / "crashed").exists()


def test_an_error_of_a_worker_reaches_the_caller_as_itself(tmp_path):
    with pytest.raises(UserError, match="-1 is negative"):
        list(run_on_actors(Worker, (str(tmp_path),), "double", [1, -1], actors=1))
