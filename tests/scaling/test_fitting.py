"""Coefficients that cannot be negative."""

import numpy as np
import pytest

from recgpt.scaling.fitting import fit_not_negative


def test_exact_values_give_exact_coefficients():
    features = np.array([[1.0, 0, 1], [0, 1, 1], [1, 1, 1], [5, 2, 1]])
    assert fit_not_negative(features, features @ [2.0, 0.5, 3.0]) == pytest.approx([2.0, 0.5, 3.0])


def test_what_would_be_negative_is_left_out():
    features = np.array([[1.0, 1.0], [2.0, 1.0], [3.0, 1.0]])
    assert fit_not_negative(features, np.array([3.0, 2.0, 1.0]))[0] == 0


def test_a_large_value_counts_no_more_than_a_small_one():
    features = np.ones((2, 1))
    (found,) = fit_not_negative(features, np.array([1.0, 100.0]))
    assert found < 3
