"""The plain item table: rows that depend on (seed, row) alone, best items, ranks."""

import torch

from recgpt.config import LossSettings
from recgpt.model.item_table import ItemTable, initial_rows
from recgpt.model.scoring import ExcludedPairs


def table_of(*rows):
    loss = LossSettings(kind="full", block_items=2)
    table = ItemTable(len(rows) - 1, 1, 0, loss, torch.arange(len(rows)))
    table.weight.data = torch.tensor(rows)[:, None]
    return table


NOTHING = ExcludedPairs(torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64))


def test_any_range_of_initial_rows_is_the_same():
    whole = initial_rows(1, 0, 10_000, 3)
    assert torch.equal(initial_rows(1, 4_000, 9_000, 3), whole[4_000:9_000])
    assert torch.equal(initial_rows(1, 0, 1, 3), whole[:1])
    assert len(initial_rows(1, 7, 7, 3)) == 0
    assert not torch.equal(initial_rows(2, 0, 10, 3), whole[:10])


def test_best_item_skips_padding_and_excluded_items():
    table = table_of(9.0, 1.0, 3.0, 3.0, 2.0)
    interest = torch.ones(2, 1)
    excluded = ExcludedPairs(torch.tensor([1, 1]), torch.tensor([2, 3]))
    assert table.best_item(interest, excluded).tolist() == [2, 4]  # the tie of 2 and 3 goes to 2


def test_rank_counts_ties_against_the_target():
    table = table_of(9.0, 1.0, 3.0, 3.0, 2.0)
    assert table.rank_of(torch.ones(4, 1), torch.tensor([1, 2, 3, 4]), NOTHING).tolist() == [4, 2, 2, 3]


def test_excluded_items_do_not_count_and_an_excluded_target_is_last():
    table = table_of(9.0, 1.0, 3.0, 3.0, 2.0)
    excluded = ExcludedPairs(torch.tensor([0, 0, 1]), torch.tensor([2, 3, 4]))
    assert table.rank_of(torch.ones(2, 1), torch.tensor([4, 4]), excluded).tolist() == [1, 5]
