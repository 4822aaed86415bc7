"""What training steps cost and how they go: summed on each rank over some steps, then over the ranks."""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recgpt.config import TrainSettings
from recgpt.distributed import collectives
from recgpt.machines import matrix_flops_of
from recgpt.model.flops import scored_items, training_flops
from recgpt.peak_memory import peak_memory
from recgpt.training.model import TrainingBatch


@dataclass
class StepFigures:
    """One step, as one rank sees it."""

    loss_sum: Tensor
    """Over the targets of this rank."""
    batches: Sequence[TrainingBatch]
    """What this rank has computed."""
    num_targets: int
    """Of all ranks."""
    num_users: int
    """Of all ranks."""
    learning_rate: float
    table_learning_rate: float | None
    """None: no table is outside the engine."""
    gradient_norm: Tensor | float
    """Of what the engine trains, over all ranks, before it is clipped."""
    table_gradient_norm: float | None
    """Of the sharded tables, likewise; None if there are none, or at a step of which no line is written."""


class Interval:
    """Steps between two lines of metrics, on one rank."""

    def __init__(self, settings: TrainSettings, num_items: int):
        self._settings = settings
        self._num_items = num_items
        self.restart()

    def restart(self) -> None:
        """Forget all steps; time counts from now on."""
        self._steps = 0
        self._targets = self._users = self._scored = 0.0
        self._loss = self._pairs = torch.zeros(())
        self._tokens = 0
        self._since = time.monotonic()
        self.waited = 0.0
        """Seconds of waiting for data."""
        self._communicated_before = sum(collectives.seconds.values())
        self._bytes_before = sum(collectives.traffic.values())

    @property
    def is_empty(self) -> bool:
        """Whether no step was counted."""
        return self._steps == 0

    def add(self, step: StepFigures) -> None:
        """Count a step. Waits for no device."""
        self._steps += 1
        self._targets += step.num_targets
        self._users += step.num_users
        self._scored += step.num_targets * scored_items(
            self._settings.loss, self._num_items, step.num_targets
        )
        # Where the loss is: the step need not wait for it.
        self._loss = self._loss.to(step.loss_sum.device, torch.float64) + step.loss_sum
        for batch in step.batches:
            self._tokens += len(batch.item_index_T)
            lengths = batch.offsets.diff()
            self._pairs = self._pairs.to(lengths.device) + (lengths * (lengths + 1) / 2).sum()

    def figures(self, last: StepFigures) -> dict[str, float]:
        """Of all ranks; ``last`` is the newest step. Collective."""
        seconds = time.monotonic() - self._since
        ranks = collectives.world_size()
        communicated = sum(collectives.seconds.values()) - self._communicated_before
        moved = sum(collectives.traffic.values()) - self._bytes_before
        mine = [float(self._loss), self._tokens, float(self._pairs), self.waited, communicated, moved]
        # On the loss's device: NCCL reduces nothing else.
        sums = torch.tensor([*mine, _share_of_distinct_items(last.batches)], dtype=torch.float64)
        sums = collectives.sum_over_ranks(sums.to(last.loss_sum.device))
        loss, tokens, pairs, waited, communicated, moved, distinct = sums.tolist()
        memory = torch.tensor(most_memory_held(last.loss_sum.device), device=last.loss_sum.device)
        per_target = self._scored / self._targets
        flops = training_flops(self._settings.model, tokens, pairs, self._targets, per_target) / seconds
        figures = {
            "loss": loss / self._targets,
            "seconds": seconds,
            "learning_rate": last.learning_rate,
            "gradient_norm": float(last.gradient_norm),
            "targets_per_second": self._targets / seconds,
            "tokens_per_second": tokens / seconds,
            "sequences_per_second": self._users / seconds,
            "waiting_share": waited / ranks / seconds,
            "communication_share": communicated / ranks / seconds,
            "bytes_per_step": moved / ranks / self._steps,
            "distinct_item_share": distinct / ranks,
            "memory_bytes": float(collectives.max_over_ranks(memory)),
            "flops_per_second": flops,
        }
        if last.table_learning_rate is not None and last.table_gradient_norm is not None:
            figures["table_learning_rate"] = last.table_learning_rate
            figures["table_gradient_norm"] = last.table_gradient_norm
        if last.loss_sum.is_cuda and (most := matrix_flops_of(torch.cuda.get_device_name())):
            figures["model_flops_utilization"] = flops / (most * ranks)
        return figures


def _share_of_distinct_items(batches: Sequence[TrainingBatch]) -> float:
    """Distinct items by tokens: what a sharded table sends rows for. 1 where a rank has no token."""
    items = torch.cat([batch.item_index_T for batch in batches])
    return len(items.unique()) / len(items) if len(items) else 1.0


def most_memory_held(device: torch.device) -> int:
    """The most that this process has held so far: on its GPU, or as resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return peak_memory()
