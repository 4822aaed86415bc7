"""How far the model of costs is from what was measured: constants fitted to some points, error on others."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from recgpt.config import TrainSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.errors import UserError
from recgpt.model.flops import scored_items, training_flops
from recgpt.scaling.costs import exchanged_bytes, exchanges, moved_bytes
from recgpt.scaling.fitting import FloatArray, fit_not_negative
from recgpt.scaling.results import Row, read_results
from recgpt.scaling.workload import measure_workload
from recgpt.settings_reading import from_dict
from recgpt.training.engine import read_deepspeed_config, zero_stage

HELD_OUT_EVERY = 3
"""Of the points in their order, the second of every three is held out."""
_UNKNOWNS = 5  # constants that are fitted, see `features`


@dataclass(frozen=True)
class Comparison:
    """A point of a sweep."""

    sweep: str
    point: str
    held_out: bool
    seconds: float
    """Of a step, measured: the median over the repeats."""
    predicted: float

    @property
    def error(self) -> float:
        """By how much the prediction is off, relative to what was measured."""
        return self.predicted / self.seconds - 1


def compare_model(sweeps: Sequence[str], cpus: int) -> list[Comparison]:
    """Fit the constants of the model of costs to the points that are not held out, and predict all points.

    Args:
        sweeps: folders of `recgpt scale`, measured on one machine.
        cpus: of that machine; ranks that are more share them.

    Raises ``UserError`` if too few points were measured.
    """
    points = [(sweep, *point) for sweep in sweeps for point in _measured_points(sweep)]
    held_out = np.arange(len(points)) % HELD_OUT_EVERY == 1
    if len(points) - held_out.sum() < _UNKNOWNS + 1:
        raise UserError(
            f"{', '.join(sweeps)}: {len(points)} points are too few to fit {_UNKNOWNS} constants and to hold "
            "some out; give more sweeps"
        )
    seconds = np.array([seconds for *_, seconds in points])
    features_NF = np.array([features(row, cpus) for _, _, row, _ in points])
    predicted = features_NF @ fit_not_negative(features_NF[~held_out], seconds[~held_out])
    return [
        Comparison(sweep, label, bool(out), measured, float(guess))
        for (sweep, label, _, measured), out, guess in zip(points, held_out, predicted, strict=True)
    ]


def median_error(compared: Sequence[Comparison], held_out: bool) -> float:
    """Median of the relative errors' absolute values."""
    return statistics.median(abs(one.error) for one in compared if one.held_out == held_out)


def features(row: Row, cpus: int) -> FloatArray:
    """What the time of a step is a sum of, each times a constant of the machine; float64 [5].

    Operations of a rank; bytes that it moves; bytes that it hands over and do not stay with it; collectives
    times the binary digits of the number of ranks; 1. With more ranks than CPUs the ranks take turns.
    """
    settings = from_dict(TrainSettings, json.loads(row["settings"]), row["point"])
    work = measure_workload(HistoryDataset.open(row["dataset"]), settings)
    stage = zero_stage(read_deepspeed_config(settings.deepspeed))
    ranks, load = settings.workers, work.load
    turns = max(1.0, ranks * settings.threads_per_worker / cpus)
    scored = scored_items(settings.loss, work.num_items, load.tokens)
    flops = training_flops(settings.model, load.tokens, load.attended_pairs, load.tokens, scored)
    leaves = sum(exchanged_bytes(settings, work, stage)) * (ranks - 1) / ranks
    calls = sum(exchanges(settings, work, stage)) * (ranks.bit_length() if ranks > 1 else 0)
    moved = moved_bytes(settings, work)
    return np.array([turns * flops / ranks, turns * moved, leaves, turns * calls, turns])


def _measured_points(sweep: str) -> list[tuple[str, Row, float]]:
    """Label, a row, and the median time of a step, of each point that was measured."""
    by_label: dict[str, list[Row]] = {}
    for row in read_results(sweep):
        if row["reason"] is None:
            by_label.setdefault(row["point"], []).append(row)
    return [
        (label, rows[0], statistics.median(row["step_seconds"] for row in rows))
        for label, rows in by_label.items()
    ]
