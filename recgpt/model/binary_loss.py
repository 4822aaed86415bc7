"""Binary cross-entropy of the target against a few drawn items, plain or calibrated.

Shapes: T targets, D width, K negatives for each target.

With target score s and negative scores s_k the loss of a target is

    - ( beta x log sigmoid(s) + sum_k log(1 - sigmoid(s_k)) ) / (K + 1)

The paper's own loss (Zhang et al. 2024, after SASRec) has K = 1 and beta = 1. gBCE (Petrov & Macdonald
2023, arXiv 2308.07192) undoes the overconfidence that drawing negatives causes: with sampling rate
a = K / (V - 1) and calibration t, beta = a (t (1 - 1/a) + 1/a) = 1 - t (1 - a).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from recgpt.config import LossSettings


def binary_loss_sum(
    vectors: Callable[[Tensor], Tensor],
    interest_TD: Tensor,
    target_T: Tensor,
    num_items: int,
    settings: LossSettings,
) -> Tensor:
    """Sum of the loss over targets (int64 [T], item indices >= 1); a scalar.

    A drawn item that is the target itself is left out. Collective if ``vectors`` is.

    Args:
        vectors: item vectors [n, D] of item indices, int64 [n].
    """
    shape = len(target_T), settings.negatives_per_target
    negative_TK = torch.randint(1, num_items + 1, shape, device=target_T.device)
    vector = vectors(torch.cat([target_T, negative_TK.flatten()]))
    target_score_T = (interest_TD * vector[: len(target_T)]).sum(1)
    negative_TKD = vector[len(target_T) :].view(*shape, interest_TD.shape[1])
    negative_score_TK = torch.einsum("td,tkd->tk", interest_TD, negative_TKD)
    # -log(1 - sigmoid(s)) = softplus(s)
    negative_loss_TK = F.softplus(negative_score_TK).masked_fill(negative_TK == target_T[:, None], 0)
    beta = positive_exponent(settings, num_items)
    loss_T = negative_loss_TK.sum(1) - beta * F.logsigmoid(target_score_T)
    return loss_T.sum() / (settings.negatives_per_target + 1)


def positive_exponent(settings: LossSettings, num_items: int) -> float:
    """beta of gBCE."""
    sampling_rate = min(settings.negatives_per_target / max(num_items - 1, 1), 1.0)
    return 1 - settings.calibration * (1 - sampling_rate)
