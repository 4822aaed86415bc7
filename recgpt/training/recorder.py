"""What a run writes down of itself: metrics.jsonl, live progress, TensorBoard and other trackers."""

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, TypeVar

from recgpt.config import TrainSettings
from recgpt.distributed import collectives
from recgpt.settings_reading import to_dict
from recgpt.training import run_folder
from recgpt.training.runs import flat
from recgpt.training.step_figures import Interval, StepFigures
from recgpt.training.trackers import Tracker, open_trackers

if TYPE_CHECKING:
    from recgpt.training.checkpoint_writer import Written
    from recgpt.training.state import TrainingState

Report = Callable[[dict[str, Any]], None]
Step = TypeVar("Step")
LOG_EVERY_STEPS = 20
_log = logging.getLogger("recgpt.training")


class Recorder:
    """Collects figures on every rank and writes them on rank 0.

    Args:
        folder: the run's folder.
        report: called on rank 0 with each line of metrics.jsonl, for live progress.
        epoch_done: called on every rank after each validation.
    """

    def __init__(self, folder: str, report: Report, epoch_done: Report):
        self._folder = folder
        self._report = report
        self._epoch_done = epoch_done
        self._trackers: list[Tracker] = []
        self._lines: list[dict[str, Any]] = []
        self._interval: Interval
        self._last: StepFigures
        self.where = "the start"
        """In the training; for whoever looks for a rank that hangs."""

    def begin(self, settings: TrainSettings, num_items: int) -> None:
        """Say what is trained, before anything else is recorded.

        Raises ``UserError`` if a tracker that the settings name cannot be opened.
        """
        self._interval = Interval(settings, num_items)
        if collectives.rank() == 0:
            told = flat(to_dict(settings))
            self._trackers = open_trackers(self._folder, settings.trackers, told)

    def restart(self, step: int) -> None:
        """Forget what was written after ``step``."""
        _log.info("the training goes on after step %d of the run", step)
        self._tell(lambda tracker: tracker.restart(step))
        self._lines = run_folder.read_metrics(self._folder, step) if collectives.rank() == 0 else []
        self._interval.restart()

    def waiting_for(self, steps: Iterator[Step]) -> Iterator[Step]:
        """The same steps; the time until each is there counts as waiting for data."""
        while True:
            self.where = "reading the data of a step"
            begun = time.monotonic()
            step = next(steps, None)
            self._interval.waited += time.monotonic() - begun
            if step is None:
                return
            yield step

    def is_due(self, step: int) -> bool:
        """Whether a line is written after step number ``step`` of the run."""
        return step % LOG_EVERY_STEPS == 0

    def step(self, state: "TrainingState", figures: StepFigures) -> None:
        """Count a step; every ``LOG_EVERY_STEPS`` a line about those since the last one. Collective."""
        self._interval.add(figures)
        self._last = figures
        if self.is_due(state.step):
            self.end_interval(state)

    def end_interval(self, state: "TrainingState") -> None:
        """Write a line about the steps since the last one, if there are any. Collective."""
        if self._interval.is_empty:
            return
        line = self._interval.figures(self._last)
        self._interval.restart()
        self._write(state, {"kind": "train", "users": sum(state.consumed), **line})

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
        """Tell the user; it is kept in the rank's log alone."""
        _log.warning(text)
        if collectives.rank() == 0:
            self._report({"kind": "warning", "text": text})

    def validation(self, state: "TrainingState", metrics: dict[str, float]) -> None:
        self._write(state, {"kind": "validation", **metrics, "best": state.best_value})
        self._epoch_done({"stage": state.stage, "epoch": state.epoch, "step": state.step, **metrics})
        self._interval.restart()

    def flush(self) -> None:
        """Make what was recorded durable; called with every checkpoint."""
        if collectives.rank() == 0:
            run_folder.write_metrics(self._folder, self._lines)
        self._tell(lambda tracker: tracker.flush())

    def close(self, finished: bool) -> None:
        """The training has ended in this process; ``finished``: as it should."""
        self._tell(lambda tracker: tracker.close(finished))

    def _tell(self, what: Callable[[Tracker], None]) -> None:
        """Tell all trackers. One that fails is told no more: a training does not end for want of it."""
        for tracker in list(self._trackers):
            try:
                what(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                text = " ".join(str(error).split())[:200]
                self.warn(f"{type(tracker).__name__} is told no more: {type(error).__name__}: {text}")

    def _write(self, state: "TrainingState", figures: dict[str, Any]) -> None:
        _log.info("%s, epoch %d, step %d: %s", state.stage, state.epoch, state.step, figures)
        if collectives.rank() != 0:
            return
        line = {"stage": state.stage, "epoch": state.epoch, "step": state.step, **figures}
        self._lines.append(line)
        self._report(line)
        numbers = {
            f"{figures['kind']}/{name}": float(value)
            for name, value in figures.items()
            if isinstance(value, int | float)
        }
        self._tell(lambda tracker: tracker.record(numbers, state.step))
