"""What a sweep leaves in its folder: a file for each point and repeat, and the rows of results.parquet."""

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from recgpt import storage
from recgpt.errors import UserError
from recgpt.scaling.experiment import WORKERS, Point, swept_keys
from recgpt.scaling.parts import PARTS
from recgpt.settings_reading import from_dict, to_dict

EXPERIMENT_FILE = "experiment.json"  # written first: shows that the folder is a sweep's
RESULTS_FILE = "results.parquet"
TABLE_FILE = "table.md"
REPORT_FILE = "report.html"
POINTS_FOLDER = "points"

FIGURES = {
    "step_seconds": "time of a step: of its slowest rank; the median over the steps",
    "step_seconds_quarter": "the same, which a quarter of the steps stays below",
    "step_seconds_three_quarters": "the same, which three quarters stay below",
    **{f"{part}_seconds": f"of it, {text}" for part, text in PARTS.items()},
    "tokens_per_step": "inputs of the GPT, all ranks; the mean over the steps",
    "tokens_per_second": "tokens_per_step by step_seconds",
    "flops_per_second": "operations that the model needs, all ranks, by the time",
    "matrix_rate_share": "the same by what as many processes reach in matrix products, each alone",
    "sent_bytes_per_step": "handed over to collectives by a rank, without what stays there (one part in as "
    "many as there are ranks); the mean over ranks and steps",
    "memory_bytes": "most that a rank has held: resident, or on its GPU; of the largest rank",
    "base_memory_bytes": "most resident before there was a model; of the largest rank",
    "checkpoint_seconds": "from the stop of the training until a checkpoint is whole; of the slowest rank",
    "checkpoint_pause_seconds": "of it, how long the training stood still",
    "checkpoint_bytes": "of all files of a checkpoint",
    "recall_users_per_second": "candidate lists, of one process",
}
"""Columns of results.parquet with what was measured. The parts sum to step_seconds: their shares are those of
the time of all steps and ranks."""

Figures = dict[str, float | None]
Row = dict[str, Any]
"""Of results.parquet."""


@dataclass(frozen=True)
class Outcome:
    """What came of a point and repeat."""

    reason: str | None
    """Why it failed, in one line; None: it was measured."""
    figures: Figures
    """By the names in ``FIGURES``; empty if it failed."""


def figures_of(ranks: Sequence[Mapping[str, Any]], matrix_flops: float | None) -> Figures:
    """The figures of a point from what ``recgpt.scaling.trial.trial`` returned on each of its ranks.

    ``matrix_flops``: operations per second of matrix products of one rank; None if that is not known.
    """
    slowest = list(map(max, zip(*(rank["seconds"] for rank in ranks), strict=True)))
    steps, step = len(slowest), statistics.median(slowest)
    everything = sum(map(sum, (rank["seconds"] for rank in ranks)))
    parts = {part: sum(sum(rank["parts"][part]) for rank in ranks) / everything for part in PARTS}
    handed = sum(sum(rank["bytes"].values()) for rank in ranks) / len(ranks) / steps
    tokens = sum(rank["tokens"] for rank in ranks) / steps
    flops = sum(rank["flops"] for rank in ranks) / steps / step
    quarter, three_quarters = np.percentile(slowest, [25, 75]).tolist()
    checkpoints = [rank["checkpoint"] for rank in ranks if "checkpoint" in rank]
    return {
        "step_seconds": step,
        "step_seconds_quarter": quarter,
        "step_seconds_three_quarters": three_quarters,
        **{f"{part}_seconds": share * step for part, share in parts.items()},
        "tokens_per_step": tokens,
        "tokens_per_second": tokens / step,
        "flops_per_second": flops,
        "matrix_rate_share": matrix_flops and flops / (matrix_flops * len(ranks)),
        "sent_bytes_per_step": handed * (len(ranks) - 1) / len(ranks),
        "memory_bytes": max(rank["memory_bytes"] for rank in ranks),
        "base_memory_bytes": max(rank["base_memory_bytes"] for rank in ranks),
        "checkpoint_seconds": max((written["seconds"] for written in checkpoints), default=None),
        "checkpoint_pause_seconds": max((written["pause_seconds"] for written in checkpoints), default=None),
        "checkpoint_bytes": max((written["bytes"] for written in checkpoints), default=None),
        "recall_users_per_second": ranks[0].get("recall_users_per_second"),
    }


def claim(output: str, experiment: Any) -> None:
    """Make the folder a sweep's. Raises ``UserError`` if it holds something else."""
    file = storage.join(output, EXPERIMENT_FILE)
    if not storage.exists(file) and not storage.is_empty(output):
        raise UserError(f"{output}: holds something that is not a sweep's; give another --output")
    storage.write_json(file, to_dict(experiment))


def outcome_file(output: str, identity: str, repeat: int) -> str:
    return storage.join(output, POINTS_FOLDER, f"{identity}-{repeat}.json")


def write_outcome(file: str, point: Point, repeat: int, outcome: Outcome) -> None:
    storage.write_json(file, {"point": point.label, "repeat": repeat, **asdict(outcome)})


def read_outcome(file: str) -> Outcome | None:
    """None if there is none yet. Raises ``UserError`` for a damaged file."""
    if not storage.exists(file):
        return None
    told = storage.read_json_object(file)
    return from_dict(Outcome, {name: told.get(name) for name in ("reason", "figures")}, file)


def row_of(point: Point, keys: Sequence[str], dataset: str, repeat: int, outcome: Outcome) -> Row:
    """A row of results.parquet.

    ``keys``: those that the points of the sweep name. ``settings`` and ``dataset`` say all of the point.
    """
    return {
        "point": point.label,
        "repeat": repeat,
        "reason": outcome.reason,
        **{key: point.value(key) for key in dict.fromkeys([WORKERS, *keys])},
        **{name: outcome.figures.get(name) for name in FIGURES},
        "dataset": dataset,
        "settings": json.dumps(to_dict(point.settings)),
    }


def write_results(output: str, rows: Sequence[Row]) -> None:
    """Write results.parquet: a row for each point and repeat, also for those that failed."""
    columns = {name: _column(name, [row[name] for row in rows]) for name in rows[0]}
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    storage.write_bytes(storage.join(output, RESULTS_FILE), sink.getvalue().to_pybytes())


def _column(name: str, values: list[Any]) -> pa.Array:
    if name in FIGURES:
        return pa.array(values, pa.float64())
    if name == "reason":
        return pa.array(values, pa.string())
    kinds = {type(value) for value in values if value is not None}
    if len(kinds) == 1 and kinds <= {bool, int, float, str}:
        return pa.array(values)
    return pa.array([None if value is None else json.dumps(value) for value in values], pa.string())


def read_results(output: str) -> list[Row]:
    """The rows of a sweep. Raises ``UserError`` if there are none, or if the file is damaged."""
    file = storage.join(storage.absolute(output), RESULTS_FILE)
    if not storage.is_file(file):
        raise UserError(f"{output}: no {RESULTS_FILE} here; give a folder that `recgpt scale` has written")
    try:
        table = pq.read_table(pa.BufferReader(storage.read_bytes(file)))
    except pa.ArrowException:
        raise UserError(f"{file}: cannot be read as Parquet; the file is damaged") from None
    if missing := {"point", "repeat", "reason", *FIGURES} - set(table.column_names):
        raise UserError(f"{file}: has no column {min(missing)}; it is of another release or damaged")
    return table.to_pylist()


@dataclass(frozen=True)
class Summary:
    """A point over its repeats."""

    label: str
    values: dict[str, Any]
    """Of the keys in which the points differ."""
    figures: Figures
    """Medians over the repeats that were measured; empty if none was."""
    least_step_seconds: float | None
    """Of the repeats."""
    most_step_seconds: float | None
    measured: int
    """Repeats."""
    reasons: list[str]
    """Of those that failed, each once."""


def summarize(rows: Sequence[Row], keys: Sequence[str] = ()) -> list[Summary]:
    """The points in their order, over their repeats."""
    by_point: dict[str, list[Row]] = {}
    for row in rows:
        by_point.setdefault(row["point"], []).append(row)
    return [_summary(label, repeats, keys) for label, repeats in by_point.items()]


def _summary(label: str, repeats: Sequence[Row], keys: Sequence[str]) -> Summary:
    measured = [row for row in repeats if row["reason"] is None]
    figures: Figures = {}
    for name in FIGURES if measured else ():
        values = [row[name] for row in measured if row[name] is not None]
        figures[name] = statistics.median(values) if values else None
    steps = [row["step_seconds"] for row in measured]
    return Summary(
        label,
        {key: repeats[0][key] for key in keys},
        figures,
        min(steps, default=None),
        max(steps, default=None),
        len(measured),
        list(dict.fromkeys(row["reason"] for row in repeats if row["reason"] is not None)),
    )


def efficiencies(summaries: Sequence[Summary]) -> dict[str, float]:
    """Tokens per second and worker, by those of the fewest workers that are alike otherwise; by label.

    So read, 1 is ideal for weak scaling (work grows with the workers) and for strong scaling (it stays).
    Empty if the number of workers is the same everywhere.
    """
    measured = [summary for summary in summaries if summary.measured and WORKERS in summary.values]
    if len({summary.values[WORKERS] for summary in measured}) < 2:
        return {}
    per_worker = {
        summary.label: (summary.figures["tokens_per_second"] or 0) / summary.values[WORKERS]
        for summary in measured
    }
    first: dict[str, Summary] = {}
    for summary in sorted(measured, key=lambda summary: summary.values[WORKERS]):
        first.setdefault(_others(summary), summary)
    return {
        summary.label: per_worker[summary.label] / per_worker[first[_others(summary)].label]
        for summary in measured
    }


def _others(summary: Summary) -> str:
    """What a point is but for its workers."""
    return json.dumps({key: value for key, value in summary.values.items() if key != WORKERS})


def all_rows(
    points: Sequence[Point], datasets: Sequence[str], outcomes: Mapping[tuple[int, int], Outcome]
) -> tuple[list[str], list[Row]]:
    """The keys in which points differ, and a row for each outcome, by (number of the point, repeat)."""
    keys = swept_keys(list(points))
    return keys, [
        row_of(points[number], keys, datasets[number], repeat, outcome)
        for (number, repeat), outcome in sorted(outcomes.items())
    ]
