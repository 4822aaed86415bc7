"""What the driver says of workers that wait in vain, by hand."""

import pytest

from ray_jobs import train_board
from ray_jobs.train_board import TrainBoard


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(train_board.time, "monotonic", lambda: now[0])
    return now


def text_of(board):
    (line,) = board.take_lines()
    return line["text"]


def test_who_has_been_silent_for_long_hangs(clock):
    board = TrainBoard("mine")
    board.sign(0, "process 7 on a", "step 3")
    board.sign(1, "process 8 on a", "step 4")
    clock[0] += 10
    board.sign(2, "process 9 on a", "step 4")
    board.waited_in_vain(1, "step 4")
    expected = "worker 0 (process 7 on a) has given no sign for 10 s, since step 3"
    assert text_of(board) == f"worker 1 waited in vain for the others at step 4: {expected}"


def test_who_is_behind_hangs_if_nobody_is_silent(clock):
    board = TrainBoard("mine")
    for rank, place in enumerate(["step 3", "step 4", "step 4"]):
        board.sign(rank, f"process {rank} on a", place)
    board.waited_in_vain(1, "step 4")
    assert text_of(board).endswith(": worker 0 (process 0 on a) was last heard of at step 3")


def test_else_whoever_was_heard_of_longest_ago(clock):
    board = TrainBoard("mine")
    for rank in (2, 0, 1):
        board.sign(rank, f"process {rank} on a", "step 4")
        clock[0] += 2
    board.waited_in_vain(1, "step 4")
    assert text_of(board).endswith(": worker 2 (process 2 on a) was last heard of 6 s ago")
