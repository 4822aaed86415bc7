"""Full cross-entropy: training steps beside RecBole's, and the loss beside its matrix products.

    python -m benchmarks.full_cross_entropy --json full_cross_entropy.json

One process and one thread on each side, which take turns. Rates are medians over steps. RecBole makes one
history of each target, its own way: it has several batch sizes to be fast with, as we have.
"""

import statistics
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import environment, machine, print_table, run_verb, write_json
from recgpt.scaling.ranks import REPOSITORY, run_ranks

BEAUTY = REPOSITORY.parent / "shared" / "data" / "Beauty.txt"
RECBOLE = (
    ["torch==2.13.0"],
    ["recbole==1.2.1"],
    ["setuptools<80", "numpy<2", "pandas<2.3", "scipy<1.14"],  # recbole asks for no upper bounds
)


@dataclass(frozen=True)
class Model:
    """What both sides train."""

    width: int = 64
    layers: int = 2
    heads: int = 2
    dropout: float = 0.5
    max_history: int = 50


@dataclass(frozen=True)
class Size:
    """How much is measured; the tests measure less."""

    batches: tuple[int, ...] = (512, 2048)
    """Tokens in a step of ours; the larger is RecBole's default."""
    recbole_batches: tuple[int, ...] = (128, 512, 2048)
    seconds: float = 15
    """Of each side and batch size in each round."""
    rounds: int = 2
    loss_targets: tuple[int, ...] = (512, 2048)
    loss_items: int = 12_101
    repetitions: int = 30
    """Of the loss and its products."""


def measure(log: Path = BEAUTY, size: Size | None = None) -> dict[str, Any]:
    """Both comparisons as JSON values."""
    size = size or Size()
    return {"training": measure_training(log, size), "loss": measure_loss(size)}


def measure_training(log: Path, size: Size, model: Model | None = None) -> list[dict[str, Any]]:
    """Targets per second of whole training steps, for each side and batch size."""
    model = model or Model()
    recbole = environment("recbole", *RECBOLE)
    with tempfile.TemporaryDirectory() as folder:
        dataset = f"{folder}/dataset"
        run_verb("prepare", "--input", str(log), "--output", dataset)
        sides: dict[tuple[str, int], dict[str, Any]] = {}
        for batch in size.batches:
            settings = {"settings": _settings(model, batch), "dataset": dataset}
            sides["RecGPT", batch] = {"function": "benchmarks.training_ranks:training_steps", **settings}
        for batch in size.recbole_batches:
            settings = {**asdict(model), "log": str(log.resolve()), "folder": folder, "batch": batch}
            function = "benchmarks.yardsticks.recbole_sasrec:measure"
            sides["RecBole", batch] = {"function": function, "python": recbole, **settings}
        steps: dict[tuple[str, int], list[Any]] = {side: [] for side in sides}
        for _ in range(size.rounds):
            for side, call in sides.items():
                (taken,) = run_ranks(world_size=1, seconds=size.seconds, **call)
                steps[side] += taken
    return [{"side": side, "batch": batch, **_rates(steps[side, batch])} for side, batch in sides]


def _settings(model: Model, tokens: int) -> dict[str, Any]:
    return {
        "model": asdict(model),
        "item_table": {"placement": "replicated"},
        "loss": {"kind": "full"},
        "data": {"tokens_per_batch": tokens},
        "pretrain": {"max_epochs": 10**6},
        "validation": {"every_epochs": 10**6},
        "checkpoint_every_steps": 10**6,
    }


def _rates(steps: list[list[float]]) -> dict[str, float]:
    return {
        "targets_per_second": statistics.median(targets / seconds for targets, seconds, _ in steps),
        "targets_per_cpu_second": statistics.median(targets / seconds for targets, _, seconds in steps),
        "steps": len(steps),
    }


def measure_loss(size: Size) -> list[dict[str, Any]]:
    """The loss with its gradients beside the three products that it cannot do without."""
    result = []
    for precision in ("highest", "medium"):
        for targets in size.loss_targets:
            work = {"targets": targets, "num_items": size.loss_items, "width": Model.width}
            (seconds,) = run_ranks(
                "benchmarks.training_ranks:loss_and_products",
                world_size=1,
                repetitions=size.repetitions,
                precision=precision,
                **work,
            )
            share = seconds["products_seconds"] / seconds["loss_seconds"]
            result.append({**work, "precision": precision, **seconds, "share_of_products_rate": share})
    return result


def print_training(result: list[dict[str, Any]]) -> None:
    theirs = [row["targets_per_second"] for row in result if row["side"] == "RecBole"]
    print_table(
        "Training steps: SASRec of RecBole with cross-entropy, and ours; one thread",
        ["", "batch", "targets/s", "/ RecBole's best", "share of a core"],
        [
            [
                row["side"],
                f"{row['batch']:,}",
                f"{row['targets_per_second']:,.0f}",
                f"{row['targets_per_second'] / max(theirs):.1f}",
                f"{row['targets_per_second'] / row['targets_per_cpu_second']:.2f}",
            ]
            for row in result
        ],
        "share of a core: what the process got of one; below 1 the machine was busy with other things.",
    )


def print_loss(result: list[dict[str, Any]]) -> None:
    print_table(
        f"Full cross-entropy with gradients, and its products alone: {result[0]['num_items']:,} items, one "
        "thread",
        ["matmul precision", "targets", "loss ms", "targets/s", "products ms", "GFLOP/s", "share of rate"],
        [
            [
                row["precision"],
                f"{row['targets']:,}",
                f"{row['loss_seconds'] * 1e3:.1f}",
                f"{row['targets'] / row['loss_seconds']:,.0f}",
                f"{row['products_seconds'] * 1e3:.1f}",
                f"{_product_operations(row) / row['products_seconds'] / 1e9:.0f}",
                f"{row['share_of_products_rate']:.2f}",
            ]
            for row in result
        ],
        "CPU seconds. share of rate: of that which the three products reach alone, in blocks of the best of "
        "several sizes and into memory that is there already. medium lets torch use oneDNN.",
    )


def _product_operations(row: dict[str, Any]) -> int:
    return 3 * 2 * row["targets"] * row["num_items"] * row["width"]


def main(
    log: Annotated[Path, typer.Option(help="One line per user: the user and then items in order.")] = BEAUTY,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
) -> None:
    """Measure full cross-entropy."""
    result = measure(log)
    print_training(result["training"])
    print_loss(result["loss"])
    if json_file:
        write_json(json_file, {"machine": machine(), **result})


if __name__ == "__main__":
    typer.run(main)
