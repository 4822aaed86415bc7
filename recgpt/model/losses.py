"""Full cross-entropy over all items, block by block, and its slow twin.

Shapes: T targets, D width, R = V + 1 table rows (row 0 is padding and never scored), N rows in a block.

For interest vector h_t and target y_t the loss is  log sum_v exp(h_t . e_v) - h_t . e_{y_t}.
The [T x V] scores are never held whole: the forward pass keeps a running maximum and sum over
blocks of items (online softmax, Milakov & Gimelshein 2018, arXiv 1805.02867), the backward pass
computes each block again. Memory is O(T x N).
"""

from typing import Any

import torch
from torch import Tensor


def full_cross_entropy_reference(interest_TD: Tensor, table_RD: Tensor, target_T: Tensor) -> Tensor:
    """Sum over targets, with the whole score matrix: the obvious form, for tests."""
    scores_TV = interest_TD @ table_RD[1:].T
    return torch.nn.functional.cross_entropy(scores_TV, target_T - 1, reduction="sum")


def full_cross_entropy(interest_TD: Tensor, table_RD: Tensor, target_T: Tensor, block_items: int) -> Tensor:
    """Sum over targets of the full cross-entropy.

    Args:
        interest_TD: interest vectors, one per target.
        table_RD: the item table with its padding row 0.
        target_T: int64 item indices in [1, V].
        block_items: items scored at a time.
    """
    return _BlockCrossEntropy.apply(interest_TD, table_RD, target_T, block_items)


def blocks(first: int, end: int, size: int) -> list[tuple[int, int]]:
    """(first, end) of consecutive ranges of at most ``size`` that cover [first, end)."""
    return [(start, min(start + size, end)) for start in range(first, end, size)]


def block_log_sum_exp(
    interest_TD: Tensor, table_ND: Tensor, first: int, block_items: int
) -> tuple[Tensor, Tensor]:
    """Running maximum [T] and sum of exp(score - maximum) [T] over rows ``first`` onwards.

    Without any row the maximum is -inf and the sum is 0.
    """
    maximum_T = interest_TD.new_full((len(interest_TD),), -torch.inf)
    total_T = torch.zeros_like(maximum_T)
    if not len(interest_TD):
        return maximum_T, total_T
    for start, end in blocks(first, len(table_ND), block_items):
        scores_TN = interest_TD @ table_ND[start:end].T
        new_maximum_T = torch.maximum(maximum_T, scores_TN.amax(1))
        total_T *= (maximum_T - new_maximum_T).exp_()
        total_T += scores_TN.sub_(new_maximum_T[:, None]).exp_().sum(1)
        maximum_T = new_maximum_T
    return maximum_T, total_T


def block_cross_entropy_gradients(
    interest_TD: Tensor,
    table_ND: Tensor,
    local_target_T: Tensor,
    log_sum_exp_T: Tensor,
    first: int,
    block_items: int,
) -> tuple[Tensor, Tensor]:
    """Gradients of the summed loss with respect to interest [T, D] and table [N, D].

    ``local_target_T`` are rows of this table, or -1 where the target is elsewhere.
    """
    interest_gradient_TD = torch.zeros_like(interest_TD)
    table_gradient_ND = torch.zeros_like(table_ND)
    for start, end in blocks(first, len(table_ND), block_items) if len(interest_TD) else []:
        block_ND = table_ND[start:end]
        probability_TN = (interest_TD @ block_ND.T).sub_(log_sum_exp_T[:, None]).exp_()
        interest_gradient_TD.addmm_(probability_TN, block_ND)
        torch.mm(probability_TN.T, interest_TD, out=table_gradient_ND[start:end])
    here = (local_target_T >= 0).nonzero().squeeze(1)
    rows = local_target_T[here]
    interest_gradient_TD[here] -= table_ND[rows]
    table_gradient_ND.index_add_(0, rows, interest_TD[here], alpha=-1)
    return interest_gradient_TD, table_gradient_ND


class _BlockCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, interest_TD: Tensor, table_RD: Tensor, target_T: Tensor, block_items: int
    ) -> Tensor:
        maximum_T, total_T = block_log_sum_exp(interest_TD, table_RD, 1, block_items)
        log_sum_exp_T = maximum_T + total_T.log()
        ctx.save_for_backward(interest_TD, table_RD, target_T, log_sum_exp_T)
        ctx.block_items = block_items
        return (log_sum_exp_T - (interest_TD * table_RD[target_T]).sum(1)).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:
        interest_TD, table_RD, target_T, log_sum_exp_T = ctx.saved_tensors
        interest_gradient_TD, table_gradient_RD = block_cross_entropy_gradients(
            interest_TD, table_RD, target_T, log_sum_exp_T, 1, ctx.block_items
        )
        (scale,) = gradients
        return interest_gradient_TD.mul_(scale), table_gradient_RD.mul_(scale), None, None
