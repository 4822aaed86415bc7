"""`recgpt plan` beside what is measured: memory of a worker and time of a step, on this machine.

    python -m benchmarks.plan --json plan.json

Trains some steps of each setting, in processes joined by gloo, without Ray. The constants of the machine are
measured first, at other settings. Linux only.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.common import MIB, machine, print_table, write_json
from recgpt.config import TrainSettings
from recgpt.machines import Machine
from recgpt.scaling.calibration import calibrate
from recgpt.scaling.made_up_histories import write_dataset
from recgpt.scaling.plan import plan
from recgpt.scaling.ranks import run_ranks, step_seconds
from recgpt.scaling.workload import measure_workload
from recgpt.settings_reading import load_train_settings, to_dict
from recgpt.training.engine import read_deepspeed_config, zero_stage

# Lengths of Beauty's training histories, about.
LENGTHS = np.array([3, 3, 3, 4, 4, 5, 6, 7, 9, 14, 30])
SHARDED = "item_table.placement=sharded"
DRAWN = "loss.negatives=2048"
ONE = "model.members=1"


@dataclasses.dataclass(frozen=True)
class Case:
    """A training that is planned and measured."""

    name: str
    num_items: int
    workers: int
    overrides: tuple[str, ...] = ()


CASES = (
    Case("default settings, Beauty's size", 12_101, 1),
    Case("the same, 2 workers", 12_101, 2),
    Case("one member", 12_101, 1, (ONE,)),
    Case("one member of width 64, three layers", 12_101, 1, (ONE, "model.width=64", "model.layers=3")),
    Case("one member, 4,096 tokens, 2 workers", 3_000, 2, (ONE, "data.tokens_per_batch=4096")),
    Case("one member, sharded, full loss, 2 workers", 20_000, 2, (ONE, SHARDED, "loss.kind=full")),
    Case("one member, sharded, drawn items", 1_000_000, 1, (ONE, SHARDED, DRAWN)),
    Case("the same, 2 workers", 1_000_000, 2, (ONE, SHARDED, DRAWN)),
    Case(
        "one member of width 64, 4 million items, Adagrad, 2 workers",
        4_000_000,
        2,
        (ONE, SHARDED, DRAWN, "item_table.optimizer=adagrad", "model.width=64"),
    ),
    Case("one member, ZeRO-3, 2 workers", 12_101, 2, (ONE, "deepspeed=zero3")),
)


@dataclasses.dataclass(frozen=True)
class Size:
    """How much is measured; the tests measure less."""

    cases: tuple[Case, ...] = CASES
    users: int = 60_000
    warm_up: int = 10
    steps: int = 40


def measure(constants: Machine, size: Size) -> list[dict[str, Any]]:
    """Planned and measured, for each case."""
    return [_measure(constants, case, size) for case in size.cases]


def _measure(constants: Machine, case: Case, size: Size) -> dict[str, Any]:
    overrides = ["stages=[pretrain]", f"workers={case.workers}", *case.overrides]
    settings: TrainSettings = load_train_settings(None, overrides)
    with tempfile.TemporaryDirectory() as folder:
        dataset = write_dataset(Path(folder), size.users, LENGTHS, num_items=case.num_items)
        work = measure_workload(dataset, settings)
        stage = zero_stage(read_deepspeed_config(settings.deepspeed))
        planned = plan(settings, work, stage, constants)
        ranks = run_ranks(
            "recgpt.scaling.trial:trial",
            world_size=case.workers,
            dataset=dataset.url,
            settings=to_dict(settings),
            warm_up=size.warm_up,
            steps=size.steps,
        )
    return {
        "case": case.name,
        "planned_bytes": planned.memory.total - planned.memory.checkpoint,  # none is written so early
        "bytes": max(rank["memory_bytes"] for rank in ranks),
        "planned_seconds": planned.step.total,
        "seconds": step_seconds([rank["seconds"] for rank in ranks]),
        "step": dataclasses.asdict(planned.step),
        "communicated_seconds": max(sum(rank["communicated"].values()) for rank in ranks) / size.steps,
    }


def show(result: list[dict[str, Any]]) -> None:
    """Print the table."""
    print_table(
        "A training as planned and as measured",
        ["", "MiB planned", "MiB", "planned / measured", "ms a step planned", "ms", "planned / measured"],
        [
            [
                row["case"],
                f"{row['planned_bytes'] / MIB:,.0f}",
                f"{row['bytes'] / MIB:,.0f}",
                f"{row['planned_bytes'] / row['bytes']:.2f}",
                f"{1e3 * row['planned_seconds']:.1f}",
                f"{1e3 * row['seconds']:.1f}",
                f"{row['planned_seconds'] / row['seconds']:.2f}",
            ]
            for row in result
        ],
        "Most memory of a worker, and median time of a step.",
    )


def main(
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
) -> None:
    """Plan and measure."""
    constants = calibrate()
    result = measure(constants, Size())
    show(result)
    if json_file:
        numbers = {"machine": machine(), "constants": dataclasses.asdict(constants), "cases": result}
        write_json(json_file, numbers)


if __name__ == "__main__":
    typer.run(main)
