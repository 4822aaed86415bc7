"""Measurements in several processes, and the environments of yardsticks."""

import subprocess
import sys

import pytest

from benchmarks import common
from recgpt.peak_memory import peak_memory
from recgpt.scaling.ranks import run_ranks, step_seconds


@pytest.mark.distributed
def test_every_rank_is_called_with_the_arguments(tmp_path):
    results = run_ranks("tests.benchmarks.rank_functions:rank_and_sum", world_size=3, numbers=[1, 2])
    assert results == [{"rank": 0, "sum": 3}, {"rank": 1, "sum": 3}, {"rank": 2, "sum": 3}]


@pytest.mark.distributed
def test_a_rank_that_fails_ends_the_others_and_shows_its_output():
    with pytest.raises(RuntimeError, match=r"(?s)rank 1 of 2 failed.*nothing works"):
        run_ranks("tests.benchmarks.rank_functions:second_rank_fails")


def test_a_step_takes_as_long_as_its_slowest_rank():
    assert step_seconds([[1.0, 2.0, 3.0], [5.0, 1.0, 1.0]]) == 3.0  # the median of 5, 2 and 3


def test_peak_memory_is_not_given_back():
    before = peak_memory()
    ballast = bytearray(before)  # as much again
    ballast[::4096] = b"x" * len(ballast[::4096])
    peak = peak_memory()
    assert peak > 1.5 * before
    del ballast
    assert peak_memory() > 0.99 * peak  # the kernel counts a few pages late


@pytest.mark.slow
def test_an_environment_is_made_once(monkeypatch, tmp_path):
    monkeypatch.setattr(common, "ENVIRONMENTS", tmp_path / "environments")
    python = common.environment("empty")
    prefix = subprocess.run([python, "-c", "import sys; print(sys.prefix)"], capture_output=True, text=True)
    assert prefix.stdout.strip() == str(tmp_path / "environments" / "empty") != sys.prefix
    assert (tmp_path / "environments" / ".gitignore").read_text() == "*\n"
    (tmp_path / "environments" / "empty" / "mark").touch()
    assert common.environment("empty") == python
    assert (tmp_path / "environments" / "empty" / "mark").exists(), "kept"
    with pytest.raises(RuntimeError, match=r"pip install --no-index no-such-package failed"):
        common.environment("empty", ["--no-index", "no-such-package"])
    assert not (tmp_path / "environments" / "empty" / "mark").exists(), "another one was asked for"
