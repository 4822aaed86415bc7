"""AdamW for rows of a sharded table: it touches the used rows only.

Shapes: N rows of the shard, U used rows, D width.
"""

import torch
from torch import Tensor

from recgpt.config import OptimizerSettings


class RowAdamW:
    """AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101) with a step count per row.

    A row that is used in every step is treated exactly as by ``torch.optim.AdamW``. A row that is not
    used in a step is left alone: no decay of its moments or its weights ("lazy" Adam).
    """

    def __init__(self, table_ND: Tensor, settings: OptimizerSettings):
        self.settings = settings
        self.table_ND = table_ND
        self.mean_ND = torch.zeros_like(table_ND)
        self.mean_square_ND = torch.zeros_like(table_ND)
        self.steps_N = torch.zeros(len(table_ND), dtype=torch.int64, device=table_ND.device)

    def reset(self, settings: OptimizerSettings) -> None:
        """Forget all moments and take new settings."""
        self.settings = settings
        for state in self.state().values():
            state.zero_()

    def state(self) -> dict[str, Tensor]:
        """The optimizer state, each tensor with one row per table row; the tensors themselves."""
        return {"mean": self.mean_ND, "mean_square": self.mean_square_ND, "steps": self.steps_N}

    @torch.no_grad()
    def step(self, learning_rate: float, rows_U: Tensor | None, gradient: Tensor) -> None:
        """Update ``rows_U`` (distinct, int64 [U]) by ``gradient`` [U, D]; all rows if ``rows_U`` is None."""
        if rows_U is None:
            self._update(
                learning_rate, self.table_ND, self.mean_ND, self.mean_square_ND, self.steps_N, gradient
            )
            return
        used = [state[rows_U] for state in (self.table_ND, self.mean_ND, self.mean_square_ND, self.steps_N)]
        self._update(learning_rate, *used, gradient)
        whole = (self.table_ND, self.mean_ND, self.mean_square_ND, self.steps_N)
        for state, updated in zip(whole, used, strict=True):
            state[rows_U] = updated

    def _update(
        self,
        learning_rate: float,
        weight: Tensor,
        mean: Tensor,
        mean_square: Tensor,
        steps: Tensor,
        gradient: Tensor,
    ) -> None:
        beta1, beta2 = self.settings.beta1, self.settings.beta2
        steps += 1
        weight.mul_(1 - learning_rate * self.settings.weight_decay)
        mean.lerp_(gradient, 1 - beta1)
        mean_square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        step_size = learning_rate / (1 - beta1 ** steps.to(weight.dtype))
        correction = (1 - beta2 ** steps.to(weight.dtype)).sqrt()
        denominator = (mean_square.sqrt() / correction[:, None]).add_(self.settings.epsilon)
        weight.sub_(mean / denominator * step_size[:, None])
