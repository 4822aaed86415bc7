"""Goodput and the best checkpoint interval, against numbers by hand and a simulation of failures."""

import math
import random
from dataclasses import replace

import pytest

from recgpt.scaling.failures import Failures, best_interval_seconds, goodput, lost_seconds

HOUR = 3600.0
# 128 machines that each fail every 320 days or so: together once in 60 hours.
USUAL = Failures(
    machine_mtbf_seconds=128 * 60 * HOUR,
    machines=128,
    pause_seconds=10.0,
    write_seconds=120.0,
    restart_seconds=300.0,
)
# So frail that what is small elsewhere counts: failures every 1,000 s.
FRAIL = Failures(2000.0, 2, pause_seconds=20.0, write_seconds=60.0, restart_seconds=100.0)


def simulate(failures, interval, wanted, seed=0):
    """A training event by event: the share of its time that lasts, and seconds lost at a failure."""
    generator = random.Random(seed)
    segment = interval + failures.pause_seconds
    time = lost = 0.0
    done = whole = number = 0  # segments, of them in whole checkpoints
    next_failure = generator.expovariate(1 / failures.mtbf_seconds)
    while done < wanted:
        if next_failure >= time + segment:
            time, done, whole = time + segment, done + 1, done
            continue
        into = next_failure - time
        if into >= failures.write_seconds:
            whole = done
        lost += into + (done - whole) * segment
        number += 1
        done = whole
        time = next_failure
        while True:  # failures hit the restart, too
            since_start = generator.expovariate(1 / failures.mtbf_seconds)
            if since_start >= failures.restart_seconds:
                break
            time += since_start
        time, next_failure = time + failures.restart_seconds, time + since_start
    return wanted * interval / time, lost / number


def test_young_and_daly_by_hand():
    # Young: sqrt(2 x 10 x 216,000); Daly: (1 + sqrt(ratio) / 3 + ratio / 9) times that, less the pause of 10.
    young = math.sqrt(2 * 10 * 60 * HOUR)
    assert young == pytest.approx(2078.46, abs=0.01)
    ratio = 10 / 432_000
    assert best_interval_seconds(USUAL) == pytest.approx(young * (1 + math.sqrt(ratio) / 3 + ratio / 9) - 10)
    assert best_interval_seconds(USUAL) == pytest.approx(2071.8, abs=0.1)


@pytest.mark.parametrize(("mtbf_hours", "minutes"), [(24, 117), (6, 57), (0.25, 9.1)])
def test_the_figures_of_dalys_paper(mtbf_hours, minutes):
    """Its figures 3 to 5: a pause of 5 minutes, a restart of 10."""
    failures = Failures(mtbf_hours * HOUR, 1, pause_seconds=300, write_seconds=0, restart_seconds=600)
    assert best_interval_seconds(failures) == pytest.approx(60 * minutes, rel=0.01)


def test_the_best_interval_is_no_shorter_than_a_checkpoint_takes_and_no_longer_than_needed():
    assert best_interval_seconds(replace(USUAL, write_seconds=4000.0)) == 4000
    hopeless = Failures(100.0, 10, pause_seconds=30.0, write_seconds=1.0, restart_seconds=1.0)
    assert best_interval_seconds(hopeless) == 10  # the time between failures, as Daly has it


def test_goodput_by_hand():
    # interval / (M e^((R + w) / M) (e^((interval + pause) / M) - 1)) with M = 1,000 and R + w = 160.
    assert goodput(FRAIL, 180.0) == pytest.approx(0.180 / (math.exp(0.160) * (math.exp(0.200) - 1)))


@pytest.mark.parametrize(("failures", "interval"), [(FRAIL, 180.0), (FRAIL, 60.0), (USUAL, 2072.0)])
def test_goodput_and_lost_time_as_simulated(failures, interval):
    share, lost = simulate(failures, interval, wanted=20_000 if failures is FRAIL else 200_000)
    assert goodput(failures, interval) == pytest.approx(share, rel=0.03)
    assert lost_seconds(failures, interval) == pytest.approx(lost, rel=0.05)


@pytest.mark.parametrize("failures", [FRAIL, USUAL])
def test_the_best_interval_is_the_best(failures):
    best = best_interval_seconds(failures)
    most = max(goodput(failures, best * factor) for factor in (0.7, 0.85, 1.15, 1.3) if best * factor > 60)
    assert goodput(failures, best) > most


def test_more_machines_more_failures():
    shares = [
        goodput(some, best_interval_seconds(some))
        for some in (replace(USUAL, machines=machines) for machines in (1, 16, 128, 1024))
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > 0.99


def test_what_never_lasts_is_0_and_not_an_error():
    assert goodput(replace(USUAL, machine_mtbf_seconds=1.0), 2000.0) == 0
