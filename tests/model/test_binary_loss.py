"""Binary cross-entropy with drawn negatives, and its calibrated form gBCE."""

import math

import pytest
import torch
import torch.nn.functional as F

from recgpt.config import LossSettings
from recgpt.model.binary_loss import binary_loss_sum, positive_exponent


def loss_of(settings, interest, table, targets):
    return binary_loss_sum(lambda index: table[index], interest, targets, len(table) - 1, settings)


def test_by_hand():
    """Two items: the negative of item 1 is item 2, or item 1 itself, which is left out."""
    table = torch.tensor([[0.0], [1.0], [-2.0]])
    settings = LossSettings(kind="binary")
    positive = math.log(1 + math.exp(-1))
    negative = math.log(1 + math.exp(-2))
    torch.manual_seed(0)
    values = {
        round(loss_of(settings, torch.ones(1, 1), table, torch.tensor([1])).item(), 5) for _ in range(40)
    }
    assert values == {round(positive / 2, 5), round((positive + negative) / 2, 5)}


def test_positive_exponent_by_hand():
    # V = 11, K = 5: the sampling rate is 1/2.
    assert positive_exponent(LossSettings(negatives_per_target=5), 11) == 1
    assert positive_exponent(LossSettings(negatives_per_target=5, calibration=1.0), 11) == 0.5
    assert positive_exponent(LossSettings(negatives_per_target=5, calibration=0.5), 11) == 0.75
    assert positive_exponent(LossSettings(negatives_per_target=99, calibration=1.0), 11) == 1


def test_equals_torch_and_so_do_its_gradients():
    torch.manual_seed(0)
    interest = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    table = torch.randn(12, 4, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(1, 12, (6,))
    settings = LossSettings(negatives_per_target=3, calibration=0.75)
    torch.manual_seed(7)
    loss = loss_of(settings, interest, table, targets)
    torch.manual_seed(7)
    negatives = torch.randint(1, 12, (6, 3))
    beta = positive_exponent(settings, 11)
    expected = torch.zeros((), dtype=torch.float64)
    for t in range(6):
        positive = torch.sigmoid(interest[t] @ table[targets[t]]) ** beta
        expected = expected - positive.log() / 4
        for item in negatives[t]:
            if item != targets[t]:
                score = interest[t] @ table[item]
                expected = expected + F.binary_cross_entropy_with_logits(score, score.new_zeros(())) / 4
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        torch.autograd.grad(loss, (interest, table)), torch.autograd.grad(expected, (interest, table))
    )


@pytest.mark.parametrize("score", [1e4, -1e4])
def test_extreme_scores_do_not_overflow(score):
    table = torch.tensor([[0.0], [score], [0.0], [-score]], requires_grad=True)
    loss = loss_of(LossSettings(negatives_per_target=20), torch.ones(1, 1), table, torch.tensor([1]))
    loss.backward()
    assert loss.isfinite()
    assert table.grad.isfinite().all()


def test_no_targets():
    table = torch.zeros(3, 2, requires_grad=True)
    interest = torch.zeros(0, 2, requires_grad=True)
    loss = loss_of(LossSettings(), interest, table, torch.zeros(0, dtype=torch.int64))
    loss.backward()
    assert loss.item() == 0
    assert not table.grad.any()
