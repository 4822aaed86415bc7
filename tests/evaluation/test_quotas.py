"""Which quotas are tried, on which users, and which are chosen."""

import numpy as np
import pyarrow as pa
import pytest

from recgpt.data.dataset import HistoryDataset, RowGroup
from recgpt.data.hashing import uniform
from recgpt.evaluation.bootstrap import Interval
from recgpt.evaluation.quotas import DrawnUsers, Measured, choose, draw_users, measure, quota_grid

INF = np.inf


def test_two_steps_take_tenths_of_the_list_and_nearly_all_of_it():
    two = [(2, 18), (4, 16), (6, 14), (8, 12), (10, 10), (12, 8), (14, 6), (16, 4), (18, 2), (19, 1)]
    assert quota_grid(20, 1) == [(20,)]
    assert quota_grid(20, 2) == [(20,), *two]


def test_three_steps_are_coarser():
    grid = quota_grid(10, 3)
    assert grid[:10] == [(10,), *((first, 10 - first) for first in range(1, 10))]
    assert grid[10:] == [
        *[(2, 1, 7), (2, 2, 6), (2, 3, 5), (2, 4, 4), (2, 5, 3), (2, 6, 2), (2, 7, 1)],
        *[(4, 1, 5), (4, 2, 4), (4, 3, 3), (4, 4, 2), (4, 5, 1)],
        *[(6, 1, 3), (6, 2, 2), (6, 3, 1)],
        (8, 1, 1),
    ]


@pytest.mark.parametrize(
    ("k", "grid"),
    [
        (1, [(1,)]),
        (2, [(2,), (1, 1)]),
        (3, [(3,), (1, 2), (2, 1), (1, 1, 1)]),
        (5, [(5,), (1, 4), (2, 3), (3, 2), (4, 1), *quota_grid(5, 3)[5:]]),
    ],
)
def test_short_lists_have_no_quotas_twice_and_none_of_nothing(k, grid):
    assert quota_grid(k, 3) == grid
    assert len(set(grid)) == len(grid)
    assert all(sum(quotas) == k and min(quotas) >= 1 for quotas in grid)


def test_users_who_are_not_drawn_have_an_empty_history(monkeypatch):
    users = 1000
    lists = pa.array([[user, user] for user in range(users)], pa.list_(pa.int32()))
    whole = pa.table(
        {
            "user_hash": pa.array(np.arange(users)),
            "item_indices": pa.chunked_array([lists[:300], lists[300:]]),
            "timestamps": lists.cast(pa.list_(pa.int64())),
        }
    )
    monkeypatch.setattr(HistoryDataset, "read_row_group", lambda self, group, columns: whole)
    row_group = RowGroup("part", 0, users)
    table = DrawnUsers("dataset", None, 0.25).read_row_group(row_group, whole.column_names)
    drawn = uniform(np.arange(users), 0) < 0.25
    expected = [[user, user] if drawn[user] else [] for user in range(users)]
    assert table["item_indices"].to_pylist() == table["timestamps"].to_pylist() == expected
    assert table.schema == whole.schema
    assert 200 < drawn.sum() < 300


def test_about_so_many_users_of_the_dataset(write_dataset, tmp_path):
    dataset = write_dataset(tmp_path, {user: [user] for user in range(40)})
    assert draw_users(dataset, 10).share == 0.25
    assert draw_users(dataset, 10).num_users == 40  # they are all read
    assert draw_users(dataset, 40) is draw_users(dataset, None) is dataset


def test_quotas_are_measured_by_the_ranks_of_the_same_users():
    one, two = measure({(2,): np.array([1.0, 2.0, INF, INF]), (1, 1): np.array([INF, 1.0, 2.0, 1.0])})
    assert (one.quotas, one.hit_rate, two.quotas, two.hit_rate) == ((2,), 0.5, (1, 1), 0.75)
    assert one.ndcg == one.ndcg_at_10 == pytest.approx((1 + 1 / np.log2(3)) / 4)
    assert one.difference == Interval(0, 0, 0)
    assert two.difference.mean == 0.25  # two users gained, one lost
    assert two.difference.low < 0 < two.difference.high


def test_ndcg_of_the_whole_list_and_of_its_first_ten():
    (one,) = measure({(15,): np.array([1.0, 15.0])})
    assert one.ndcg == pytest.approx((1 + 1 / 4) / 2)
    assert one.ndcg_at_10 == 0.5
    assert list(one.as_dict()) == ["quotas", "hit_rate@15", "ndcg@15", "ndcg@10", "difference"]


def measured(quotas, hit_rate, ndcg):
    return Measured(quotas, hit_rate, ndcg, 0.0, Interval(0, 0, 0))


@pytest.mark.parametrize(
    ("one_step", "two_steps", "chosen"),
    [
        ((0.5, 0.3), (0.6, 0.2), (18, 2)),
        ((0.5, 0.3), (0.4, 0.4), (20,)),
        ((0.5, 0.3), (0.5, 0.4), (18, 2)),
        ((0.5, 0.3), (0.5, 0.3), (20,)),
    ],
    ids=["hit rate", "hit rate before ndcg", "ndcg of equal hit rates", "fewer steps if both are equal"],
)
def test_chosen_by(one_step, two_steps, chosen):
    assert choose([measured((20,), *one_step), measured((18, 2), *two_steps)]).quotas == chosen


def test_the_same_ranks_of_other_users_are_a_tie():
    """In the order of users, the sums of these would differ in their last bits."""
    ranks = np.random.default_rng(0).integers(1, 21, 1000).astype(np.float64)
    tried = measure({(20,): ranks, (18, 2): ranks[::-1], (16, 4): np.roll(ranks, 1)})
    assert len({one.ndcg for one in tried}) == 1
    assert choose(tried).quotas == (20,)
