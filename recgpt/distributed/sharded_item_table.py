"""The row-sharded item table: a ``ShardedTable`` that also scores, with the interface of ``ItemTable``.

Shapes: V = num_items, R = V + 1 table rows (row 0 is padding), N rows of this rank, D width, T tokens
of this rank, A tokens of all ranks, S drawn rows of this rank, M members of the model.

All ranks' interest vectors are gathered, every rank scores them against its own rows (all, or those
that it drew), and the sums are combined: exact, and communication does not depend on the number of
items. Its plain twin is ``recgpt.model.item_table.ItemTable``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recgpt.config import LossSettings
from recgpt.distributed import collectives
from recgpt.distributed.sharded_table import ShardedTable, row_range
from recgpt.model.binary_loss import binary_loss_sum
from recgpt.model.item_table import loss_kind
from recgpt.model.losses import KEPT_BYTES, SoftmaxScores
from recgpt.model.members import by_member
from recgpt.model.negatives import NegativeSampler
from recgpt.model.scoring import ExcludedPairs, best_row, count_at_least
from recgpt.model.unit_rows import UnitRows


class ShardedItemTable(ShardedTable):
    """This rank's rows of the item table. All methods that compute are collective.

    Args:
        loss: what ``loss_sum`` computes.
        count_R: int64 of the whole table, 0 for padding; only this rank's part is kept.
    """

    def __init__(
        self,
        num_items: int,
        width: int,
        seed: int,
        loss: LossSettings,
        count_R: Tensor,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        unit_rows: bool = False,
        members: int = 1,
    ):
        self.num_items = num_items
        self.loss = loss
        first, end = row_range(num_items + 1, collectives.rank(), collectives.world_size())
        self.first_scored = 1 if first == 0 else 0  # the padding row is never scored
        assert end - first > self.first_scored, "a rank has no item"
        # Before the rows: what sorting takes for a moment is free again when they come.
        total_count = int(count_R.sum())
        self.sampler = NegativeSampler(loss, count_R[first:end].to(device), self.first_scored, total_count)
        super().__init__(num_items + 1, width, seed, device, dtype, unit_rows, members)

    def loss_sum(self, interest_TD: Tensor, target_T: Tensor) -> Tensor:
        """Sum over this rank's targets of the members' mean loss; a scalar.

        All ranks must scale their loss by the same factor before the backward pass.
        """
        if loss_kind(self.loss, self.num_items) == "binary":
            return binary_loss_sum(self, interest_TD, target_T, self.num_items, self.loss, self.members)
        return _ShardedSoftmaxLoss.apply(interest_TD, target_T, self)

    def best_item(
        self,
        interest_TD: Tensor,
        excluded: ExcludedPairs,
        pool_items: int | None = None,
        temperature: float = 0.0,
    ) -> Tensor:
        """The best allowed item index of each interest vector, int64 [T]; the lower one wins a tie.

        The best of all items or, with ``pool_items``, of that many drawn ones, the ranks together. With a
        ``temperature`` one of them is drawn, in proportion to exp(score / temperature).
        """
        everywhere = self._gather(interest_TD, excluded)
        block = self.loss.block_items
        if pool_items is None:
            rows = self.all_vectors()
            best_A, row_A = best_row(
                everywhere.interest_AD, rows, self.first_scored, block, everywhere.excluded, temperature
            )
        else:
            row_S = self.sampler.draw(self._share(pool_items)).unique()
            among = everywhere.excluded.among(row_S)
            best_A, place_A = best_row(
                everywhere.interest_AD, self.vectors(row_S), 0, block, among, temperature
            )
            row_A = row_S[place_A]
        global_best_A = collectives.max_over_ranks(best_A.clone())
        index_A = torch.where(best_A == global_best_A, row_A + self.first, self.num_rows)
        return -collectives.max_over_ranks(-index_A)[everywhere.mine]

    def rank_of(self, interest_TD: Tensor, target_T: Tensor, excluded: ExcludedPairs) -> Tensor:
        """1-based rank of each target among all allowed items, int64 [T]; ties count against the target.

        A target that is itself excluded (its user chose it before) ranks after all items.
        """
        everywhere = self._gather(interest_TD, excluded.with_targets(target_T))
        local_A = self.local_rows(collectives.gather_rows(target_T, everywhere.sizes))
        target_AD = self.vectors(local_A.clamp(min=0)).to(interest_TD.dtype)
        score_A = (everywhere.interest_AD * target_AD).sum(1).where(local_A >= 0, 0)
        collectives.sum_over_ranks(score_A)
        above_A = count_at_least(
            everywhere.interest_AD,
            score_A,
            self.all_vectors(),
            self.first_scored,
            self.loss.block_items,
            everywhere.excluded,
        )
        return excluded.ranks(collectives.sum_over_ranks(above_A)[everywhere.mine], target_T, self.num_rows)

    def softmax_scores(
        self, interest_AD: Tensor, local_A: Tensor
    ) -> tuple[list[SoftmaxScores], Tensor | None]:
        """Each member's scores of all ranks' interest vectors against rows of this rank, and which rows
        (None: all).

        Args:
            local_A: int64, local row of each target, or -1.
        """
        rows: Tensor | UnitRows
        if loss_kind(self.loss, self.num_items) == "full":
            rows, row_S, place_A = self.all_vectors(), None, local_A
            first, log_weight_S = self.first_scored, None
        else:
            here = local_A >= 0
            sampled = self.sampler.sample(self._share(self.loss.negatives), local_A[here], len(local_A))
            rows, row_S = self.vectors(sampled.row_S), sampled.row_S
            place_A = torch.searchsorted(sampled.row_S, local_A).where(here, -1)
            first, log_weight_S = 0, sampled.log_weight_S.to(interest_AD.dtype)
        block, kept_bytes = self.loss.block_items, KEPT_BYTES // self.members
        scores = [
            SoftmaxScores(*part, place_A, block, first, log_weight_S, kept_bytes)
            for part in by_member(interest_AD, rows, self.members)
        ]
        return scores, row_S

    def _share(self, draws: int) -> int:
        """This rank's part of a global number of draws, at least one."""
        first, end = row_range(draws, collectives.rank(), collectives.world_size())
        return max(end - first, 1)

    def _gather(self, interest_TD: Tensor, excluded: ExcludedPairs) -> "_Everywhere":
        device = interest_TD.device
        sizes = collectives.gather_sizes(len(interest_TD), device)
        pair_sizes = collectives.gather_sizes(len(excluded.token_P), device)
        first = sum(sizes[: collectives.rank()])
        token_P = collectives.gather_rows(excluded.token_P + first, pair_sizes)
        row_P = self.local_rows(collectives.gather_rows(excluded.item_P, pair_sizes))
        here = row_P >= 0
        return _Everywhere(
            interest_AD=collectives.gather_rows(interest_TD, sizes),
            excluded=ExcludedPairs(token_P[here], row_P[here]),
            sizes=sizes,
            mine=slice(first, first + len(interest_TD)),
        )


@dataclass
class _Everywhere:
    """The interest vectors of all ranks, and what this rank's rows need to know of them."""

    interest_AD: Tensor
    excluded: ExcludedPairs  # local rows
    sizes: list[int]  # interest vectors of each rank
    mine: slice  # where this rank's are


class _ShardedSoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, interest_TD: Tensor, target_T: Tensor, table: ShardedItemTable) -> Tensor:
        sizes = collectives.gather_sizes(len(target_T), target_T.device)
        interest_AD = collectives.gather_rows(interest_TD, sizes)
        local_A = table.local_rows(collectives.gather_rows(target_T, sizes))
        scores, ctx.rows = table.softmax_scores(interest_AD, local_A)
        here_MA = torch.stack([member.log_sum_exp_A for member in scores])
        target_score_MA = torch.stack([member.target_score_A for member in scores])
        maximum_MA = collectives.max_over_ranks(here_MA.clone())
        sums_2MA = torch.stack([(here_MA - maximum_MA).exp(), target_score_MA])
        total_MA, target_score_MA = collectives.sum_over_ranks(sums_2MA)
        log_sum_exp_MA = maximum_MA + total_MA.log()
        first = sum(sizes[: collectives.rank()])
        ctx.mine = slice(first, first + len(target_T))
        ctx.table, ctx.scores, ctx.log_sum_exp_MA = table, scores, log_sum_exp_MA
        return (log_sum_exp_MA - target_score_MA).mean(0)[ctx.mine].sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = gradients
        gradients_of_members = [
            member.gradients(log_sum_exp_A)
            for member, log_sum_exp_A in zip(ctx.scores, ctx.log_sum_exp_MA, strict=True)
        ]
        interest_gradient_AD, rows_gradient = (
            parts[0] if len(parts) == 1 else torch.cat(parts, 1)
            for parts in zip(*gradients_of_members, strict=True)
        )
        # Of the mean over members of a loss by interest vectors times their number.
        ctx.table.add_gradient(ctx.rows, rows_gradient.mul_(scale / ctx.table.members))
        collectives.sum_over_ranks(interest_gradient_AD)
        return interest_gradient_AD[ctx.mine] * scale, None, None
