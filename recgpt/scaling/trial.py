"""Some steps of a real training, without Ray: what they take on each rank.

Runs in a rank of ``recgpt.scaling.ranks.run_ranks``.
"""

import tempfile
import time
from typing import Any

from recgpt.config import TrainSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.data.plan import ReadUnit, read_unit
from recgpt.distributed import collectives
from recgpt.scaling.ranks import peak_memory
from recgpt.settings_reading import from_dict
from recgpt.training.recorder import Recorder
from recgpt.training.state import TrainingState
from recgpt.training.step_figures import StepFigures
from recgpt.training.trainer import train


class _Enough(Exception):
    pass


class _Steps(Recorder):
    """Times each step from the end of the one before, and breaks off after enough of them."""

    def __init__(self, folder: str, warm_up: int, steps: int):
        super().__init__(folder, lambda line: None, lambda metrics: None)
        self._warm_up, self._steps = warm_up, steps
        self._taken = 0
        self._last = 0.0
        self.seconds: list[float] = []
        self.waited: list[float] = []
        self.tokens = 0
        self.seconds_before: dict[str, float] = {}
        self.bytes_before: dict[str, int] = {}

    def is_due(self, step: int) -> bool:
        return False  # no lines: what they take does not belong to a step

    def step(self, state: TrainingState, figures: StepFigures) -> None:
        super().step(state, figures)
        now = time.perf_counter()
        self._taken += 1
        if self._taken > self._warm_up:
            self.seconds.append(now - self._last)
            self.waited.append(self._interval.waited)
            self.tokens += sum(len(batch.item_index_T) for batch in figures.batches)
        else:
            self.seconds_before, self.bytes_before = dict(collectives.seconds), dict(collectives.traffic)
        self._interval.restart()
        self._last = now
        if len(self.seconds) == self._steps:
            raise _Enough


def trial(dataset: str, settings: dict[str, Any], warm_up: int, steps: int) -> dict[str, Any]:
    """Seconds of each step after the warm-up, and what this rank did in them.

    Returns ``seconds`` and ``waited`` (for data) of each step; ``communicated`` seconds and ``bytes`` by kind
    of collective, ``tokens``, all of them over all steps; ``memory_bytes``, the most so far;
    ``base_memory_bytes``, before there was a model.
    Raises ``AssertionError`` if the dataset has not enough steps.
    """
    histories = HistoryDataset.open(dataset)
    train_settings = from_dict(TrainSettings, settings, "trial")
    base = peak_memory()

    def read_units(units: list[ReadUnit]) -> Any:
        return (read_unit(histories, unit, train_settings.data.split, None) for unit in units)

    with tempfile.TemporaryDirectory() as folder:
        recorder = _Steps(folder, warm_up, steps)
        try:
            train(train_settings, histories, folder, read_units, recorder)
        except _Enough:
            return {
                "seconds": recorder.seconds,
                "waited": recorder.waited,
                "communicated": {
                    kind: value - recorder.seconds_before.get(kind, 0.0)
                    for kind, value in collectives.seconds.items()
                },
                "bytes": {
                    kind: value - recorder.bytes_before.get(kind, 0)
                    for kind, value in collectives.traffic.items()
                },
                "tokens": recorder.tokens,
                "memory_bytes": peak_memory(),
                "base_memory_bytes": base,
            }
    raise AssertionError(f"{dataset}: too few steps in all epochs to measure {warm_up} + {steps}")
