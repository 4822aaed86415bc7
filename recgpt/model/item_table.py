"""The item table: one vector per item index, input of the model and, tied, its output.

Shapes: V = num_items, table rows R = V + 1 (row 0 is padding), D width, T tokens, S drawn rows.
"""

import numpy as np
import torch
from torch import Tensor, nn

from recgpt.config import LossSettings
from recgpt.model.binary_loss import binary_loss_sum
from recgpt.model.fused_loss import fused_cross_entropy, fused_kernel_fits
from recgpt.model.losses import softmax_loss_sum
from recgpt.model.members import by_member
from recgpt.model.negatives import NegativeSampler
from recgpt.model.scoring import ExcludedPairs, best_row, count_at_least
from recgpt.model.unit_rows import UnitRows, unit

INIT_STANDARD_DEVIATION = 0.02
_INIT_CHUNK_ROWS = 4096


class ItemTable(nn.Module):
    """The whole table in one process: the simple choice, and the reference for the sharded one.

    Args:
        loss: what ``loss_sum`` computes.
        unit_rows: show rows divided by their length, for cosine similarity.
        members: models side by side, each with a loss of its own.
        count_R: int64, occurrences of each row in the log, 0 for padding; decides what is drawn.
    """

    def __init__(
        self,
        num_items: int,
        width: int,
        seed: int,
        loss: LossSettings,
        count_R: Tensor,
        unit_rows: bool = False,
        members: int = 1,
    ):
        super().__init__()
        self.num_items = num_items
        self.loss = loss
        self.unit_rows = unit_rows
        self.members = members
        self.sampler = NegativeSampler(loss, count_R, first=1, total_count=int(count_R.sum()))
        self.weight = nn.Parameter(initial_rows(seed, 0, num_items + 1, width))

    def forward(self, item_index_T: Tensor) -> Tensor:
        """Item vectors [T, D] of item indices (int64 [T])."""
        return self._shown(nn.functional.embedding(item_index_T, self.weight))

    def vectors(self) -> Tensor:
        """All item vectors, [R, D]."""
        return self._shown(self.weight)

    def _view(self) -> Tensor | UnitRows:
        """All item vectors, made as they are read: for scoring without gradients."""
        return UnitRows(self.weight, self.weight.dtype, self.members) if self.unit_rows else self.weight

    def _shown(self, rows_ND: Tensor) -> Tensor:
        return unit(rows_ND, self.members) if self.unit_rows else rows_ND

    def loss_sum(self, interest_TD: Tensor, target_T: Tensor) -> Tensor:
        """Sum over targets (int64 [T], item indices >= 1) of the members' mean loss; a scalar."""
        kind, block, members = loss_kind(self.loss, self.num_items), self.loss.block_items, self.members
        if kind == "binary":
            return binary_loss_sum(self, interest_TD, target_T, self.num_items, self.loss, members)
        if kind == "full" and fused_kernel_fits(interest_TD):
            parts = by_member(interest_TD, self.vectors(), members)
            losses = [fused_cross_entropy(interest_TS, rows_RS, target_T) for interest_TS, rows_RS in parts]
        elif kind == "full":
            parts = by_member(interest_TD, self.vectors(), members)
            losses = [softmax_loss_sum(*part, target_T, block, first=1) for part in parts]
        else:
            sampled = self.sampler.sample(self.loss.negatives, target_T, len(target_T))
            place_T = torch.searchsorted(sampled.row_S, target_T)
            log_weight_S = sampled.log_weight_S.to(interest_TD.dtype)
            parts = by_member(interest_TD, self(sampled.row_S), members)
            losses = [softmax_loss_sum(*part, place_T, block, 0, log_weight_S) for part in parts]
        return torch.stack(losses).mean()

    def best_item(
        self,
        interest_TD: Tensor,
        excluded: ExcludedPairs,
        pool_items: int | None = None,
        temperature: float = 0.0,
    ) -> Tensor:
        """The best allowed item index of each interest vector, int64 [T]; the lower one wins a tie.

        The best of all items or, with ``pool_items``, of that many drawn ones. With a ``temperature`` one of
        them is drawn, in proportion to exp(score / temperature).
        """
        block = self.loss.block_items
        if pool_items is None:
            return best_row(interest_TD, self._view(), 1, block, excluded, temperature)[1]
        row_S = self.sampler.draw(pool_items).unique()
        place_T = best_row(interest_TD, self(row_S), 0, block, excluded.among(row_S), temperature)[1]
        return row_S[place_T]

    def rank_of(self, interest_TD: Tensor, target_T: Tensor, excluded: ExcludedPairs) -> Tensor:
        """1-based rank of each target among all allowed items, int64 [T]; ties count against the target.

        A target that is itself excluded (its user chose it before) ranks after all items.
        """
        score_T = (interest_TD * self(target_T)).sum(1)
        others = excluded.with_targets(target_T)
        above_T = count_at_least(interest_TD, score_T, self._view(), 1, self.loss.block_items, others)
        return excluded.ranks(above_T, target_T, len(self.weight))


def loss_kind(loss: LossSettings, num_items: int) -> str:
    """`full`, `sampled` or `binary`."""
    if loss.kind != "auto":
        return loss.kind
    return "full" if num_items < loss.sampled_from_items else "sampled"


def initial_rows(
    seed: int,
    first: int,
    end: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Initial rows ``first`` to ``end`` (exclusive), [end - first, D].

    A row depends on (seed, row) alone, so that it starts the same whatever shard holds it. No more
    than one chunk of rows exists besides the result.
    """
    rows = torch.empty(end - first, width, dtype=dtype, device=device)
    for chunk in range(first // _INIT_CHUNK_ROWS, -(-end // _INIT_CHUNK_ROWS)):
        # Not torch's generator: on the CPU it looks at 32 bits of the seed only.
        generator = np.random.default_rng((seed, chunk))
        values = generator.standard_normal((_INIT_CHUNK_ROWS, width), dtype=np.float32)
        chunk_first = chunk * _INIT_CHUNK_ROWS
        start, stop = max(first - chunk_first, 0), min(end - chunk_first, _INIT_CHUNK_ROWS)
        place = chunk_first + start - first
        rows[place : place + stop - start] = torch.from_numpy(values[start:stop] * INIT_STANDARD_DEVIATION)
    return rows
