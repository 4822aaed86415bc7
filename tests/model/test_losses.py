"""Block-wise softmax cross-entropy: equal to the whole-matrix twins, stable at extreme scores."""

import math

import pytest
import torch

from recgpt.model import losses
from recgpt.model.losses import (
    SoftmaxScores,
    blocks,
    full_cross_entropy_reference,
    sampled_softmax_reference,
    softmax_loss_sum,
)


@pytest.fixture
def problem():
    generator = torch.Generator().manual_seed(0)
    interest = torch.randn(7, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    table = torch.randn(12, 4, dtype=torch.float64, generator=generator, requires_grad=True)
    return interest, table, torch.randint(1, 12, (7,), generator=generator)


@pytest.fixture
def log_weight():
    weight = torch.rand(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 3
    weight[[0, 4, 5, 6]] = 0  # with blocks of 2, one block has no weight at all
    return weight.log()


def test_by_hand():
    table = torch.tensor([[100.0], [0.0], [math.log(3.0)]])  # row 0 is padding and must not count
    loss = softmax_loss_sum(torch.tensor([[1.0]]), table, torch.tensor([2]), block_items=1, first=1)
    assert loss.item() == pytest.approx(math.log(4 / 3))


def test_weights_by_hand():
    """Scores log 3 and 0, the latter of weight 5; the target's own weight does not count."""
    table = torch.tensor([[0.0], [math.log(3.0)]])
    log_weight = torch.tensor([math.log(5.0), math.log(7.0)])
    loss = softmax_loss_sum(torch.tensor([[1.0]]), table, torch.tensor([1]), 1, 0, log_weight)
    assert loss.item() == pytest.approx(math.log((3 + 5) / 3))


@pytest.mark.parametrize("block_items", [1, 4, 11, 100])
@pytest.mark.parametrize("targets_at_a_time", [3, 512])
@pytest.mark.parametrize("kept_blocks", [0, 1, 100])
def test_equals_the_twin_and_so_do_its_gradients(
    problem, monkeypatch, block_items, targets_at_a_time, kept_blocks
):
    monkeypatch.setattr(losses, "_TARGETS_AT_A_TIME", {"cpu": targets_at_a_time})
    monkeypatch.setattr(losses, "KEPT_BYTES", kept_blocks * 7 * block_items * 8)
    interest, table, targets = problem
    expected = full_cross_entropy_reference(interest, table, targets)
    expected_gradients = torch.autograd.grad(3 * expected, (interest, table))
    loss = softmax_loss_sum(interest, table, targets, block_items, first=1)
    gradients = torch.autograd.grad(3 * loss, (interest, table))
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("block_items", [1, 2, 100])
@pytest.mark.parametrize("first", [0, 1])
def test_the_weighted_form_equals_its_twin(problem, log_weight, block_items, first):
    interest, table, targets = problem
    expected = sampled_softmax_reference(interest, table, targets, first, log_weight)
    loss = softmax_loss_sum(interest, table, targets, block_items, first, log_weight)
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (interest, table)),
        torch.autograd.grad(expected, (interest, table)),
        rtol=1e-12,
        atol=1e-12,
    )


def test_gradient_check(problem, log_weight):
    interest, table, targets = problem
    assert torch.autograd.gradcheck(lambda i, t: softmax_loss_sum(i, t, targets, 5, 1), (interest, table))
    assert torch.autograd.gradcheck(
        lambda i, t: softmax_loss_sum(i, t, targets, 2, 1, log_weight), (interest, table)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("score", [1e4, -1e4])
def test_extreme_scores_do_not_overflow(score, dtype):
    table = torch.tensor([[0.0], [score], [0.0]], dtype=dtype, requires_grad=True)
    interest = torch.ones(1, 1, dtype=dtype, requires_grad=True)
    loss = softmax_loss_sum(interest, table, torch.tensor([2]), block_items=1, first=1)
    loss.backward()
    assert loss.item() == pytest.approx(max(score, 0.0))
    assert table.grad.isfinite().all()
    # Item 1 takes all of the probability, or none.
    assert interest.grad.item() == pytest.approx(score if score > 0 else 0.0)


def test_no_targets():
    table = torch.zeros(3, 2, requires_grad=True)
    interest = torch.zeros(0, 2, requires_grad=True)
    loss = softmax_loss_sum(interest, table, torch.zeros(0, dtype=torch.int64), block_items=2, first=1)
    loss.backward()
    assert loss.item() == 0
    assert not table.grad.any()


def test_two_halves_of_the_rows_make_the_whole(problem, log_weight):
    """What two ranks do: log-sum-exps combined in the gap, and a target that the other half has."""
    interest, table, targets = (tensor.detach() for tensor in problem)
    whole = SoftmaxScores(interest, table, targets, 3, 1, log_weight)
    halves = []
    for low, high in ((0, 5), (5, 12)):
        here = (targets >= low) & (targets < high)
        local = torch.where(here, targets - low, -1)
        first = 1 if low == 0 else 0
        halves.append(SoftmaxScores(interest, table[low:high], local, 3, first, log_weight[low:high]))
    log_sum_exp = torch.logaddexp(halves[0].log_sum_exp_A, halves[1].log_sum_exp_A)
    torch.testing.assert_close(log_sum_exp, whole.log_sum_exp_A)
    torch.testing.assert_close(sum(half.target_score_A for half in halves), whole.target_score_A)
    interest_gradient, rows_gradient = whole.gradients(whole.log_sum_exp_A)
    of_halves = [half.gradients(log_sum_exp) for half in halves]
    torch.testing.assert_close(of_halves[0][0] + of_halves[1][0], interest_gradient)
    torch.testing.assert_close(torch.cat([of_halves[0][1], of_halves[1][1]]), rows_gradient)


def test_without_rows():
    scores = SoftmaxScores(torch.ones(2, 3), torch.ones(0, 3), torch.tensor([-1, -1]), 4)
    assert scores.log_sum_exp_A.tolist() == [-math.inf, -math.inf]
    interest_gradient, rows_gradient = scores.gradients(torch.zeros(2))
    assert not interest_gradient.any()
    assert rows_gradient.shape == (0, 3)


def test_bfloat16_rows_are_computed_with_in_the_type_of_the_interest(problem):
    interest, table, targets = (tensor.detach() for tensor in problem)
    rounded = table.bfloat16()
    scores = SoftmaxScores(interest, rounded, targets, 5, 1)
    expected = SoftmaxScores(interest, rounded.double(), targets, 5, 1)
    torch.testing.assert_close(scores.log_sum_exp_A, expected.log_sum_exp_A)
    torch.testing.assert_close(
        scores.gradients(scores.log_sum_exp_A), expected.gradients(expected.log_sum_exp_A)
    )


def test_blocks_cover_the_range_once():
    assert blocks(1, 8, 3) == [(1, 4), (4, 7), (7, 8)]
    assert blocks(5, 5, 3) == []
