"""How fast both training stages are, and what it costs to generate items with a pass for every position.

    python -m benchmarks.training_speed --json training_speed.json

One worker with one thread, without Ray. Lengths of histories are Beauty's, or those of a made-up log where
that file is not.
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import machine, print_table, write_json
from benchmarks.full_cross_entropy import BEAUTY
from benchmarks.input_stream import write_log_like_beauty
from benchmarks.stage_ranks import PLAIN
from recgpt.config import STAGES
from recgpt.scaling.made_up_histories import NUM_ITEMS, training_lengths, write_dataset
from recgpt.scaling.ranks import run_ranks

GOAL = 2.5  # times a pre-training epoch, at most, for an epoch of prompt-tuning


@dataclass(frozen=True)
class Size:
    """How much is measured; the test measures less."""

    widths: tuple[int, ...] = (64, 128)
    num_users: int = 22_363
    num_items: int = NUM_ITEMS
    tokens: int = 2048
    """Of a batch."""
    epochs: int = 3
    """Of each stage; the first is a warm-up."""
    batches: int = 20
    """That are taken in every way."""


Result = list[dict[str, Any]]


def measure(log: Path, size: Size) -> dict[str, Result]:
    """``stages``: medians over the epochs of each stage; ``ways``: medians over batches, by way of a step."""
    stages: Result = []
    ways: Result = []
    with tempfile.TemporaryDirectory() as folder:
        lengths = training_lengths(log)
        dataset = write_dataset(Path(folder), size.num_users, lengths, num_items=size.num_items)
        for width in size.widths:
            call: dict[str, Any] = {"dataset": dataset.url, "settings": _settings(width, size)}
            (epochs,) = run_ranks("benchmarks.stage_ranks:epochs", world_size=1, **call)
            stages += [{"width": width, **row} for row in summarize_epochs(epochs)]
            call["batches"] = size.batches
            (batches,) = run_ranks("benchmarks.stage_ranks:steps_in_turns", world_size=1, **call)
            ways += [{"width": width, **row} for row in summarize_batches(batches)]
    return {"stages": stages, "ways": ways}


def _settings(width: int, size: Size) -> dict[str, Any]:
    stage = {"max_epochs": size.epochs, "patience": size.epochs}
    return {
        "model": {"width": width, "members": 1},
        "data": {"tokens_per_batch": size.tokens},
        "pretrain": stage,
        "prompt_tune": stage,
        "validation": {"max_users": 1000},
        # Not beside the steps of the next epoch, whose CPU seconds are measured.
        "checkpoint_in_background": False,
    }


def summarize_epochs(epochs: Result) -> Result:
    """Rates of each stage, and how many times a pre-training epoch one of its epochs takes."""
    rows: Result = []
    for stage in STAGES:
        measured = [epoch for epoch in epochs if epoch["stage"] == stage][1:]
        seconds = statistics.median(epoch["cpu_seconds"] for epoch in measured)
        rows.append(
            {
                "stage": stage,
                "sequences_per_cpu_second": measured[0]["sequences"] / seconds,
                "targets_per_cpu_second": measured[0]["targets"] / seconds,
                "cpu_seconds": seconds,
                "seconds": statistics.median(epoch["seconds"] for epoch in measured),
            }
        )
    return [{**row, "ratio": row["cpu_seconds"] / rows[0]["cpu_seconds"]} for row in rows]


def summarize_batches(batches: Result) -> Result:
    """Of each way to take a step its seconds, and how many times a plain step on the same batch it takes."""
    return [
        {
            "way": way,
            "cpu_seconds": statistics.median(batch["cpu_seconds"][way] for batch in batches),
            "ratio": statistics.median(
                batch["cpu_seconds"][way] / batch["cpu_seconds"][PLAIN] for batch in batches
            ),
            "longest_history": statistics.median(batch["longest"] for batch in batches),
        }
        for way in batches[0]["cpu_seconds"]
    ]


def show(size: Size, result: dict[str, Result]) -> None:
    print_table(
        f"Both stages: {size.num_users:,} users, {size.num_items:,} items, one worker with one thread",
        ["stage", "width", "sequences/s", "targets/s", "epoch, s", "/ pre-training"],
        [
            [
                row["stage"],
                f"{row['width']}",
                f"{row['sequences_per_cpu_second']:,.0f}",
                f"{row['targets_per_cpu_second']:,.0f}",
                f"{row['cpu_seconds']:.1f}",
                f"{row['ratio']:.2f}",
            ]
            for row in result["stages"]
        ],
        f"CPU seconds, without validation and checkpoints. The goal is a ratio of at most {GOAL}.",
    )
    longest = statistics.median(row["longest_history"] for row in result["ways"])
    print_table(
        f"One step on the same batches of {size.tokens:,} inputs; longest history: {longest:.0f} (median)",
        ["step", "width", "step, ms", "/ pre-training"],
        [
            [row["way"], f"{row['width']}", f"{1000 * row['cpu_seconds']:.1f}", f"{row['ratio']:.2f}"]
            for row in result["ways"]
        ],
        "CPU seconds; medians over batches. The last is the authors' way to generate: a pass over the batch, "
        "without gradients, for every position of its longest history, and then a plain step.",
    )


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
) -> None:
    """Measure both training stages."""
    size = Size()
    with tempfile.TemporaryDirectory() as folder:
        log = BEAUTY if BEAUTY.is_file() else write_log_like_beauty(Path(folder))
        result = measure(log, size)
    show(size, result)
    if json_file:
        write_json(json_file, {"machine": machine(), "log": log.name, **result})


if __name__ == "__main__":
    typer.run(main)
