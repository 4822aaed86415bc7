"""Softmax losses over many items without the matrix of all scores, and their slow twins.

Shapes: T targets of one process, A those of all ranks, D width, N table rows, R = V + 1 rows of a whole
table (row 0 is padding and never scored), M rows in a block.

For interest vector h_t and target row y_t the loss is  log sum_n w_tn exp(h_t . e_n) - h_t . e_{y_t}.
All weights 1: full cross-entropy. Sampled softmax weighs the rows that were drawn, but never the target
itself.

Scores are computed in tiles. Each is turned at once into a softmax over its own rows, and its log sum
exp is noted (online softmax, Milakov & Gimelshein 2018, arXiv 1805.02867); multiplied by
exp(log sum exp of the tile - log sum exp of all) it gives the probabilities that the gradients need.
"""

from typing import Any

import torch
from torch import Tensor

# Tiles are reused in the backward pass as long as they fit here, and computed again otherwise. More than
# 32 MiB glibc takes from the system anew each time, which costs more than computing the scores again.
_KEPT_BYTES = 32 * 2**20
# Scores that stay in the cache of a CPU between the products that make and use them.
_CACHED_SCORES = 2**20
# Fewer targets at a time than this make the products slow.
_FEWEST_TARGETS = 32
# Stands for log 0: finite, so that a tile in which all weights are 0 gives no inf - inf.
_LOG_ZERO = -1e30


def full_cross_entropy_reference(interest_TD: Tensor, table_RD: Tensor, target_T: Tensor) -> Tensor:
    """Sum over targets, with the whole score matrix: the obvious form, for tests."""
    scores_TV = interest_TD @ table_RD[1:].T
    return torch.nn.functional.cross_entropy(scores_TV, target_T - 1, reduction="sum")


def sampled_softmax_reference(
    interest_TD: Tensor, rows_ND: Tensor, target_row_T: Tensor, first: int, log_weight_N: Tensor
) -> Tensor:
    """``softmax_loss_sum`` with the whole score matrix: the obvious form, for tests."""
    scores_TN = interest_TD @ rows_ND.T
    is_target_TN = torch.nn.functional.one_hot(target_row_T, len(rows_ND)).bool()
    weighted_TN = torch.where(is_target_TN, scores_TN, scores_TN + log_weight_N)
    return (weighted_TN[:, first:].logsumexp(1) - scores_TN[is_target_TN]).sum()


def softmax_loss_sum(
    interest_TD: Tensor,
    rows_ND: Tensor,
    target_row_T: Tensor,
    block_items: int,
    first: int = 0,
    log_weight_N: Tensor | None = None,
) -> Tensor:
    """Sum over targets of the loss; a scalar with gradients to interest vectors and rows.

    Memory is O(T x block) or 4 MiB of scores.

    Args:
        interest_TD: interest vectors, one per target.
        rows_ND: rows of the item table.
        target_row_T: int64 in [first, N).
        block_items: rows scored at a time where the scores of all rows do not fit into the cache.
        first: rows before it (padding) are not scored.
        log_weight_N: logarithm of each row's weight; -inf leaves a row out wherever it is not the target.
    """
    return _SoftmaxLoss.apply(interest_TD, rows_ND, target_row_T, block_items, first, log_weight_N)


def blocks(first: int, end: int, size: int) -> list[tuple[int, int]]:
    """(first, end) of consecutive ranges of at most ``size`` that cover [first, end)."""
    return [(start, min(start + size, end)) for start in range(first, end, size)]


class SoftmaxScores:
    """The loss in two halves, between which ranks that hold different rows combine their sums.

    No autograd inside. Rows may be bfloat16: they are converted block by block, all else has the dtype of
    the interest vectors.

    Args:
        interest_AD: interest vectors.
        rows_ND: rows that these are scored against.
        target_row_A: int64 in [first, N), or -1 where the target is not among these rows.
        block_items: rows scored at a time.
        first: rows before it are not scored.
        log_weight_N: logarithm of each row's weight, for those whose target it is not; None: all weigh 1.
    """

    maximum_A: Tensor
    """The largest score, about; -inf without rows."""
    total_A: Tensor
    """Sum of weight x exp(score - maximum); 0 without rows."""
    target_score_A: Tensor
    """The score of the target where it is here, else 0."""

    def __init__(
        self,
        interest_AD: Tensor,
        rows_ND: Tensor,
        target_row_A: Tensor,
        block_items: int,
        first: int = 0,
        log_weight_N: Tensor | None = None,
    ):
        self._interest_AD = interest_AD
        self._rows_ND = rows_ND
        self._log_weight_N = None if log_weight_N is None else log_weight_N.clamp(min=_LOG_ZERO)
        self._blocks = blocks(first, len(rows_ND), block_items) if len(interest_AD) else []

        self._here = (target_row_A >= 0).nonzero().squeeze(1)
        self._target_row = target_row_A[self._here]
        self._target_vector = rows_ND[self._target_row].to(interest_AD.dtype)
        target_score = (interest_AD[self._here] * self._target_vector).sum(1)
        self.target_score_A = interest_AD.new_zeros(len(interest_AD)).index_copy_(0, self._here, target_score)

        tile = len(interest_AD) * min(block_items, max(len(rows_ND) - first, 0))
        kept = _KEPT_BYTES // max(tile * interest_AD.element_size(), 1)
        self._tiles = interest_AD.new_empty(min(max(kept, 1), len(self._blocks)), tile)
        self._block_in_tile = [-1] * len(self._tiles)

        self.maximum_A = interest_AD.new_full((len(interest_AD),), -torch.inf)
        self.total_A = torch.zeros_like(self.maximum_A)
        self._log_sum_exp = []  # over each block, [A]
        for block in range(len(self._blocks)):
            self._add_block(*self._fill_tile(block))

    def gradients(
        self, log_sum_exp_A: Tensor, rows_gradient_ND: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the sum of (log sum exp - target score), these rows' part. To be called once.

        Args:
            log_sum_exp_A: of weighted scores over the rows of all ranks.
            rows_gradient_ND: what the rows' gradient is added to; zeros if not given.

        Returns the gradients of interest vectors [A, D] and rows [N, D].
        """
        interest_AD = self._interest_AD
        interest_gradient_AD = torch.zeros_like(interest_AD)
        if rows_gradient_ND is None:
            rows_gradient_ND = torch.zeros_like(self._rows_ND, dtype=interest_AD.dtype)
        for block in reversed(range(len(self._blocks))):  # the last tile still holds the last block
            softmax_AM = self._softmax(block)
            scale_A1 = (self._log_sum_exp[block] - log_sum_exp_A).exp_()[:, None]
            interest_gradient_AD.addcmul_(softmax_AM @ self._rows(block), scale_A1)
            rows_gradient_ND[slice(*self._blocks[block])].addmm_(softmax_AM.T, interest_AD * scale_A1)
        interest_gradient_AD.index_add_(0, self._here, self._target_vector, alpha=-1)
        rows_gradient_ND.index_add_(0, self._target_row, interest_AD[self._here], alpha=-1)
        return interest_gradient_AD, rows_gradient_ND

    def _add_block(self, maximum_A: Tensor, total_A: Tensor) -> None:
        self._log_sum_exp.append(maximum_A + total_A.log())
        new_maximum_A = torch.maximum(self.maximum_A, maximum_A)
        self.total_A *= (self.maximum_A - new_maximum_A).exp_()
        self.total_A += total_A * (maximum_A - new_maximum_A).exp_()
        self.maximum_A = new_maximum_A

    def _softmax(self, block: int) -> Tensor:
        """The softmax over the rows of one block, [A, M]."""
        if self._block_in_tile[self._tile_of(block)] != block:
            self._fill_tile(block)
        return self._tile(block)

    def _fill_tile(self, block: int) -> tuple[Tensor, Tensor]:
        """Compute a block's softmax; returns maximum [A] and sum of exp(score - maximum) [A] of its scores."""
        scores_AM = torch.mm(self._interest_AD, self._rows(block).T, out=self._tile(block))
        if self._log_weight_N is not None:
            start, end = self._blocks[block]
            scores_AM += self._log_weight_N[start:end]
            inside = ((self._target_row >= start) & (self._target_row < end)).nonzero().squeeze(1)
            place = self._here[inside], self._target_row[inside] - start
            scores_AM[place] = self.target_score_A[place[0]]
        maximum_A = scores_AM.amax(1)
        # torch's softmax is faster than its exp, and may write over what it reads.
        softmax_AM = torch.softmax(scores_AM, 1, out=scores_AM)
        self._block_in_tile[self._tile_of(block)] = block
        return maximum_A, softmax_AM.amax(1).reciprocal_()  # the largest probability is exp(0) / total

    def _tile_of(self, block: int) -> int:
        return min(block, len(self._tiles) - 1)

    def _tile(self, block: int) -> Tensor:
        """Where a block's scores are, [A, M] without gaps."""
        start, end = self._blocks[block]
        num_targets = len(self._interest_AD)
        return self._tiles[self._tile_of(block)][: num_targets * (end - start)].view(num_targets, end - start)

    def _rows(self, block: int) -> Tensor:
        return self._rows_ND[slice(*self._blocks[block])].to(self._interest_AD.dtype)


class _SoftmaxLoss(torch.autograd.Function):
    """Loss and gradients at once: a few targets' scores of all rows are still in the cache then."""

    @staticmethod
    def forward(
        ctx: Any,
        interest_TD: Tensor,
        rows_ND: Tensor,
        target_row_T: Tensor,
        block_items: int,
        first: int,
        log_weight_N: Tensor | None,
    ) -> Tensor:
        num_targets, num_rows = len(interest_TD), max(len(rows_ND), 1)
        at_a_time = _CACHED_SCORES // num_rows
        if at_a_time >= _FEWEST_TARGETS:
            block_items = num_rows
        else:
            at_a_time = max(num_targets, 1)
        loss = interest_TD.new_zeros(())
        ctx.interest_gradient_TD = torch.empty_like(interest_TD)
        ctx.rows_gradient_ND = torch.zeros_like(rows_ND, dtype=interest_TD.dtype)
        for start, end in blocks(0, num_targets, at_a_time):
            scores = SoftmaxScores(
                interest_TD[start:end], rows_ND, target_row_T[start:end], block_items, first, log_weight_N
            )
            log_sum_exp = scores.maximum_A + scores.total_A.log()
            loss += (log_sum_exp - scores.target_score_A).sum()
            ctx.interest_gradient_TD[start:end], _ = scores.gradients(log_sum_exp, ctx.rows_gradient_ND)
        return loss

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        (scale,) = gradients
        return ctx.interest_gradient_TD * scale, ctx.rows_gradient_ND * scale, None, None, None, None
