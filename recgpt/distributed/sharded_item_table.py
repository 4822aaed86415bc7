"""The row-sharded item table: each rank holds a contiguous range of rows and computes on no others.

Shapes: V = num_items, R = V + 1 table rows (row 0 is padding), N rows of this rank, D width, T tokens
of this rank, A tokens of all ranks, W ranks. Its plain twin is ``recgpt.model.item_table.ItemTable``.

Lookup: the unique ids of the step go to their owners by all-to-all (sizes first, then ids), the rows
come back by the mirrored all-to-all; in the backward pass gradients, summed over equal ids, travel
like the ids. Loss: all ranks' interest vectors are gathered, every rank scores them against its own
rows, and the softmax sums are combined; communication does not depend on the number of items.

The table is outside the DeepSpeed engine. Its gradient is the sum over ranks; like the engine's
average for the dense weights it is divided once, by W, in ``take_gradient``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recgpt.distributed import collectives
from recgpt.model.item_table import initial_rows
from recgpt.model.losses import block_cross_entropy_gradients, block_log_sum_exp
from recgpt.model.scoring import ExcludedPairs, best_row, count_at_least


def row_range(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """(first, end) of the table rows that a rank owns."""
    return rank * num_rows // world_size, (rank + 1) * num_rows // world_size


class ShardedItemTable:
    """This rank's rows, with the interface of ``ItemTable``. All methods that compute are collective.

    It is no module and has no parameters, so that the engine around the GPT does not see it.
    """

    def __init__(self, num_items: int, width: int, seed: int, loss_block_items: int, device: torch.device):
        self.num_rows = num_items + 1
        assert self.num_rows >= collectives.world_size(), "fewer table rows than workers"
        self.loss_block_items = loss_block_items
        world_size = collectives.world_size()
        bounds = [row_range(self.num_rows, r, world_size)[0] for r in range(1, world_size)]
        self.first, self.end = row_range(self.num_rows, collectives.rank(), world_size)
        self.first_scored = 1 if self.first == 0 else 0  # the padding row is never scored
        self.rows = initial_rows(seed, self.first, self.end, width).to(device)
        self._bounds = torch.tensor(bounds, dtype=torch.int64, device=device)
        self._gradient = _GradientSum()

    def __call__(self, item_index_T: Tensor) -> Tensor:
        """Item vectors [T, D] of item indices (int64 [T])."""
        anchor = torch.zeros((), requires_grad=True, device=self.rows.device)
        return _Lookup.apply(item_index_T, anchor, self)

    def loss_sum(self, interest_TD: Tensor, target_T: Tensor) -> Tensor:
        """Sum over this rank's targets of full cross-entropy; a scalar.

        All ranks must scale their loss by the same factor before the backward pass.
        """
        return _ShardedCrossEntropy.apply(interest_TD, target_T, self)

    def best_item(self, interest_TD: Tensor, excluded: ExcludedPairs) -> Tensor:
        """The best allowed item index of each interest vector, int64 [T]; the lower one wins a tie."""
        everywhere = self._gather(interest_TD, excluded)
        best_A, row_A = best_row(
            everywhere.interest_AD, self.rows, self.first_scored, self.loss_block_items, everywhere.excluded
        )
        global_best_A = collectives.max_over_ranks(best_A.clone())
        index_A = torch.where(best_A == global_best_A, row_A + self.first, self.num_rows)
        return -collectives.max_over_ranks(-index_A)[everywhere.mine]

    def rank_of(self, interest_TD: Tensor, target_T: Tensor, excluded: ExcludedPairs) -> Tensor:
        """1-based rank of each target among all allowed items, int64 [T]; ties count against the target.

        A target that is itself excluded (its user chose it before) ranks after all items.
        """
        everywhere = self._gather(interest_TD, excluded.with_targets(target_T))
        local_A = self.local_rows(collectives.gather_rows(target_T, everywhere.sizes))
        score_A = (everywhere.interest_AD * self.rows[local_A.clamp(min=0)]).sum(1).where(local_A >= 0, 0)
        collectives.sum_over_ranks(score_A)
        above_A = count_at_least(
            everywhere.interest_AD,
            score_A,
            self.rows,
            self.first_scored,
            self.loss_block_items,
            everywhere.excluded,
        )
        return excluded.ranks(collectives.sum_over_ranks(above_A)[everywhere.mine], target_T, self.num_rows)

    def take_gradient(self) -> tuple[Tensor | None, Tensor]:
        """The mean over ranks of the gradient since the last call, and forget it.

        Returns (rows, gradient): int64 [U] distinct local rows and float [U, D]; or, when every row
        took part in a loss, (None, float [N, D]).
        """
        rows, gradient = self._gradient.take(self.rows)
        return rows, gradient.div_(collectives.world_size())

    def owner(self, item_index_T: Tensor) -> Tensor:
        """The rank that owns each item index, int64 [T]."""
        return torch.bucketize(item_index_T, self._bounds, right=True)

    def local_rows(self, item_index_T: Tensor) -> Tensor:
        """Rows of this shard, int64 [T]; -1 where another rank owns the item."""
        here = (item_index_T >= self.first) & (item_index_T < self.end)
        return torch.where(here, item_index_T - self.first, -1)

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


class _GradientSum:
    """Gradients of one shard, kept sparse as long as only single rows were used."""

    def __init__(self) -> None:
        self._dense: Tensor | None = None
        self._sparse: list[tuple[Tensor, Tensor]] = []

    def add_rows(self, rows_U: Tensor, gradient_UD: Tensor) -> None:
        self._sparse.append((rows_U, gradient_UD))

    def add_dense(self, gradient_ND: Tensor) -> None:
        self._dense = gradient_ND if self._dense is None else self._dense.add_(gradient_ND)

    def take(self, table_ND: Tensor) -> tuple[Tensor | None, Tensor]:
        dense, sparse = self._dense, self._sparse
        self._dense, self._sparse = None, []
        if dense is not None:
            for rows_U, gradient_UD in sparse:
                dense.index_add_(0, rows_U, gradient_UD)
            return None, dense
        if not sparse:
            return torch.empty(0, dtype=torch.int64, device=table_ND.device), table_ND.new_empty(
                0, table_ND.shape[1]
            )
        rows, position = torch.cat([rows for rows, _ in sparse]).unique(return_inverse=True)
        summed = table_ND.new_zeros(len(rows), table_ND.shape[1])
        summed.index_add_(0, position, torch.cat([gradient for _, gradient in sparse]))
        return rows, summed


@dataclass
class _Route:
    """Who asked whom for which rows in one lookup."""

    position_T: Tensor  # place of each token's id among the unique ids
    send_sizes: list[int]
    receive_sizes: list[int]
    asked_rows: Tensor  # local rows that others asked for, ordered by asking rank


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, item_index_T: Tensor, anchor: Tensor, table: ShardedItemTable) -> Tensor:
        # Sorted ids of contiguous ranges are ordered by owner.
        unique_ids, position_T = item_index_T.unique(return_inverse=True)
        send_sizes = table.owner(unique_ids).bincount(minlength=collectives.world_size())
        receive_sizes = collectives.exchange_sizes(send_sizes)
        route = _Route(position_T, send_sizes.tolist(), receive_sizes.tolist(), torch.empty(0))
        asked_ids = collectives.exchange_rows(unique_ids, route.send_sizes, route.receive_sizes)
        route.asked_rows = asked_ids - table.first
        unique_vectors = collectives.exchange_rows(
            table.rows[route.asked_rows], route.receive_sizes, route.send_sizes
        )
        ctx.route, ctx.table, ctx.num_unique = route, table, len(unique_ids)
        return unique_vectors[position_T]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (gradient_TD,) = gradients
        route: _Route = ctx.route
        unique_gradient = gradient_TD.new_zeros(ctx.num_unique, gradient_TD.shape[1])
        unique_gradient.index_add_(0, route.position_T, gradient_TD)
        asked_gradient = collectives.exchange_rows(unique_gradient, route.send_sizes, route.receive_sizes)
        ctx.table._gradient.add_rows(route.asked_rows, asked_gradient)
        return None, gradient_TD.new_zeros(()), None


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, interest_TD: Tensor, target_T: Tensor, table: ShardedItemTable) -> Tensor:
        sizes = collectives.gather_sizes(len(target_T), target_T.device)
        interest_AD = collectives.gather_rows(interest_TD, sizes)
        local_A = table.local_rows(collectives.gather_rows(target_T, sizes))
        maximum_A, total_A = block_log_sum_exp(
            interest_AD, table.rows, table.first_scored, table.loss_block_items
        )
        global_maximum_A = collectives.max_over_ranks(maximum_A.clone())
        target_score_A = (interest_AD * table.rows[local_A.clamp(min=0)]).sum(1).where(local_A >= 0, 0)
        sums_2A = torch.stack([total_A * (maximum_A - global_maximum_A).exp(), target_score_A])
        total_A, target_score_A = collectives.sum_over_ranks(sums_2A)
        log_sum_exp_A = global_maximum_A + total_A.log()
        first = sum(sizes[: collectives.rank()])
        ctx.mine = slice(first, first + len(target_T))
        ctx.table = table
        ctx.save_for_backward(interest_AD, local_A, log_sum_exp_A)
        return (log_sum_exp_A - target_score_A)[ctx.mine].sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = gradients
        interest_AD, local_A, log_sum_exp_A = ctx.saved_tensors
        table: ShardedItemTable = ctx.table
        interest_gradient_AD, table_gradient_ND = block_cross_entropy_gradients(
            interest_AD, table.rows, local_A, log_sum_exp_A, table.first_scored, table.loss_block_items
        )
        table._gradient.add_dense(table_gradient_ND.mul_(scale))
        collectives.sum_over_ranks(interest_gradient_AD)
        return interest_gradient_AD[ctx.mine] * scale, None, None
