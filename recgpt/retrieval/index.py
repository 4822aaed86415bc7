"""What an index promises, and exact search: the best k items by dot product, block by block over the table.

A block costs little more than its matrix product. Its scores are looked at in groups of neighbours: only
groups whose highest score beats the k-th best so far are looked into, and only scores that beat it go on.

Shapes: B interest vectors, D width, R = V + 1 table rows (row 0 is padding and never found), N rows in a
block, G groups of a block, H groups that are looked into, C scores that go on, K items asked for,
P excluded (row, item) pairs, A allowed items, X items looked up.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from recgpt.errors import UserError
from recgpt.model.losses import blocks
from recgpt.model.row_ranges import Rows
from recgpt.model.scoring import ExcludedPairs, score_blocks
from recgpt.schema import PADDING_INDEX

FIRST_ITEM = PADDING_INDEX + 1
GROUP = 32  # neighbours whose highest score is compared first


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

    def for_branches(self, width: int) -> "Exclusions":
        """The same items for each of ``width`` rows that take the place of one row."""
        branch_W = torch.arange(width, device=self.token_P.device)
        row_PW = self.token_P[:, None] * width + branch_W
        return Exclusions(row_PW.flatten(), self.item_P.repeat_interleave(width))


class Index(Protocol):
    """Finds the best items of interest vectors, and knows the items' own vectors.

    Which items may be found at all is settled when an index is made.
    """

    def search(
        self, interest_BD: Tensor, k: int, excluded: Exclusions | None = None
    ) -> tuple[Tensor, Tensor]:
        """The best ``k`` items of each row: scores [B, K], highest first, and item indices int64 [B, K].

        Of equal scores the lower item index comes first. Exclusions apply before the best are taken, so
        that lists are full as long as enough items remain; where they are not, the rest has item index 0
        and score -inf. An index that is not exact may miss items, but none of these rules.
        Raises ``UserError`` if scores are not finite: such lists would be wrong, or short, in silence.
        """
        ...

    def vectors(self, item_X: Tensor) -> Tensor:
        """The vectors of items (int64, any shape; also items that are not allowed, and padding), [X, D]."""
        ...


class ExactIndex:
    """Searches the whole item table; memory is B x ``block_items`` scores, never B x V.

    Args:
        table_RD: the item table with its padding row 0.
        block_items: items scored at a time.
        allowed: the items that may be found, int64 [A], ascending, without repeats; None: all. Few are
            copied out of the table; of many, the others are passed over where they lie.
        coarse: a dtype in which all items are scored first, of a copy of the table; more than enough of the
            best are then scored again as they are. None: everything is scored as it is.
        copied: whether the allowed items are copied; None: if they are few (see ``few_allowed``).
    """

    def __init__(
        self,
        table_RD: Rows,
        block_items: int,
        allowed: Tensor | None = None,
        coarse: torch.dtype | None = None,
        copied: bool | None = None,
    ):
        self.table_RD = table_RD
        self.block_items = block_items
        self.searched_RD = table_RD
        self.item_of_row: Tensor | None = None  # of ``searched_RD``; None: row and item are the same
        blocked = torch.empty(0, dtype=torch.int64)
        if allowed is not None and (few_allowed(allowed, len(table_RD)) if copied is None else copied):
            self.item_of_row = F.pad(allowed.to(table_RD[:0].device), (1, 0), value=PADDING_INDEX)
            self.searched_RD = table_RD[self.item_of_row]
        elif allowed is not None:
            blocked = _others(allowed, len(table_RD)).to(table_RD[:0].device)
        self.blocked_columns = _columns_of_blocks(blocked, len(self.searched_RD), block_items)
        self.coarse = coarse
        if coarse is not None:
            self.searched_RD = self.searched_RD[:].to(coarse)

    @torch.inference_mode()
    def search(
        self, interest_BD: Tensor, k: int, excluded: Exclusions | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``Index.search`` says, whatever the block size. Scores have the dtype of the table."""
        pairs: ExcludedPairs = Exclusions.none(interest_BD.device) if excluded is None else excluded
        if self.item_of_row is not None:
            pairs = pairs.among(self.item_of_row)
        if self.coarse is None:
            return self._best(interest_BD, k, pairs)
        _, item_BC = self._best(interest_BD.to(self.coarse), candidates_of_coarse_search(k), pairs)
        return rescore(interest_BD, self.vectors(item_BC), item_BC, k)

    def vectors(self, item_X: Tensor) -> Tensor:
        """As ``Index.vectors`` says."""
        return self.table_RD[item_X]

    def _best(self, interest_BD: Tensor, k: int, excluded: ExcludedPairs) -> tuple[Tensor, Tensor]:
        best_score_BK = interest_BD.new_full((len(interest_BD), k), -torch.inf)
        best_row_BK = torch.full_like(best_score_BK, PADDING_INDEX, dtype=torch.int64)
        scored = score_blocks(interest_BD, self.searched_RD, FIRST_ITEM, self.block_items, excluded, GROUP)
        for (first, score_BN), blocked in zip(scored, self.blocked_columns, strict=True):
            if len(blocked):
                score_BN[:, blocked] = -torch.inf
            user_C, column_C, score_C = _above(best_score_BK[:, -1:], score_BN, k)
            if len(user_C):
                best_score_BK, best_row_BK = _merged(
                    best_score_BK, best_row_BK, user_C, column_C + first, score_C
                )
        self._check_full(best_score_BK, excluded)
        return best_score_BK, best_row_BK if self.item_of_row is None else self.item_of_row[best_row_BK]

    def _check_full(self, best_score_BK: Tensor, excluded: ExcludedPairs) -> None:
        """What is left of the items without a score of -inf must be in the lists, or fill them."""
        num_users, k = best_score_BK.shape
        num_items = len(self.searched_RD) - FIRST_ITEM - sum(map(len, self.blocked_columns))
        # Repeats and items that are blocked anyway count as well, so that at least so many are left.
        least_left_B = num_items - torch.bincount(excluded.token_P, minlength=num_users)
        found_B = (best_score_BK > -torch.inf).sum(1)
        if (found_B < least_left_B.clamp(max=k)).any():
            raise scores_not_finite()


def scores_not_finite() -> UserError:
    return UserError(
        "the model gives scores that are not finite numbers: it is damaged, or its training diverged; "
        "train again"
    )


def few_allowed(allowed: Tensor, num_rows: int) -> bool:
    """Whether the allowed items are so few of a table that a copy of them is searched, and not the table."""
    return 2 * len(allowed) < num_rows


def candidates_of_coarse_search(k: int) -> int:
    """How many candidates of a coarse search have the best ``k``, all but surely, among them."""
    return max(4 * k, k + 32)


def rescore(interest_BD: Tensor, vector_BCD: Tensor, item_BC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best ``k`` of C candidates, scored by their vectors: scores [B, K] and items int64 [B, K].

    In the order that ``Index.search`` promises, whatever the order of the candidates; candidates with item
    index 0 are none. Raises ``UserError`` if scores are not finite.
    """
    score_BC = torch.einsum("bd,bcd->bc", interest_BD, vector_BCD)
    if not (score_BC.isfinite() | (item_BC == PADDING_INDEX)).all():
        raise scores_not_finite()
    score_BC.masked_fill_(item_BC == PADDING_INDEX, -torch.inf)
    return best_of_lists(score_BC, item_BC, k)


def best_of_lists(score_BC: Tensor, item_BC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` best of C scored items in any order, highest first; of equal scores the lower item first."""
    item_BC, order_BC = item_BC.sort(dim=1, stable=True)
    score_BC, by_score_BC = score_BC.gather(1, order_BC).sort(dim=1, descending=True, stable=True)
    return score_BC[:, :k], item_BC.gather(1, by_score_BC[:, :k])


def _above(last_B1: Tensor, score_BN: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The scores above each row's ``last_B1``: row and column (int64 [C], ascending) and score [C].

    N is a multiple of GROUP. Of a block full of them, some are left out that ``k`` others surpass.
    Raises ``UserError`` for scores that are +inf, or no number.
    """
    grouped_BGX = score_BN.unflatten(1, (-1, GROUP))
    highest_BG = grouped_BGX.amax(2)
    if not (highest_BG < torch.inf).all():  # which a NaN in a group makes false, too
        raise scores_not_finite()
    hit_BG = highest_BG > last_B1
    hit_H2 = hit_BG.nonzero()
    if 2 * len(hit_H2) > hit_BG.numel():  # as in the first block
        last_B1 = torch.maximum(last_B1, _below_best(grouped_BGX, highest_BG, k))
        hit_H2 = (highest_BG > last_B1).nonzero()
    row_H, group_H = hit_H2.unbind(1)
    score_HX = grouped_BGX[row_H, group_H]
    hit_C, place_C = (score_HX > last_B1[row_H]).nonzero().unbind(1)
    return row_H[hit_C], group_H[hit_C] * GROUP + place_C, score_HX[hit_C, place_C]


def _below_best(grouped_BGX: Tensor, highest_BG: Tensor, k: int) -> Tensor:
    """A value [B, 1] so that the best ``k`` scores of each row, and all equal to the last of them, are above.

    Tight enough if the best of k groups tell: then only these need be sorted.
    """
    score_BN = highest_BG if 2 * k < highest_BG.shape[1] else grouped_BGX.flatten(1)
    if k > score_BN.shape[1]:
        return torch.full_like(score_BN[:, :1], -torch.inf)
    last_B1 = score_BN.topk(k, dim=1, sorted=False).values.amin(1, keepdim=True)
    return torch.nextafter(last_B1, last_B1.new_tensor(-torch.inf))


def _merged(
    best_score_BK: Tensor, best_row_BK: Tensor, user_C: Tensor, row_C: Tensor, score_C: Tensor
) -> tuple[Tensor, Tensor]:
    """The best lists with the scores of later rows put in; both in the order of ``user_C`` and ``row_C``."""
    num_users, k = best_score_BK.shape
    number_B = torch.bincount(user_C, minlength=num_users)
    place_C = torch.arange(k, k + len(user_C), device=user_C.device) - (number_B.cumsum(0) - number_B)[user_C]
    room = (0, int(number_B.max()))
    score_BN = F.pad(best_score_BK, room, value=-torch.inf)
    row_BN = F.pad(best_row_BK, room, value=PADDING_INDEX)
    score_BN[user_C, place_C] = score_C
    row_BN[user_C, place_C] = row_C
    # Rows of earlier blocks are lower and stand first: a stable sort settles ties.
    score_BN, order_BN = score_BN.sort(dim=1, descending=True, stable=True)
    return score_BN[:, :k], row_BN.gather(1, order_BN[:, :k])


def _others(item_A: Tensor, num_rows: int) -> Tensor:
    """The items of a table that are not among these (int64, ascending)."""
    other_R = torch.ones(num_rows, dtype=torch.bool)
    other_R[PADDING_INDEX] = False
    other_R[item_A.cpu()] = False
    return other_R.nonzero().squeeze(1)


def _columns_of_blocks(item_A: Tensor, num_rows: int, block_items: int) -> Sequence[Tensor]:
    """The columns of each block of scores that belong to these items (int64, ascending)."""
    starts = [start for start, _ in blocks(FIRST_ITEM, num_rows, block_items)]
    parts = item_A.tensor_split(torch.searchsorted(item_A.cpu(), torch.tensor(starts[1:])))
    return [part - start for part, start in zip(parts, starts, strict=False)]
