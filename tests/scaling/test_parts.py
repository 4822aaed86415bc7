"""Where the time of a step goes: a stopwatch moved by hand."""

import contextlib

import pytest
import torch

from recgpt.distributed import collectives
from recgpt.scaling.parts import PartTimer, parts_charged_to


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def told(timer):
    return {part: seconds for part, seconds in timer.read().items() if seconds}


def test_time_counts_for_the_innermost_part_alone(clock):
    timer = PartTimer(clock)
    clock.now += 1
    with timer.part("forward"):
        clock.now += 2
        with timer.part("lookup"):
            clock.now += 4
            with timer.part("all_to_all"):
                clock.now += 8
            clock.now += 16
        clock.now += 32
    clock.now += 64
    assert told(timer) == {"rest": 65, "forward": 34, "lookup": 20, "all_to_all": 8}


def test_a_restart_forgets_and_goes_on_in_the_same_part(clock):
    timer = PartTimer(clock)
    with timer.part("backward"):
        clock.now += 1
        timer.restart()
        clock.now += 2
        assert told(timer) == {"backward": 2}
        clock.now += 4
    assert told(timer) == {"backward": 6}


def test_a_part_that_fails_is_left(clock):
    timer = PartTimer(clock)
    with contextlib.suppress(ValueError), timer.part("loss"):
        clock.now += 1
        raise ValueError
    clock.now += 2
    assert told(timer) == {"loss": 1, "rest": 2}


def test_the_device_is_waited_for_at_each_border(clock):
    def finish():
        clock.now += 5  # what the device still had to do

    timer = PartTimer(clock, finish)
    with timer.part("forward"):
        clock.now += 1
    assert told(timer) == {"rest": 5 + 5, "forward": 6}


@pytest.mark.parametrize(
    ("kind", "inside", "part"),
    [
        ("dense", "backward", "dense_exchange"),
        ("dense", "dense_update", "dense_exchange"),
        ("all_to_all", "lookup", "all_to_all"),
        ("all_to_all", "backward", "all_to_all"),
        ("sizes", "lookup", "all_to_all"),
        ("sizes", "loss", "loss_exchange"),
        ("all_gather", "loss", "loss_exchange"),
        ("all_reduce", "backward", "loss_exchange"),
        ("all_reduce", "rest", "agreement"),
    ],
)
def test_an_exchange_counts_by_its_kind_and_by_who_makes_it(clock, kind, inside, part):
    timer = PartTimer(clock)
    before = collectives.traffic[kind]
    with parts_charged_to(timer), timer.part(inside), collectives.counted(kind, torch.zeros(3)):
        clock.now += 7
    assert told(timer) == {part: 7}
    assert collectives.traffic[kind] == before + 12, "it is counted as ever"


def test_afterwards_nothing_is_charged(clock):
    timer, counted = PartTimer(clock), collectives.counted
    with parts_charged_to(timer):
        assert collectives.counted is not counted
    assert collectives.counted is counted
