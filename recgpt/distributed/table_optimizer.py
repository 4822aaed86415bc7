"""Optimizers for a sharded table: each rank updates the rows that it owns, and only those that were used.

Shapes: N rows of the shard, U used rows, D width.

A step costs O(U), not O(N). For that, a row that is not used keeps its state ("lazy" Adam), and owes the
weight decay of the step until it is next read or updated: the log of the factor by which a row shrinks is
summed over steps, once for all rows, and each row remembers the sum that it has received.
"""

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from recgpt.config import OptimizerSettings
from recgpt.distributed.sharded_table import ShardedTable
from recgpt.model.losses import blocks

_ROWS_AT_A_TIME = 16_384  # of a step on all rows: so few that its temporaries stay in the cache

Update = Callable[[Tensor, dict[str, Tensor], Tensor, float, OptimizerSettings], None]
"""Changes rows [U, D] and their state in place, by a gradient [U, D] and a learning rate; no weight decay."""


def row_optimizer(kind: str, table: ShardedTable, settings: OptimizerSettings) -> "RowOptimizer":
    """The optimizer ``kind`` (adam, adagrad or sgd) for this rank's rows, which owe nothing yet."""
    num_rows, dtype, device = len(table.rows), table.compute_dtype, table.rows.device
    if kind == "adam":
        state = {
            "mean": torch.zeros(table.rows.shape, dtype=dtype, device=device),
            "mean_square": torch.zeros(table.rows.shape, dtype=dtype, device=device),
            "steps": torch.zeros(num_rows, dtype=torch.int64, device=device),
        }
        return RowOptimizer(table, settings, state, _adam)
    if kind == "adagrad":
        square_sum = torch.zeros(num_rows, dtype=dtype, device=device)
        return RowOptimizer(table, settings, {"square_sum": square_sum}, _adagrad)
    assert kind == "sgd", f"no table optimizer {kind}"
    return RowOptimizer(table, settings, {}, _sgd)


class RowOptimizer:
    """Applies an update rule and decoupled weight decay to the used rows of a table.

    ``state`` holds, by name, tensors with one entry per local row in dimension 0. It does not say what
    decay rows still owe: who saves rows takes them from ``table.rows_in_use()``, after which none owes
    any, and a new optimizer of the saved rows and state goes on exactly like this one.
    """

    def __init__(
        self, table: ShardedTable, settings: OptimizerSettings, state: dict[str, Tensor], update: Update
    ):
        self.table = table
        self.settings = settings
        self.state = state
        self._update = update
        self._log_decay = 0.0  # the sum, over the steps so far, of the log of the factor of decay
        if settings.weight_decay:
            self._received_N = torch.zeros(len(table.rows), dtype=torch.float64, device=table.rows.device)
        table.bring_up_to_date = self.bring_up_to_date

    def step(self, row_U: Tensor | None, gradient_UD: Tensor, learning_rate: float) -> None:
        """Update local rows ``row_U`` (int64 [U], distinct), or all if None; no other row changes.

        ``gradient_UD`` is in the table's ``compute_dtype``.
        """
        decay = learning_rate * self.settings.weight_decay
        if row_U is None:
            self._step_all(gradient_UD, learning_rate, decay)
            return
        value_UD = self.table.read(row_U).to(self.table.compute_dtype)
        used = {name: tensor.index_select(0, row_U) for name, tensor in self.state.items()}
        value_UD.mul_(1 - decay)
        self._update(value_UD, used, gradient_UD, learning_rate, self.settings)
        for name, tensor in self.state.items():
            tensor.index_copy_(0, row_U, used[name])
        self.table.write(row_U, _stored(value_UD, self.table.rows.dtype))
        if decay:
            self._log_decay += math.log1p(-decay)
            self._received_N.index_fill_(0, row_U, self._log_decay)

    def _step_all(self, gradient_ND: Tensor, learning_rate: float, decay: float) -> None:
        for piece, value_UD in self._pieces(self.table.rows_in_use()):
            used = {name: tensor[piece] for name, tensor in self.state.items()}
            value_UD.mul_(1 - decay)
            self._update(value_UD, used, gradient_ND[piece], learning_rate, self.settings)

    def bring_up_to_date(self, row_U: Tensor | None) -> None:
        """Give local rows ``row_U`` (int64 [U], repeats allowed), or all if None, the decay that they owe."""
        if self._log_decay == 0.0:
            return
        if row_U is None:
            for piece, value_UD in self._pieces(self.table.rows):
                value_UD.mul_(self._owed_factor(self._received_N[piece]))
            # From 0 again, like the optimizer of a run that is resumed from these rows: equal to the bit.
            self._log_decay = 0.0
            self._received_N.zero_()
            return
        behind_U = row_U[self._received_N.index_select(0, row_U) != self._log_decay].unique()
        value_UD = self.table.rows.index_select(0, behind_U).to(self.table.compute_dtype)
        value_UD.mul_(self._owed_factor(self._received_N.index_select(0, behind_U)))
        self.table.write(behind_U, _stored(value_UD, self.table.rows.dtype))
        self._received_N.index_fill_(0, behind_U, self._log_decay)

    def _owed_factor(self, received_U: Tensor) -> Tensor:
        """What rows are still to be multiplied by, ``compute_dtype`` [U, 1]."""
        return (self._log_decay - received_U).exp().to(self.table.compute_dtype)[:, None]

    def _pieces(self, row_ND: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """All rows in ``compute_dtype``, some at a time; what is changed in place is stored."""
        for first, end in blocks(0, len(row_ND), _ROWS_AT_A_TIME):
            stored_UD = row_ND[first:end]
            value_UD = stored_UD.to(self.table.compute_dtype)  # the stored rows themselves, if they are of it
            yield slice(first, end), value_UD
            if value_UD is not stored_UD:
                stored_UD.copy_(_stored(value_UD, stored_UD.dtype))


def _adam(
    row_UD: Tensor, state: dict[str, Tensor], gradient_UD: Tensor, rate: float, settings: OptimizerSettings
) -> None:
    """Adam with a step count per row.

    With the decay before it AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101): a row that is used in
    every step is treated as by ``torch.optim.AdamW``.
    """
    beta1, beta2 = settings.beta1, settings.beta2
    state["steps"] += 1
    state["mean"].lerp_(gradient_UD, 1 - beta1)
    state["mean_square"].mul_(beta2).addcmul_(gradient_UD, gradient_UD, value=1 - beta2)
    steps_U1 = state["steps"].to(gradient_UD.dtype)[:, None]
    step_size_U1 = rate / (1 - beta1**steps_U1)
    root_UD = state["mean_square"].sqrt().div_((1 - beta2**steps_U1).sqrt())
    row_UD.sub_((state["mean"] / root_UD.add_(settings.epsilon)).mul_(step_size_U1))


def _adagrad(
    row_UD: Tensor, state: dict[str, Tensor], gradient_UD: Tensor, rate: float, settings: OptimizerSettings
) -> None:
    """Row-wise Adagrad: the mean of the squared gradient over the width, summed over steps.

    The formula of FBGEMM's EXACT_ROWWISE_ADAGRAD, which TorchRec trains embedding tables with.
    """
    state["square_sum"] += gradient_UD.square().mean(1)
    scale_U = rate / (state["square_sum"].sqrt() + settings.epsilon)
    row_UD.addcmul_(gradient_UD, scale_U[:, None], value=-1)


def _sgd(
    row_UD: Tensor, state: dict[str, Tensor], gradient_UD: Tensor, rate: float, settings: OptimizerSettings
) -> None:
    """Stochastic gradient descent without momentum."""
    row_UD.sub_(gradient_UD, alpha=rate)


def _stored(value_UD: Tensor, dtype: torch.dtype) -> Tensor:
    """Values as the table keeps them; in bfloat16 rounded up or down at random, right on average.

    Neighbours in bfloat16 are 2^-8 to 2^-7 of a weight apart, while a late step changes it by less than
    half of that: rounded to the nearest, every such step would be undone. Rounded to the neighbour above
    with a probability of the share of the gap that the value has come, it is right in expectation, and
    many small steps add up. Drawn by the default generator.
    """
    if dtype == value_UD.dtype:
        return value_UD
    assert (value_UD.dtype, dtype) == (torch.float32, torch.bfloat16)
    # bfloat16 is the upper half of float32. A random lower half carries into it with that probability.
    bits = value_UD.view(torch.int32)
    rounded = (bits + torch.randint_like(bits, 1 << 16)).bitwise_and_(-(1 << 16)).view(torch.float32)
    # The carry could turn a NaN into a number and so hide it.
    return torch.where(value_UD.isfinite(), rounded, value_UD).to(dtype)
