"""Exact top-k items by dot product, block by block over the item table.

Shapes: B interest vectors, D width, R = V + 1 table rows (row 0 is padding and never found),
N rows in a block, K items asked for, P excluded (row, item) pairs.
"""

import torch
from torch import Tensor

from recgpt.model.scoring import ExcludedPairs, score_blocks
from recgpt.schema import PADDING_INDEX

FIRST_ITEM = PADDING_INDEX + 1


class Exclusions(ExcludedPairs):
    """Items that a search must not find, as (row of the interest vector, item index) pairs.

    In any order; repeats do no harm, and the padding index excludes nothing.
    """

    @classmethod
    def none(cls, device: torch.device) -> "Exclusions":
        return cls(
            torch.empty(0, dtype=torch.int64, device=device), torch.empty(0, dtype=torch.int64, device=device)
        )

    @classmethod
    def from_offsets(cls, item_P: Tensor, offsets: Tensor) -> "Exclusions":
        """Items ``item_P[offsets[b]:offsets[b + 1]]`` are excluded for row b; offsets are int64 [B + 1]."""
        return cls(torch.repeat_interleave(offsets.diff()), item_P)

    @classmethod
    def from_lists(cls, item_BX: Tensor) -> "Exclusions":
        """The same number of items for every row, int64 [B, X]."""
        rows = torch.arange(len(item_BX), device=item_BX.device)
        return cls(rows.repeat_interleave(item_BX.shape[1]), item_BX.flatten())

    def plus(self, other: "Exclusions") -> "Exclusions":
        return Exclusions(torch.cat([self.token_P, other.token_P]), torch.cat([self.item_P, other.item_P]))


class ExactIndex:
    """Searches the whole item table; memory is B x ``block_items`` scores, never B x V.

    Args:
        table_RD: the item table with its padding row 0.
        block_items: items scored at a time.
    """

    def __init__(self, table_RD: Tensor, block_items: int):
        self.table_RD = table_RD
        self.block_items = block_items

    @torch.inference_mode()
    def search(
        self, interest_BD: Tensor, k: int, excluded: Exclusions | None = None
    ) -> tuple[Tensor, Tensor]:
        """The best ``k`` items of each row: scores [B, K], highest first, and item indices int64 [B, K].

        Of equal scores the lower item index comes first, whatever the block size. Exclusions apply
        before the best are taken, so that lists are full as long as enough items remain; where they
        are not, the rest has item index 0 and score -inf. Scores have the dtype of the table.
        """
        batch = len(interest_BD)
        best_score_BK = interest_BD.new_full((batch, k), -torch.inf)
        best_item_BK = torch.full((batch, k), PADDING_INDEX, device=interest_BD.device)
        pairs = Exclusions.none(interest_BD.device) if excluded is None else excluded
        for first, score_BN in score_blocks(interest_BD, self.table_RD, FIRST_ITEM, self.block_items, pairs):
            score_BK, position_BK = _top_of_block(score_BN, k)
            # Items of earlier blocks have lower indices and stand first: a stable sort settles ties.
            score_BK = torch.cat([best_score_BK, score_BK], 1)
            item_BK = torch.cat([best_item_BK, position_BK + first], 1)
            score_BK, order_BK = score_BK.sort(dim=1, descending=True, stable=True)
            best_score_BK = score_BK[:, :k]
            best_item_BK = item_BK.gather(1, order_BK[:, :k])
        return best_score_BK, best_item_BK.masked_fill_(best_score_BK == -torch.inf, PADDING_INDEX)


def _top_of_block(score_BN: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best min(k, N) scores of each row and their positions; of equal scores, the lower position first.

    ``torch.topk`` breaks ties as it likes. One more than ``k`` is taken: only where the last two
    are equal can it have taken the wrong ones of several equal scores, and those rows are done again.
    """
    size = score_BN.shape[1]
    value_BK, position_BK = score_BN.topk(min(k + 1, size), dim=1)
    if size > k:
        doubtful = (
            ((value_BK[:, k] == value_BK[:, k - 1]) & (value_BK[:, k] > -torch.inf)).nonzero().squeeze(1)
        )
        position_BK = position_BK[:, :k]
        if len(doubtful):
            position_BK[doubtful] = _lowest_positions(score_BN[doubtful], value_BK[doubtful, k - 1, None], k)
    position_BK = position_BK.sort(dim=1).values
    value_BK, order_BK = score_BN.gather(1, position_BK).sort(dim=1, descending=True, stable=True)
    return value_BK, position_BK.gather(1, order_BK)


def _lowest_positions(score_BN: Tensor, last_B1: Tensor, k: int) -> Tensor:
    """Positions [B, K] of all scores above each row's k-th best and the first of those equal to it."""
    above_BN = score_BN > last_B1
    equal_BN = score_BN == last_B1
    wanted_B1 = k - above_BN.sum(1, keepdim=True)
    taken_BN = above_BN | (equal_BN & (equal_BN.cumsum(1, dtype=torch.int32) <= wanted_B1))
    return taken_BN.nonzero()[:, 1].view(-1, k)
