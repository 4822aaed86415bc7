"""What a run writes down of itself: metrics.jsonl, TensorBoard events, live progress."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from tensorboardX import SummaryWriter

from recgpt import storage
from recgpt.distributed import collectives
from recgpt.training import run_folder

if TYPE_CHECKING:
    from recgpt.training.checkpoint_writer import Written
    from recgpt.training.state import TrainingState

Report = Callable[[dict[str, Any]], None]
Step = TypeVar("Step")
LOG_EVERY_STEPS = 20


class Recorder:
    """Collects figures on every rank and writes them on rank 0 (TensorBoard events to local folders only).

    Args:
        folder: the run's folder.
        report: called on rank 0 with each line of metrics.jsonl, for live progress.
        epoch_done: called on every rank after each validation.
    """

    def __init__(self, folder: str, report: Report, epoch_done: Report):
        self._folder = folder
        self._report = report
        self._epoch_done = epoch_done
        self._lines: list[dict[str, Any]] = []
        self._sums = torch.zeros(3, dtype=torch.float64)  # loss, targets, seconds of waiting
        self._waited = 0.0
        self._since = time.monotonic()
        self._events: SummaryWriter | None = None
        self.where = "the start"
        """In the training; for whoever looks for a rank that hangs."""

    def restart(self, step: int) -> None:
        """Forget what was written after ``step``."""
        if self._events:
            self._events.close()
        if collectives.rank() == 0 and storage.is_local(self._folder):
            self._events = SummaryWriter(storage.join(self._folder, "tensorboard"), purge_step=step + 1)
        self._lines = run_folder.read_metrics(self._folder, step) if collectives.rank() == 0 else []
        self._restart_interval()

    def waiting_for(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The same steps; the time until each is there counts as waiting for data."""
        while True:
            self.where = "reading the data of a step"
            begun = time.monotonic()
            step = next(steps, None)
            self._waited += time.monotonic() - begun
            if step is None:
                return
            yield step

    def step(self, state: "TrainingState", loss_sum: torch.Tensor, num_targets: int, rate: float) -> None:
        """Count a step; every ``LOG_EVERY_STEPS`` a line with the mean loss per target since the last one."""
        # Where the loss is: the step need not wait for it, and NCCL reduces nothing else.
        self._sums = self._sums.to(loss_sum.device)
        self._sums[0] += loss_sum
        self._sums[1] += num_targets / collectives.world_size()
        if state.step % LOG_EVERY_STEPS:
            return
        self._sums[2] = self._waited / collectives.world_size()
        loss, targets, waited = collectives.sum_over_ranks(self._sums.clone()).tolist()
        seconds = time.monotonic() - self._since
        self._restart_interval()
        self._write(
            state,
            {
                "kind": "train",
                "users": sum(state.consumed),
                "loss": loss / targets,
                "learning_rate": rate,
                "targets_per_second": targets / seconds,
                "waiting_share": waited / seconds,
            },
        )

    def left_out(self, state: "TrainingState", lanes: dict[int, tuple[int, int]]) -> None:
        """Note a step that was left out because its loss or gradient was not finite.

        Args:
            lanes: the batch: by lane, the first user in the epoch's order and how many.
        """
        self._write(state, {"kind": "left out", "lanes": lanes})

    def checkpoint(self, state: "TrainingState", written: "Written") -> None:
        """Note what an earlier checkpoint has cost, once it is written."""
        self._write(state, {"kind": "checkpoint", **asdict(written)})

    def warn(self, text: str) -> None:
        """Tell the user; nothing of it is kept."""
        if collectives.rank() == 0:
            self._report({"kind": "warning", "text": text})

    def validation(self, state: "TrainingState", metrics: dict[str, float]) -> None:
        self._write(state, {"kind": "validation", **metrics, "best": state.best_value})
        self._epoch_done({"stage": state.stage, "epoch": state.epoch, "step": state.step, **metrics})
        self._restart_interval()

    def flush(self) -> None:
        """Make what was recorded durable; called with every checkpoint."""
        if collectives.rank() == 0:
            run_folder.write_metrics(self._folder, self._lines)
        if self._events:
            self._events.flush()

    def _restart_interval(self) -> None:
        self._sums.zero_()
        self._waited = 0.0
        self._since = time.monotonic()

    def _write(self, state: "TrainingState", figures: dict[str, Any]) -> None:
        if collectives.rank() != 0:
            return
        line = {"stage": state.stage, "epoch": state.epoch, "step": state.step, **figures}
        self._lines.append(line)
        self._report(line)
        for name, value in figures.items():
            if self._events and isinstance(value, float):
                self._events.add_scalar(f"{figures['kind']}/{name}", value, state.step)
