"""The curves of a run: what its metrics.jsonl holds, step by step and epoch by epoch."""

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from recgpt.plots import Curve, Plot, count_axis, curve_plot, number_axis, share_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = Sequence[dict[str, Any]]
"""Of metrics.jsonl."""

STAGE_TITLES = {"pretrain": "pre-training", "prompt_tune": "prompt-tuning"}

_MOST_POINTS = 300  # of a curve: more could not be told apart
_NO_SERIES = {"step", "epoch", "users", "seconds"}
_METRIC = re.compile(r"(hit_rate|ndcg)@(\d+)")


class Series(NamedTuple):
    """A figure of the training steps."""

    title: str
    unit: str
    note: str = ""


MAIN_SERIES = {
    "loss": Series("Training loss", "nats per target", "Mean over the targets since the point before."),
    "learning_rate": Series("Learning rate", "learning rate"),
    "targets_per_second": Series("Speed", "targets per second", "All workers together."),
    "waiting_share": Series("Waiting for data", "share of the time", "Mean over the workers."),
}
"""By their names in metrics.jsonl; whatever else is there comes under its own name."""


def main_curves(lines: Lines) -> list[Plot]:
    """Loss, validation, and how fast the run was."""
    loss, *others = (_series_plot(lines, name, series) for name, series in MAIN_SERIES.items())
    return [
        loss,
        _validation_plot(lines, "ndcg", "NDCG on validation"),
        _validation_plot(lines, "hit_rate", "Hit rate on validation"),
        *others,
    ]


def further_curves(lines: Lines) -> list[Plot]:
    """All other numbers in the lines about training steps, by name."""
    names = {
        key
        for line in _of_kind(lines, "train")
        for key, value in line.items()
        if _is_number(value) and key not in _NO_SERIES | MAIN_SERIES.keys()
    }
    words = {name: name.replace("_", " ") for name in sorted(names)}
    return [_series_plot(lines, name, Series(text.capitalize(), text)) for name, text in words.items()]


def training_seconds(lines: Lines) -> float | None:
    """How long the steps took, without validation and start; None before the first line."""
    seconds = [line["seconds"] for line in _of_kind(lines, "train") if _is_number(line.get("seconds"))]
    return sum(seconds) if seconds else None


def _of_kind(lines: Lines, kind: str) -> list[dict[str, Any]]:
    return [line for line in lines if line.get("kind") == kind]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _stage_title(line: dict[str, Any]) -> str:
    stage = str(line.get("stage"))
    return STAGE_TITLES.get(stage, stage)


def _series_plot(lines: Lines, name: str, series: Series) -> Plot:
    """One curve for each stage, by step of the run."""
    points: dict[str, list[tuple[float, float]]] = {}
    for line in _of_kind(lines, "train"):
        if _is_number(line.get(name)):
            points.setdefault(_stage_title(line), []).append((line["step"], line[name]))
    if not points:
        return Plot(series.title, "Not shown: the run has not written it.", None)
    together = -(-max(map(len, points.values())) // _MOST_POINTS)
    curves = [
        Curve(stage, _means(np.array(values, np.float64), together)) for stage, values in points.items()
    ]
    note = f"{series.note} Means of {together} points each." if together > 1 else series.note

    def refine(axes: "Axes") -> None:
        count_axis(axes.xaxis)
        values = np.concatenate([curve.points[:, 1] for curve in curves])
        if name != "loss" and values.min() >= 0:
            axes.set_ylim(0, 1.1 * values.max() or 1.0)
        (share_axis if name.endswith("_share") else number_axis)(axes.yaxis)

    return curve_plot(series.title, note.strip(), curves, ("step", series.unit), refine)


def _means(points: npt.NDArray[np.float64], together: int) -> npt.NDArray[np.float64]:
    """Means of so many points each, [n / together, 2]; the last is of those that are left."""
    starts = np.arange(0, len(points), together)
    sizes = np.diff(np.append(starts, len(points)))
    return np.add.reduceat(points, starts) / sizes[:, None]


def _validation_plot(lines: Lines, metric: str, title: str) -> Plot:
    """A curve for each length of list, by epoch; epochs of a stage are counted on from those before it."""
    points: dict[int, list[tuple[float, float]]] = {}
    before, epoch = 0, 0  # epochs of the stages before, and of this one so far
    begun: dict[str, int] = {}
    for line in _of_kind(lines, "validation"):
        if (stage := _stage_title(line)) not in begun:
            begun[stage] = before = before + epoch
        epoch = line["epoch"]
        for key, value in line.items():
            if (match := _METRIC.fullmatch(key)) and match[1] == metric and _is_number(value):
                points.setdefault(int(match[2]), []).append((before + epoch, value))
    if not points:
        return Plot(title, "Not shown: the run has not been validated yet.", None)
    curves = [Curve(f"@{k}", np.array(values, np.float64)) for k, values in sorted(points.items())]
    later = list(begun)[1:]
    note = " ".join(["One step, over all items.", *(f"Right of the line: {stage}." for stage in later)])

    def refine(axes: "Axes") -> None:
        for stage in later:
            axes.axvline(begun[stage] + 0.5, color="#888888", linewidth=1)
        count_axis(axes.xaxis)
        number_axis(axes.yaxis)

    return curve_plot(title, note, curves, ("epoch", metric), refine)
