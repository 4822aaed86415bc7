"""Block-wise cross-entropy: equal to the whole-matrix twin, stable at extreme scores."""

import math

import pytest
import torch

from recgpt.model.losses import blocks, full_cross_entropy, full_cross_entropy_reference


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    interest = torch.randn(7, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    table = torch.randn(12, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    return interest, table, torch.randint(1, 12, (7,), generator=generator)


def test_by_hand():
    table = torch.tensor([[100.0], [0.0], [math.log(3.0)]])  # row 0 is padding and must not count
    loss = full_cross_entropy(torch.tensor([[1.0]]), table, torch.tensor([2]), block_items=1)
    assert loss.item() == pytest.approx(math.log(4 / 3))


@pytest.mark.parametrize("block_items", [1, 4, 11, 100])
def test_equals_the_reference_and_so_do_its_gradients(problem, block_items):
    interest, table, targets = problem
    expected = full_cross_entropy_reference(interest, table, targets)
    expected_gradients = torch.autograd.grad(3 * expected, (interest, table))
    loss = full_cross_entropy(interest, table, targets, block_items)
    gradients = torch.autograd.grad(3 * loss, (interest, table))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_gradient_check(problem):
    interest, table, targets = problem
    assert torch.autograd.gradcheck(lambda i, t: full_cross_entropy(i, t, targets, 5), (interest, table))


@pytest.mark.parametrize("score", [1e4, -1e4])
def test_extreme_scores_do_not_overflow(score):
    table = torch.tensor([[0.0], [score], [0.0]], requires_grad=True)
    interest = torch.ones(1, 1, requires_grad=True)
    loss = full_cross_entropy(interest, table, torch.tensor([2]), block_items=1)
    loss.backward()
    assert loss.item() == pytest.approx(max(score, 0.0))
    assert table.grad.isfinite().all()


def test_no_targets():
    table = torch.zeros(3, 2, requires_grad=True)
    interest = torch.zeros(0, 2, requires_grad=True)
    loss = full_cross_entropy(interest, table, torch.zeros(0, dtype=torch.int64), block_items=2)
    loss.backward()
    assert loss.item() == 0
    assert not table.grad.any()


def test_blocks_cover_the_range_once():
    assert blocks(1, 8, 3) == [(1, 4), (4, 7), (7, 8)]
    assert blocks(5, 5, 3) == []
