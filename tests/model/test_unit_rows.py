"""Rows of length 1, and the gradient by the rows behind them."""

import pytest
import torch

from recgpt.config import LossSettings
from recgpt.model.item_table import ItemTable
from recgpt.model.scoring import ExcludedPairs
from recgpt.model.unit_rows import UnitRows, gradient_by_raw_rows, unit


def test_a_row_is_divided_by_its_length_and_zeros_stay():
    rows = torch.tensor([[3.0, 4.0], [0.0, 0.0]])
    torch.testing.assert_close(unit(rows), torch.tensor([[0.6, 0.8], [0.0, 0.0]]))


def test_of_several_members_each_part_of_a_row_is_divided_by_its_own_length():
    rows = torch.tensor([[3.0, 4.0, 0.0, 5.0], [0.0, 0.0, 8.0, -6.0]])
    expected = torch.tensor([[0.6, 0.8, 0.0, 1.0], [0.0, 0.0, 0.8, -0.6]])
    torch.testing.assert_close(unit(rows, members=2), expected)
    view = UnitRows(rows, torch.float32, members=2)
    torch.testing.assert_close(view[:2], expected)
    first, second = view.of_members()
    torch.testing.assert_close(first[:], expected[:, :2])
    torch.testing.assert_close(second[torch.tensor([1])], expected[1:, 2:])


def test_the_view_reads_slices_and_indices():
    rows = torch.tensor([[3.0, 4.0], [0.0, 2.0], [5.0, 0.0]], dtype=torch.bfloat16)
    view = UnitRows(rows, torch.float32)
    assert (len(view), view.shape) == (3, (3, 2))
    torch.testing.assert_close(view[1:], torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    torch.testing.assert_close(view[torch.tensor([2, 0])], torch.tensor([[1.0, 0.0], [0.6, 0.8]]))


@pytest.mark.parametrize("members", [1, 2])
def test_the_gradient_is_that_of_autograd(members):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(20_000, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    by_unit = torch.randn(20_000, 4, dtype=torch.float64, generator=generator)
    unit(rows, members).backward(by_unit)
    torch.testing.assert_close(gradient_by_raw_rows(rows.detach(), by_unit.clone(), members), rows.grad)


def test_no_step_along_a_row():
    gradient = gradient_by_raw_rows(torch.tensor([[2.0, 0.0]]), torch.tensor([[5.0, 3.0]]))
    assert gradient.tolist() == [[0.0, 1.5]]


def test_a_table_of_unit_rows_scores_by_angle():
    table = ItemTable(3, 2, 0, LossSettings(kind="full"), torch.ones(4, dtype=torch.int64), unit_rows=True)
    table.weight.data = torch.tensor([[0.0, 0.0], [10.0, 10.0], [0.1, 0.0], [0.0, 5.0]])
    interest = torch.tensor([[1.0, 0.1]])
    nothing = torch.empty(0, dtype=torch.int64)
    excluded = ExcludedPairs(nothing, nothing)
    assert table.best_item(interest, excluded).tolist() == [2]  # a short row, but the nearest in direction
    assert table.rank_of(interest, torch.tensor([1]), excluded).tolist() == [2]
    assert table(torch.tensor([2])).tolist() == [[1.0, 0.0]]
    expected = torch.logsumexp(interest @ unit(table.weight[1:]).T, 1) - interest[0, 0]
    torch.testing.assert_close(table.loss_sum(interest, torch.tensor([2])), expected[0])
