"""Binary cross-entropy of the target against a few drawn items, plain or calibrated.

Shapes: T targets, D width, K negatives for each target, M members of the model, S = D / M width of each, N
vectors looked up.

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
    members: int = 1,
) -> Tensor:
    """Sum over targets (int64 [T], item indices >= 1) of the members' mean loss; a scalar.

    A drawn item that is the target itself is left out. Collective if ``vectors`` is.

    Args:
        vectors: item vectors [n, D] of item indices, int64 [n].
    """
    shape = len(target_T), settings.negatives_per_target
    negative_TK = torch.randint(1, num_items + 1, shape, device=target_T.device)
    vector = vectors(torch.cat([target_T, negative_TK.flatten()]))
    interest_TMS, vector_NMS = (x.unflatten(1, (members, -1)) for x in (members * interest_TD, vector))
    target_score_TM = (interest_TMS * vector_NMS[: len(target_T)]).sum(2)
    negative_TKMS = vector_NMS[len(target_T) :].unflatten(0, shape)
    negative_score_TKM = torch.einsum("tms,tkms->tkm", interest_TMS, negative_TKMS)
    # -log(1 - sigmoid(s)) = softplus(s)
    is_target_TK1 = (negative_TK == target_T[:, None])[:, :, None]
    negative_loss_TKM = F.softplus(negative_score_TKM).masked_fill(is_target_TK1, 0)
    beta = positive_exponent(settings, num_items)
    loss_TM = negative_loss_TKM.sum(1) - beta * F.logsigmoid(target_score_TM)
    return loss_TM.sum() / members / (settings.negatives_per_target + 1)


def positive_exponent(settings: LossSettings, num_items: int) -> float:
    """beta of gBCE."""
    sampling_rate = min(settings.negatives_per_target / max(num_items - 1, 1), 1.0)
    return 1 - settings.calibration * (1 - sampling_rate)
