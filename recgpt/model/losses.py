"""Softmax cross-entropy over many rows, block by block, and its slow twins.

Shapes: T targets of this rank, A targets of all ranks, D width, N table rows, M rows in a block.

For interest vector h_t and target row y_t the loss is

    log( sum_n w_tn exp(h_t . e_n) ) - h_t . e_{y_t}

with all w = 1 for full cross-entropy, and weights of drawn rows for sampled softmax, where w of the target
itself is 1 always. The scores of all targets against all rows are never held whole: the forward pass
takes the softmax of each block and remembers its log-sum-exp (online softmax, Milakov & Gimelshein
2018, arXiv 1805.02867), from which the backward pass gets the probabilities over all blocks. It uses
the blocks of the forward pass as far as they fit ``KEPT_BYTES``, and computes the rest again: memory is
O(A x M) and that constant.
"""

from typing import Any

import torch
from torch import Tensor

from recgpt.model.unit_rows import UnitRows

# More than 32 MiB glibc takes from the system anew each time, which costs what computing again costs.
KEPT_BYTES = 32 << 20
# Larger blocks leave the cache between the passes over their scores, which halves the speed on a CPU.
# On a GPU it is the other way round: small ones leave it waiting for the next.
_SCORES_AT_A_TIME = {"cpu": 1 << 19, "cuda": 1 << 26}
_TARGETS_AT_A_TIME = {"cpu": 512, "cuda": 1 << 16}
_NEVER = -1e30  # log of a weight of 0; finite, because a block of nothing else would become NaN


def full_cross_entropy_reference(interest_TD: Tensor, table_RD: Tensor, target_T: Tensor) -> Tensor:
    """Sum over targets (int64 item indices), row 0 being padding: the obvious form, for tests."""
    scores_TV = interest_TD @ table_RD[1:].T
    return torch.nn.functional.cross_entropy(scores_TV, target_T - 1, reduction="sum")


def sampled_softmax_reference(
    interest_TD: Tensor, rows_ND: Tensor, target_row_T: Tensor, first: int, log_weight_N: Tensor
) -> Tensor:
    """Sum over targets of the weighted form, with the whole score matrix, for tests."""
    target_score_T = (interest_TD * rows_ND[target_row_T]).sum(1)
    weighted_TN = interest_TD @ rows_ND[first:].T + log_weight_N[first:]
    weighted_TN = weighted_TN.scatter(1, (target_row_T - first)[:, None], target_score_T[:, None])
    return (weighted_TN.logsumexp(1) - target_score_T).sum()


def softmax_loss_sum(
    interest_TD: Tensor,
    rows_ND: Tensor,
    target_row_T: Tensor,
    block_items: int,
    first: int = 0,
    log_weight_N: Tensor | None = None,
) -> Tensor:
    """Sum over targets of the loss over ``rows_ND``; a scalar. Arguments as ``SoftmaxScores``."""
    return _SoftmaxLoss.apply(interest_TD, rows_ND, target_row_T, block_items, first, log_weight_N)


def blocks(first: int, end: int, size: int) -> list[tuple[int, int]]:
    """(first, end) of consecutive ranges of at most ``size`` that cover [first, end)."""
    return [(start, min(start + size, end)) for start in range(first, end, size)]


class SoftmaxScores:
    """Both halves of the loss, with a gap between them in which ranks can combine what they found.

    ``log_sum_exp_A`` (-inf without rows) and ``target_score_A`` (0 where the target is not among these
    rows) are there once it is made; ``gradients`` gives what follows from the log-sum-exp over the rows of
    all ranks. No autograd inside.

    Args:
        interest_AD: interest vectors, one per target.
        rows_ND: table rows, in any floating type; products are computed in that of ``interest_AD``.
        target_row_A: int64 row of each target, -1 where another rank has it.
        block_items: rows scored at a time, at most.
        first: rows before it (padding) take no part.
        log_weight_N: log of the rows' weights for all but their own targets; None: all weights are 1.
        kept_bytes: of the blocks of the forward pass that are kept for the backward pass, at most.
    """

    def __init__(
        self,
        interest_AD: Tensor,
        rows_ND: Tensor | UnitRows,
        target_row_A: Tensor,
        block_items: int,
        first: int = 0,
        log_weight_N: Tensor | None = None,
        kept_bytes: int = KEPT_BYTES,
    ):
        self._interest_AD = interest_AD
        self._rows_ND = rows_ND
        self._target_row_A = target_row_A
        self._log_weight_N = None if log_weight_N is None else log_weight_N.clamp(min=_NEVER)
        self._here = (target_row_A >= 0).nonzero().squeeze(1)
        size = max(
            min(block_items, _SCORES_AT_A_TIME[interest_AD.device.type] // max(len(interest_AD), 1)), 1
        )
        if size % 32 == 0:
            size -= 16  # strides of a power of two share few sets of the cache: transposed, a quarter slower
        self._blocks = blocks(first, len(rows_ND), size) if len(interest_AD) else []
        self._score_buffer = interest_AD.new_empty(len(interest_AD) * size)
        block_bytes = self._score_buffer.numel() * self._score_buffer.element_size()
        kept = min(kept_bytes // max(block_bytes, 1), len(self._blocks))
        self._kept = interest_AD.new_empty(kept, self._score_buffer.numel())
        self._target_AD = rows_ND[target_row_A[self._here]].to(interest_AD.dtype)
        self.target_score_A = interest_AD.new_zeros(len(interest_AD))
        self.target_score_A[self._here] = (interest_AD[self._here] * self._target_AD).sum(1)
        self._log_sum_exp_of_block = [self._softmax(number)[1] for number in range(len(self._blocks))]
        nothing_A = interest_AD.new_full((len(interest_AD),), -torch.inf)
        self.log_sum_exp_A = torch.stack([nothing_A, *self._log_sum_exp_of_block]).logsumexp(0)

    def gradients(
        self, log_sum_exp_A: Tensor, rows_gradient_ND: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the sum over targets of the loss, as far as it depends on these rows.

        Args:
            log_sum_exp_A: over the rows of all ranks.
            rows_gradient_ND: what the gradient by rows is added to; zeros if not given.

        Returns gradients by interest vectors [A, D] and by rows [N, D], in the type of the former.
        """
        interest_gradient_AD = torch.zeros_like(self._interest_AD)
        if rows_gradient_ND is None:
            rows_gradient_ND = interest_gradient_AD.new_zeros(self._rows_ND.shape)
        for number, (start, end) in enumerate(self._blocks):
            probability_AM = self._probabilities(number)
            share_A1 = (self._log_sum_exp_of_block[number] - log_sum_exp_A).exp_()[:, None]
            block_MD = self._rows_ND[start:end].to(self._interest_AD.dtype)
            interest_gradient_AD.addcmul_(probability_AM @ block_MD, share_A1)
            rows_gradient_ND[start:end].addmm_(probability_AM.T, self._interest_AD * share_A1)
        interest_gradient_AD[self._here] -= self._target_AD
        target_rows = self._target_row_A[self._here]
        rows_gradient_ND.index_add_(0, target_rows, self._interest_AD[self._here], alpha=-1)
        return interest_gradient_AD, rows_gradient_ND

    def _probabilities(self, number: int) -> Tensor:
        """Softmax [A, M] within a block, kept or computed again."""
        start, end = self._blocks[number]
        if number < len(self._kept):
            return self._kept[number][: len(self._interest_AD) * (end - start)].view(-1, end - start)
        return self._softmax(number)[0]

    def _softmax(self, number: int) -> tuple[Tensor, Tensor]:
        """Softmax [A, M] within a block, and the block's log-sum-exp [A]."""
        start, end = self._blocks[number]
        num_targets = len(self._interest_AD)
        scores_AM = self._score_buffer[: num_targets * (end - start)].view(num_targets, end - start)
        torch.mm(self._interest_AD, self._rows_ND[start:end].to(scores_AM.dtype).T, out=scores_AM)
        if self._log_weight_N is not None:
            self._weight(scores_AM, start, end)
        maximum_A = scores_AM.amax(1)
        probability_AM = scores_AM if number >= len(self._kept) else self._probabilities(number)
        torch.softmax(scores_AM, 1, out=probability_AM)
        # The largest probability is exp(0) / sum of exp(score - maximum).
        return probability_AM, maximum_A - probability_AM.amax(1).log()

    def _weight(self, scores_AM: Tensor, start: int, end: int) -> None:
        """Add the log weights, but not to the score of a target's own row."""
        assert self._log_weight_N is not None
        scores_AM += self._log_weight_N[start:end]
        place = self._target_row_A - start
        own = ((place >= 0) & (place < end - start)).nonzero().squeeze(1)
        scores_AM[own, place[own]] = self.target_score_A[own]


class _SoftmaxLoss(torch.autograd.Function):
    """In one process there is no gap: gradients are made at once, some targets at a time."""

    @staticmethod
    def forward(
        ctx: Any, interest_TD: Tensor, rows_ND: Tensor, target_row_T: Tensor, *arguments: Any
    ) -> Tensor:
        loss = interest_TD.new_zeros(())
        interest_gradient_TD = torch.empty_like(interest_TD)
        rows_gradient_ND = torch.zeros_like(rows_ND)
        for start, end in blocks(0, len(target_row_T), _TARGETS_AT_A_TIME[interest_TD.device.type]):
            some = slice(start, end)
            scores = SoftmaxScores(interest_TD[some], rows_ND, target_row_T[some], *arguments)
            loss += (scores.log_sum_exp_A - scores.target_score_A).sum()
            if any(ctx.needs_input_grad):
                interest_gradient_TD[some], _ = scores.gradients(scores.log_sum_exp_A, rows_gradient_ND)
            del scores  # or its blocks would stand beside those of the next
        ctx.save_for_backward(interest_gradient_TD, rows_gradient_ND)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        (scale,) = gradients
        interest_gradient_TD, rows_gradient_ND = ctx.saved_tensors
        return interest_gradient_TD * scale, rows_gradient_ND * scale, None, None, None, None
