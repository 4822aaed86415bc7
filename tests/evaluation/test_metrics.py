"""Metrics against values worked out by hand."""

import math

import numpy as np
import pytest

from recgpt.evaluation.bootstrap import Interval
from recgpt.evaluation.metrics import (
    difference,
    metric_names,
    rank_metrics,
    ranks_with_seen_at_zero,
    served_ranks,
)


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


def rank_at_zero(scores, steps, target, seen):
    """Of the list of items 1, 2, 3, ... with these scores; ``seen`` has its other items beyond them."""
    return ranks_with_seen_at_zero(
        np.arange(1, len(scores) + 1)[None],
        np.array([scores], np.float32),
        np.array([steps], np.int8),
        np.array([target]),
        np.array([len(seen)]),
        np.array([target in seen]),
    ).tolist()[0]


@pytest.mark.parametrize(
    ("target", "rank"),
    [
        (1, 1),  # above 0: as without the seen items
        (2, 2 + 2),  # 0: both seen items tie with it, and ties are lost
        (3, 3 + 2),
        (4, math.inf),  # 4 + 2 is beyond the list of 5
        (9, math.inf),  # neither served nor seen
    ],
)
def test_seen_items_at_zero_are_ahead_of_targets_that_are_not_above_zero(target, rank):
    assert rank_at_zero([2.0, 0.0, -1.0, -2.0, -3.0], [1] * 5, target, {50, 60}) == rank


def test_a_seen_target_at_zero_is_behind_all_that_is_not_below_zero():
    seen = {50, 60}
    assert rank_at_zero([2.0, 0.0, -1.0, -2.0], [1] * 4, 50, seen) == 4  # behind 1, 2 and item 60
    assert rank_at_zero([2.0, 0.0, -1.0], [1] * 3, 50, seen) == math.inf  # the same place, in a list of 3
    assert rank_at_zero([2.0, 1.0, 0.0], [1] * 3, 50, {50}) == math.inf  # nothing is below it
    assert rank_at_zero([2.0, 1.0, -math.inf], [1] * 3, 50, {50}) == 3  # the list is not full: there is room


def test_seen_items_at_zero_over_two_steps():
    steps = [1, 1, 2, 2, 2, 2]
    assert rank_at_zero([2.0, 1.0, 3.0, -1.0, -2.0, -3.0], steps, 4, {50}) == 5
    assert rank_at_zero([2.0, 1.0, 3.0, -1.0, -2.0, -3.0], steps, 3, {50}) == 3
    # Step 1 has no place for the seen target, step 2 has one behind item 3.
    assert rank_at_zero([2.0, 1.0, 3.0, -1.0, -2.0, -3.0], steps, 50, {50}) == 4
    # Step 1 has one behind item 1.
    assert rank_at_zero([2.0, -1.0, 3.0, -1.0, -2.0, -3.0], steps, 50, {50}) == 2


def test_for_one_step_it_is_the_rank_among_all_items_with_seen_items_at_zero():
    generator = np.random.default_rng(0)
    for _ in range(300):
        scores, k = generator.normal(size=12), int(generator.integers(1, 12))
        seen = generator.choice(12, generator.integers(1, 5), replace=False)
        target = int(generator.integers(12))
        competing = np.where(np.isin(np.arange(12), seen), 0.0, scores)
        rank = (competing >= competing[target]).sum()
        unseen = np.setdiff1d(np.arange(12), seen)
        served = unseen[np.argsort(-scores[unseen])][:k]
        filled = k - len(served)
        found = ranks_with_seen_at_zero(
            np.append(served + 1, [0] * filled).astype(int)[None],
            np.append(scores[served], [-np.inf] * filled)[None],
            np.ones((1, k), np.int8),
            np.array([target + 1]),
            np.array([len(seen)]),
            np.array([target in seen]),
        )
        assert found.tolist() == [rank if rank <= k else np.inf]


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


def test_longer_lists_have_a_hit_rate_at_their_end():
    metrics = rank_metrics(np.array([2.0, 40.0, 51.0, np.inf]), k=50)
    assert tuple(metrics) == metric_names(50)
    assert [metrics[f"hit_rate@{k}"] for k in (5, 10, 20, 50)] == [1 / 4, 1 / 4, 1 / 4, 2 / 4]
    assert metric_names(20) == metric_names() == tuple(rank_metrics(np.ones(1)))


def test_the_difference_of_lists_is_taken_user_by_user():
    """The first user moves from rank 3 to 1, the second comes in at 30, the third drops out."""
    ranks, other = np.array([1.0, 30.0, np.inf, 7.0]), np.array([3.0, np.inf, 12.0, 7.0])
    at_50 = difference(ranks, other, k=50)
    assert list(at_50) == ["hit_rate@50", "ndcg@10"]
    assert at_50["hit_rate@50"].mean == 0
    assert at_50["hit_rate@50"].low == -at_50["hit_rate@50"].high < 0
    assert at_50["ndcg@10"].mean == pytest.approx((1 - 1 / 2) / 4)  # 1 / log2(2), 1 / log2(4)
    assert difference(ranks, other, k=20)["hit_rate@20"].mean == -1 / 4
    assert difference(ranks, ranks, k=20)["hit_rate@20"] == Interval(0.0, 0.0, 0.0)
