"""Scoring interest vectors against item rows block by block, without ever holding all scores.

Shapes: T interest vectors, D width, N item rows, P excluded (token, row) pairs, M rows in a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from recgpt.model.losses import blocks
from recgpt.model.row_ranges import Rows


@dataclass
class ExcludedPairs:
    """Items that must not be chosen for a token: pair p forbids ``item_P[p]`` to token ``token_P[p]``."""

    token_P: Tensor  # int64
    item_P: Tensor  # int64; item indices, or rows of a shard

    def with_targets(self, target_T: Tensor) -> "ExcludedPairs":
        """Also forbid each token its own target, so that rounding cannot count it against itself."""
        token_T = torch.arange(len(target_T), device=target_T.device)
        return ExcludedPairs(torch.cat([self.token_P, token_T]), torch.cat([self.item_P, target_T]))

    def among(self, row_S: Tensor) -> "ExcludedPairs":
        """The pairs whose item is one of ``row_S`` (int64, ascending, not empty), as places in it."""
        place_P = torch.searchsorted(row_S, self.item_P).clamp(max=len(row_S) - 1)
        here = row_S[place_P] == self.item_P
        return ExcludedPairs(self.token_P[here], place_P[here])

    def ranks(self, above_T: Tensor, target_T: Tensor, worst: int) -> Tensor:
        """1-based ranks from the number of items above; ``worst`` where the target itself is excluded."""
        rank_T = (above_T + 1).clamp(max=worst)
        rank_T[self.token_P[self.item_P == target_T[self.token_P]]] = worst
        return rank_T


def no_pairs(device: torch.device) -> ExcludedPairs:
    """Nothing is forbidden."""
    nothing = torch.empty(0, dtype=torch.int64, device=device)
    return ExcludedPairs(nothing, nothing)


def score_blocks(
    interest_TD: Tensor,
    rows_ND: Rows,
    first: int,
    block_items: int,
    excluded: ExcludedPairs,
    multiple: int = 1,
) -> Iterator[tuple[int, Tensor]]:
    """(first row of the block, scores [T, M]) over rows ``first`` onwards; excluded pairs score -inf.

    M is a multiple of ``multiple``: columns beyond the rows of the block score -inf, too. Without autograd.
    The next block is written over the last one, which may be changed until then: fresh memory for each
    would cost the CPU as much time as the product itself.
    """
    item_P, order = excluded.item_P.sort()
    token_P = excluded.token_P[order]
    ranges = blocks(first, len(rows_ND), block_items)
    edges = torch.tensor([first, *(end for _, end in ranges)], device=item_P.device)
    pair_of_edge = torch.searchsorted(item_P, edges).tolist()
    widths = [-(-(end - start) // multiple) * multiple for start, end in ranges]
    buffer_TM = interest_TD.new_empty(len(interest_TD), max(widths, default=0))
    for (start, end), width, (low, high) in zip(ranges, widths, pairwise(pair_of_edge), strict=True):
        scores_TM = buffer_TM[:, :width]
        rows_MD = rows_ND[start:end].to(interest_TD.dtype)
        torch.mm(interest_TD, rows_MD.T, out=scores_TM[:, : end - start])
        scores_TM[:, end - start :] = -torch.inf
        if low < high:
            scores_TM[token_P[low:high], item_P[low:high] - start] = -torch.inf
        yield start, scores_TM


@torch.no_grad()
def best_row(
    interest_TD: Tensor,
    rows_ND: Rows,
    first: int,
    block_items: int,
    excluded: ExcludedPairs,
    temperature: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """The best score [T] and its row (int64 [T]); the lower row wins a tie. Without rows: -inf and row 0.

    With a temperature a row is drawn in proportion to exp(score / temperature): it is the best by the
    scores that have Gumbel noise added (Gumbel 1954; Kool et al. 2019, arXiv 1903.06059), which are then
    what is returned, so that the best over several shards is a draw from all their rows.
    """
    best_T = interest_TD.new_full((len(interest_TD),), -torch.inf)
    row_T = torch.zeros(len(interest_TD), dtype=torch.int64, device=interest_TD.device)
    for start, scores_TM in score_blocks(interest_TD, rows_ND, first, block_items, excluded):
        if temperature:
            noise_TM = torch.empty_like(scores_TM).exponential_().log_()
            scores_TM.sub_(noise_TM, alpha=temperature)
        block_best_T, block_row_T = scores_TM.max(1)
        better_T = block_best_T > best_T
        best_T = torch.where(better_T, block_best_T, best_T)
        row_T = torch.where(better_T, block_row_T + start, row_T)
    return best_T, row_T


@torch.no_grad()
def count_at_least(
    interest_TD: Tensor,
    threshold_T: Tensor,
    rows_ND: Rows,
    first: int,
    block_items: int,
    excluded: ExcludedPairs,
) -> Tensor:
    """How many rows score at least ``threshold_T`` (float [T]): int64 [T]."""
    count_T = torch.zeros(len(interest_TD), dtype=torch.int64, device=interest_TD.device)
    for _, scores_TM in score_blocks(interest_TD, rows_ND, first, block_items, excluded):
        # Not `>=`: a model whose scores are not numbers must lose, not win.
        count_T += (~(scores_TM < threshold_T[:, None])).sum(1)
    return count_T
