"""What a checkpoint costs, written beside the training and at once, and a resume.

python -m benchmarks.checkpoints [--json FILE]
"""

import statistics
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import MIB, machine, print_table, write_json
from recgpt.scaling.ranks import run_ranks, step_seconds

WAYS = ("in background", "at once")


@dataclass(frozen=True)
class Size:
    """How much is measured; the test measures less."""

    num_items: int = 1_000_000
    width: int = 64
    negatives: int = 8192
    tokens: int = 2048
    """Of each rank and step."""
    steps: int = 8
    rounds: int = 3


def measure(size: Size) -> dict[str, Any]:
    """Medians over rounds; of several ranks, the slowest counts."""
    with tempfile.TemporaryDirectory() as folder:
        ranks = run_ranks(
            "benchmarks.checkpoint_ranks:checkpoints",
            folder=folder,
            num_items=size.num_items,
            width=size.width,
            negatives=size.negatives,
            tokens=size.tokens,
            steps=size.steps,
            rounds=size.rounds,
        )
    result: dict[str, Any] = {"step_seconds": step_seconds([rank["alone"] for rank in ranks])}
    for way in WAYS:
        rounds = list(zip(*(rank[way] for rank in ranks), strict=True))
        result[way] = {
            "bytes": rounds[0][0]["bytes"],
            "pause_seconds": statistics.median(max(one["pause"] for one in ranks) for ranks in rounds),
            "write_seconds": statistics.median(max(one["write"] for one in ranks) for ranks in rounds),
            "step_seconds": statistics.median(
                step_seconds([one["steps"] for one in ranks]) for ranks in rounds
            ),
        }
    result["resume_seconds"] = step_seconds([rank["resume"] for rank in ranks])
    return result


def show(size: Size, result: dict[str, Any]) -> None:
    step = result["step_seconds"]
    print_table(
        f"Checkpoints of {size.num_items:,} items, width {size.width}, Adam; 2 ranks, {step:.3f} s a step",
        ["written", "MiB", "pause, s", "in steps", "whole writing, s", "a step meanwhile"],
        [
            [
                way,
                f"{result[way]['bytes'] / MIB:,.0f}",
                f"{result[way]['pause_seconds']:.2f}",
                f"{result[way]['pause_seconds'] / step:.1f}",
                f"{result[way]['write_seconds']:.2f}",
                f"{result[way]['step_seconds'] / step:.2f} times as long",
            ]
            for way in WAYS
        ],
        f"To check one and to load it again: {result['resume_seconds']:.2f} s.",
    )


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
) -> None:
    """Measure checkpoints."""
    size = Size()
    result = measure(size)
    show(size, result)
    if json_file:
        write_json(json_file, {"machine": machine(), **result})


if __name__ == "__main__":
    typer.run(main)
