"""Confidence intervals of paired differences."""

import numpy as np
import pytest

from recgpt.evaluation.bootstrap import Interval, paired_bootstrap


def test_equal_lists_differ_by_nothing():
    assert paired_bootstrap(np.zeros(5)) == Interval(0.0, 0.0, 0.0)


def test_the_interval_is_that_of_the_normal_approximation():
    # 30 users gained and 10 lost of 1,000: mean .02, standard error sqrt(.04 - .02 ** 2) / sqrt(1000)
    difference = np.repeat([1.0, -1.0, 0.0], [30, 10, 960])
    interval = paired_bootstrap(difference, samples=20_000)
    error = np.sqrt((0.04 - 0.02**2) / 1000)
    assert interval.mean == pytest.approx(0.02)
    assert interval.low == pytest.approx(0.02 - 1.96 * error, abs=1e-3)
    assert interval.high == pytest.approx(0.02 + 1.96 * error, abs=1e-3)


def test_it_agrees_with_drawing_the_users_one_by_one():
    difference = np.random.default_rng(1).normal(0.1, 1, 300)
    rng = np.random.default_rng(2)
    means = [rng.choice(difference, 300).mean() for _ in range(4000)]
    interval = paired_bootstrap(difference, samples=4000)
    np.testing.assert_allclose((interval.low, interval.high), np.quantile(means, [0.025, 0.975]), atol=0.02)


def test_users_who_all_lose_the_same_leave_no_doubt():
    assert paired_bootstrap(np.full(10, -0.5)) == Interval(-0.5, -0.5, -0.5)


def test_the_same_seed_gives_the_same_interval():
    difference = np.random.default_rng(1).normal(size=50)
    assert paired_bootstrap(difference) == paired_bootstrap(difference)
    assert paired_bootstrap(difference) != paired_bootstrap(difference, seed=1)
