"""AdamW for a sharded table: each rank updates the rows that it owns, and only those that were used.

Shapes: N rows of the shard, U used rows, D width.
"""

import torch
from torch import Tensor

from recgpt.config import OptimizerSettings
from recgpt.distributed.sharded_item_table import ShardedItemTable


class RowAdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with a step count per row.

    A row that is used in every step is treated exactly as by ``torch.optim.AdamW``. A row that is not
    used in a step is left alone: no decay of its moments or its weights ("lazy" Adam).
    """

    def __init__(self, table: ShardedItemTable, settings: OptimizerSettings):
        self.settings = settings
        self.table = table
        self.mean_ND = torch.zeros_like(table.rows)
        self.mean_square_ND = torch.zeros_like(table.rows)
        self.steps_N = torch.zeros(len(table.rows), dtype=torch.int64, device=table.rows.device)

    def tensors(self) -> dict[str, Tensor]:
        """Rows and state, the tensors themselves; each has one entry per row of the shard."""
        moments = {"mean": self.mean_ND, "mean_square": self.mean_square_ND, "steps": self.steps_N}
        return {"rows": self.table.rows, **moments}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Take the table's gradient and update the used rows. Collective as far as the gradient is."""
        rows_U, gradient_UD = self.table.take_gradient()
        if rows_U is None:  # all rows were used
            self._update(learning_rate, self.tensors(), gradient_UD)
            return
        used = {name: tensor[rows_U] for name, tensor in self.tensors().items()}
        self._update(learning_rate, used, gradient_UD)
        for name, tensor in self.tensors().items():
            tensor[rows_U] = used[name]

    def _update(self, learning_rate: float, used: dict[str, Tensor], gradient_UD: Tensor) -> None:
        """Update the rows and their state in place."""
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        used["steps"] += 1
        used["rows"].mul_(1 - learning_rate * self.settings.weight_decay)
        used["mean"].lerp_(gradient_UD, 1 - beta1)
        used["mean_square"].mul_(beta2).addcmul_(gradient_UD, gradient_UD, value=1 - beta2)
        steps_U1 = used["steps"].to(gradient_UD.dtype)[:, None]
        step_size = learning_rate / (1 - beta1**steps_U1)
        denominator = used["mean_square"].sqrt() / (1 - beta2**steps_U1).sqrt() + self.settings.epsilon
        used["rows"].sub_(used["mean"] / denominator * step_size)
