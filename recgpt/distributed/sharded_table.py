"""A row-sharded table: each rank holds a contiguous range of rows and computes on no others.

Shapes: R rows of the whole table, N rows of this rank, D width, T tokens of this rank, U distinct rows.

Lookup: the unique ids of a step go to their owners by all-to-all (sizes first, then ids), the rows
come back by the mirrored all-to-all; in the backward pass gradients, summed over equal ids, travel
like the ids. Each rank hands over, in all, as many bytes as

    unique ids x (8 + 2 x D x bytes of a value)

on average over the ranks: 8 for the id, once D values for the row and once for its gradient.

The table is outside the DeepSpeed engine. Its gradient is the sum over ranks; like the engine's
average for the dense weights it is divided once, by W, in ``take_gradient``.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recgpt.config import ItemTableSettings
from recgpt.distributed import collectives
from recgpt.model.item_table import initial_rows
from recgpt.model.unit_rows import UnitRows, gradient_by_raw_rows, unit


def is_sharded(settings: ItemTableSettings, num_items: int) -> bool:
    """Whether the item table is split over the workers."""
    automatically = settings.placement == "auto" and num_items >= settings.sharded_from_items
    return settings.placement == "sharded" or automatically


def row_range(num_rows: int, rank: int, world_size: int) -> tuple[int, int]:
    """(first, end) of the table rows that a rank owns."""
    return rank * num_rows // world_size, (rank + 1) * num_rows // world_size


class ShardedTable:
    """This rank's rows of a table of vectors; lookups are collective.

    It is no module and has no parameters, so that the engine around the GPT does not see it. Rows
    are kept and sent as ``rows.dtype``; vectors, gradients and losses are computed in ``compute_dtype``,
    which is float32 unless the rows are float64. With ``unit_rows`` vectors are rows divided by their
    length (of a model with ``members`` each member's part by its own): gradients travel as those by
    vectors, and become those by rows where the rows are.

    Rows are reached through ``read``, ``rows_in_use`` and, by the optimizer, ``write`` alone: a store that
    keeps cold rows elsewhere (in pinned host memory, say) has these three to replace.
    """

    def __init__(
        self,
        num_rows: int,
        width: int,
        seed: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        unit_rows: bool = False,
        members: int = 1,
    ):
        self.num_rows = num_rows
        self.unit_rows = unit_rows
        self.members = members
        world_size = collectives.world_size()
        assert num_rows >= world_size, "fewer table rows than workers"
        bounds = [row_range(num_rows, rank, world_size)[0] for rank in range(1, world_size)]
        self._bounds = torch.tensor(bounds, dtype=torch.int64, device=device)
        self.first, self.end = row_range(num_rows, collectives.rank(), world_size)
        self.rows = initial_rows(seed, self.first, self.end, width, dtype, device)
        self.bring_up_to_date: Callable[[Tensor | None], None] = lambda rows: None
        """Set by an optimizer that leaves work on rows undone until they are read: called with the local
        rows (int64 [U], or None for all) that are about to be read."""
        self._gradient = _GradientSum()

    def __deepcopy__(self, memo: dict[int, Any]) -> "ShardedTable":
        """A copied model shares its tables: there is one shard per rank."""
        return self

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.rows.dtype == torch.float64 else torch.float32

    def __call__(self, id_T: Tensor) -> Tensor:
        """Vectors, ``compute_dtype`` [T, D], of table rows ``id_T`` (int64 [T]). Collective."""
        anchor = torch.zeros((), requires_grad=True, device=self.rows.device)
        return _Lookup.apply(id_T, anchor, self)

    def read(self, row_U: Tensor) -> Tensor:
        """Local rows ``row_U`` (int64 [U]) as they are now, ``rows.dtype`` [U, D]."""
        self.bring_up_to_date(row_U)
        return self.rows.index_select(0, row_U)

    def vectors(self, row_U: Tensor) -> Tensor:
        """What local rows ``row_U`` (int64 [U]) show: themselves or, with ``unit_rows``, of length 1."""
        return self.shown(self.read(row_U))

    def all_vectors(self) -> Tensor | UnitRows:
        """What all local rows show, [N, D]."""
        rows_ND = self.rows_in_use()
        return UnitRows(rows_ND, self.compute_dtype, self.members) if self.unit_rows else rows_ND

    def shown(self, rows_UD: Tensor) -> Tensor:
        """Rows in ``rows.dtype`` as they take part in lookups and losses."""
        return unit(rows_UD.to(self.compute_dtype), self.members) if self.unit_rows else rows_UD

    def rows_in_use(self) -> Tensor:
        """All local rows as they are now, ``rows.dtype`` [N, D]: the tensor itself."""
        self.bring_up_to_date(None)
        return self.rows

    def write(self, row_U: Tensor, value_UD: Tensor) -> None:
        """Replace distinct local rows (int64 [U]) by ``value_UD`` in ``rows.dtype``."""
        self.rows.index_copy_(0, row_U, value_UD)

    def add_gradient(self, row_U: Tensor | None, gradient_UD: Tensor) -> None:
        """Add to the gradient of local rows; ``row_U`` None means all rows, in order."""
        self._gradient.add(row_U, gradient_UD)

    def take_gradient(self) -> tuple[Tensor | None, Tensor]:
        """The mean over ranks of the gradient since the last call, and forget it.

        Returns (rows, gradient) in ``compute_dtype``: int64 [U] distinct, ascending local rows and [U, D];
        or, when every row took part in a loss, (None, [N, D]).
        """
        rows, gradient = self._gradient.take(self.rows.shape[1], self.compute_dtype, self.rows.device)
        if self.unit_rows:
            raw_UD = self.rows_in_use() if rows is None else self.read(rows)
            gradient_by_raw_rows(raw_UD, gradient, self.members)
        return rows, gradient.div_(collectives.world_size())

    def owner(self, id_T: Tensor) -> Tensor:
        """The rank that owns each row, int64 [T]."""
        return torch.bucketize(id_T, self._bounds, right=True)

    def local_rows(self, id_T: Tensor) -> Tensor:
        """Rows of this shard, int64 [T]; -1 where another rank owns the row."""
        here = (id_T >= self.first) & (id_T < self.end)
        return torch.where(here, id_T - self.first, -1)


def gradient_norm(gradients: Sequence[Tensor]) -> float:
    """The Euclidean norm over the gradients of all tables and ranks. Collective."""
    if not gradients:
        return 0.0
    squares = torch.stack([gradient.square().sum(dtype=torch.float64) for gradient in gradients]).sum()
    return math.sqrt(float(collectives.sum_over_ranks(squares)))


class _GradientSum:
    """Gradients of one shard, kept sparse as long as only single rows were used."""

    def __init__(self) -> None:
        self._dense: Tensor | None = None
        self._sparse: list[tuple[Tensor, Tensor]] = []

    def add(self, row_U: Tensor | None, gradient_UD: Tensor) -> None:
        if row_U is not None:
            self._sparse.append((row_U, gradient_UD))
        elif self._dense is None:
            self._dense = gradient_UD
        else:
            self._dense.add_(gradient_UD)

    def take(self, width: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor | None, Tensor]:
        dense, sparse = self._dense, self._sparse
        self._dense, self._sparse = None, []
        if dense is not None:
            for row_U, gradient_UD in sparse:
                dense.index_add_(0, row_U, gradient_UD.to(dtype))
            return None, dense
        if not sparse:
            return torch.empty(0, dtype=torch.int64, device=device), torch.empty(
                0, width, dtype=dtype, device=device
            )
        rows, position = torch.cat([row_U for row_U, _ in sparse]).unique(return_inverse=True)
        summed = torch.zeros(len(rows), width, dtype=dtype, device=device)
        summed.index_add_(0, position, torch.cat([gradient_UD.to(dtype) for _, gradient_UD in sparse]))
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
    def forward(ctx: Any, id_T: Tensor, anchor: Tensor, table: ShardedTable) -> Tensor:
        # Sorted ids of contiguous ranges are ordered by owner.
        unique_ids, position_T = id_T.unique(return_inverse=True)
        send_sizes = table.owner(unique_ids).bincount(minlength=collectives.world_size())
        sizes = send_sizes.tolist(), collectives.exchange_sizes(send_sizes).tolist()
        asked_ids = collectives.exchange_rows(unique_ids, *sizes)
        ctx.route = _Route(position_T, *sizes, asked_ids - table.first)
        vector_UD = collectives.exchange_rows(table.read(ctx.route.asked_rows), *reversed(sizes))
        ctx.table, ctx.num_unique = table, len(unique_ids)
        return table.shown(vector_UD).to(table.compute_dtype)[position_T]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (gradient_TD,) = gradients
        route: _Route = ctx.route
        table: ShardedTable = ctx.table
        gradient_UD = gradient_TD.new_zeros(ctx.num_unique, gradient_TD.shape[1])
        gradient_UD.index_add_(0, route.position_T, gradient_TD)
        asked_gradient = collectives.exchange_rows(
            gradient_UD.to(table.rows.dtype), route.send_sizes, route.receive_sizes
        )
        table.add_gradient(route.asked_rows, asked_gradient)
        return None, gradient_TD.new_zeros(()), None
