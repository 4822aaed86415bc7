"""Metrics against values worked out by hand."""

import math

import numpy as np
import pytest

from recgpt.evaluation.metrics import rank_metrics, served_ranks


def ranks_of(items, scores, steps, target):
    return served_ranks(
        np.array([items]), np.array([scores], np.float32), np.array([steps], np.int8), np.array([target])
    ).tolist()


def test_rank_is_the_place_in_the_served_list():
    items, scores, steps = [7, 3, 9], [3.0, 2.0, 1.0], [1, 1, 1]
    assert ranks_of(items, scores, steps, 7) == [1]
    assert ranks_of(items, scores, steps, 9) == [3]


def test_an_item_outside_the_list_has_an_infinite_rank():
    assert ranks_of([7, 3], [3.0, 2.0], [1, 1], 5) == [math.inf]


def test_ties_count_against_the_model_within_a_step_only():
    items, scores, steps = [7, 3, 9, 4, 8], [3.0, 2.0, 2.0, 2.0, 1.0], [1, 1, 1, 2, 2]
    assert ranks_of(items, scores, steps, 3) == [3]  # 9 ties with it; 4 is of another step
    assert ranks_of(items, scores, steps, 9) == [3]
    assert ranks_of(items, scores, steps, 4) == [4]


def test_a_constant_model_gets_no_credit_for_the_order_of_items():
    assert ranks_of([1, 2, 3, 4], [0.0] * 4, [1] * 4, 1) == [4]


def test_unfilled_places_are_not_found():
    assert ranks_of([2, 0, 0], [1.0, -math.inf, -math.inf], [1, 1, 1], 2) == [1]


def test_no_users_give_no_ranks():
    nothing = np.empty((0, 20))
    assert len(served_ranks(nothing.astype(int), nothing, nothing.astype(np.int8), np.empty(0, int))) == 0


def test_metrics_of_four_users():
    """Ranks 1, 3, 7 and not found."""
    metrics = rank_metrics(np.array([1.0, 3.0, 7.0, np.inf]))
    assert metrics == pytest.approx(
        {
            "hit_rate@5": 2 / 4,
            "hit_rate@10": 3 / 4,
            "hit_rate@20": 3 / 4,
            "ndcg@5": (1 + 1 / 2) / 4,  # 1 / log2(2), 1 / log2(4)
            "ndcg@10": (1 + 1 / 2 + 1 / 3) / 4,  # 1 / log2(8)
            "ndcg@20": (1 + 1 / 2 + 1 / 3) / 4,
            "mrr": (1 + 1 / 3 + 1 / 7) / 4,
        }
    )


def test_cutoffs_include_the_rank_that_is_equal():
    metrics = rank_metrics(np.array([5.0, 10.0, 20.0]))
    assert [metrics[f"hit_rate@{k}"] for k in (5, 10, 20)] == pytest.approx([1 / 3, 2 / 3, 1])
