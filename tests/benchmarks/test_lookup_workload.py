"""The work that our table and the yardstick's are given alike."""

import torch

from benchmarks.yardsticks.lookup_workload import LookupWorkload, draw_items, item_counts


def test_items_are_drawn_as_often_as_the_counts_say():
    num_items, draws = 50, 100_000
    item = draw_items(torch.Generator().manual_seed(0), draws, num_items)
    assert item.min() >= 1
    assert item.max() <= num_items
    expected = item_counts(num_items, mean=100_000).double()
    expected *= draws / expected.sum()
    observed = torch.bincount(item, minlength=num_items + 1)
    assert expected[0] == observed[0] == 0, "padding"
    chi_square = ((observed - expected)[1:] ** 2 / expected[1:]).sum()
    assert chi_square < 85.4  # 0.1 % of samples are above it, at 49 degrees of freedom


def test_counts_of_a_small_table():
    # 21 draws x log(2), log(3/2) and log(4/3) / log(4) = 10.5, 6.1, 4.4, rounded up; 0 for padding.
    assert item_counts(3, mean=7).tolist() == [0, 11, 7, 5]


def test_rows_of_a_shard_are_those_of_the_whole():
    workload = LookupWorkload(rank=1, num_rows=20, width=3, tokens=4, steps=2)
    assert torch.equal(workload.rows(7, 12), workload.rows(0, 20)[7:12])


def test_batches_differ_by_step_and_rank_and_repeat():
    first, other = (LookupWorkload(rank, num_rows=1000, width=3, tokens=64, steps=2) for rank in (0, 1))
    ids, gradient = first.batch(0)
    assert ids.min() >= 0
    assert ids.max() < 1000
    assert torch.equal(ids, first.batch(0)[0])
    assert not torch.equal(ids, first.batch(1)[0])
    assert not torch.equal(gradient, other.batch(0)[1])
    assert first.used().tolist() == sorted({*ids.tolist(), *first.batch(1)[0].tolist()})
