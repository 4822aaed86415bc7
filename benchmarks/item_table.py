"""The sharded item table: cost against its size, against the table inside DeepSpeed, against torchrec.

    python -m benchmarks.item_table --json item_table.json

Two ranks, real gloo processes with one thread each. Times are medians of steps; the two sides of every
ratio take turns in the same run. Linux only; a part of about a quarter of an hour needs 17 GiB.
"""

import itertools
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from benchmarks.common import MIB, environment, machine, print_table, write_json
from recgpt.scaling.ranks import run_ranks, step_seconds

RANKS = 2
VALUE_BYTES = {"float32": 4, "bfloat16": 2}
ADAGRAD_BYTES = 4  # of state per row
SAME_ROWS = 1e-4  # largest difference after sums in another order
TORCHREC = (
    ["torch==2.13.0", "numpy", "pyre-extensions", "tensordict", "torchmetrics", "tqdm"],
    [
        "--no-deps",
        "torchrec==1.8.0",
        "fbgemm-gpu-cpu==1.8.0",
    ],  # they ask for others, which have no build for CPUs
)


@dataclass(frozen=True)
class Size:
    """How much is measured; the tests measure less."""

    width: int = 64
    items: tuple[int, ...] = (10_000, 100_000, 1_000_000, 10_000_000, 50_000_000)
    """Of the growing table; all are compared with the first."""
    items_of_rivals: int = 1_000_000
    """Of the tables compared with DeepSpeed's and torchrec's."""
    tokens: tuple[int, ...] = (256, 2048)
    """Of a rank in a step: as in the default settings with two workers, and a large batch."""
    negatives: int = 8192
    steps: int = 25
    engine_steps: int = 6
    """With the table inside DeepSpeed."""
    lookup_tokens: tuple[int, ...] = (512, 2048, 8192)
    """Of a rank in a step of lookup and update alone."""
    lookup_steps: int = 60
    rounds: int = 3
    """Processes of each side that take turns, where the sides need different ones."""


class Part(str, Enum):
    size = "size"
    engine = "engine"
    torchrec = "torchrec"
    traffic = "traffic"


def measure_size(size: Size) -> dict[str, Any]:
    """Steps and memory of tables of growing size; every step of one is followed by one of the smallest."""
    smallest = size.items[0]
    fixed_memory = None
    tables = []
    for num_items in size.items:
        ranks = run_ranks(
            "benchmarks.table_ranks:growing_table",
            num_items=num_items,
            compared_items=smallest,
            tokens=size.tokens,
            steps=size.steps,
            width=size.width,
            negatives=size.negatives,
        )
        peak = max(rank["peak"] for rank in ranks)
        table_memory = num_items * (size.width * VALUE_BYTES["float32"] + ADAGRAD_BYTES) // RANKS
        fixed_memory = peak - table_memory if fixed_memory is None else fixed_memory
        memory = {"peak_bytes": peak, "share_of_expected": peak / (table_memory + fixed_memory)}
        steps = [_compared([rank["steps"][place] for rank in ranks]) for place in range(len(size.tokens))]
        tables.append({"items": num_items, **memory, "steps": steps})
    return {"fixed_bytes": fixed_memory, "tables": tables}


def _compared(ranks: list[dict[str, Any]]) -> dict[str, float]:
    """One table's steps, and how many times as long as those of the smallest they take."""
    result: dict[str, float] = {}
    for kind in ("whole", "table"):
        ours, smallest = (step_seconds([rank[kind][side] for rank in ranks]) for side in (0, 1))
        result |= {f"{kind}_seconds": ours, f"{kind}_ratio": ours / smallest}
    return {**result, "updated_rows": sum(rank["updated_rows"][0] for rank in ranks)}


def print_size(size: Size, result: dict[str, Any]) -> None:
    tables = result["tables"]
    for place, tokens in enumerate(size.tokens):
        steps = [table["steps"][place] for table in tables]
        print_table(
            f"A step against the size of the table: width {size.width}, {RANKS * tokens:,} tokens, "
            f"{size.negatives:,} negatives, row-wise Adagrad",
            ["items", "step ms", "ratio", "table alone ms", "ratio", "rows updated"],
            [
                [
                    f"{table['items']:,}",
                    f"{step['whole_seconds'] * 1e3:.1f}",
                    f"{step['whole_ratio']:.2f}",
                    f"{step['table_seconds'] * 1e3:.1f}",
                    f"{step['table_ratio']:.2f}",
                    f"{step['updated_rows']:,}",
                ]
                for table, step in zip(tables, steps, strict=True)
            ],
            f"ratio: to the table of {size.items[0]:,} items in the same processes, step by step. "
            "table alone: lookup, loss and table optimizer, as if there were no GPT.",
        )
    print_table(
        f"Memory of a rank, {RANKS * size.tokens[0]:,} tokens",
        ["items", "peak MiB", "/ expected"],
        [
            [f"{table['items']:,}", f"{table['peak_bytes'] / MIB:,.0f}", f"{table['share_of_expected']:.3f}"]
            for table in tables
        ],
        f"expected: items / {RANKS} x (row + state) + {result['fixed_bytes'] / MIB:,.0f} MiB.",
    )


def measure_engine(size: Size) -> dict[str, Any]:
    """The table outside the engine and inside it: the same GPT, loss and batches."""
    settings = {
        "num_items": size.items_of_rivals,
        "small_items": size.items[0],
        "tokens": size.tokens,
        "negatives": size.negatives,
        "width": size.width,
    }

    def run(placement: str, deepspeed: str, steps: int) -> dict[str, Any]:
        function = "benchmarks.table_ranks:table_in_its_place"
        ranks = run_ranks(function, placement=placement, deepspeed=deepspeed, steps=steps, **settings)
        largest = max(ranks, key=lambda rank: rank["peak"])
        return {
            "seconds": [
                step_seconds(each) for each in zip(*(rank["seconds"] for rank in ranks), strict=True)
            ],
            "peak_bytes": largest["peak"],
            "added_bytes": largest["peak"] - largest["small_peak"],
        }

    before = run("sharded", "zero1", size.steps)
    inside = {stage: run("replicated", stage, size.engine_steps) for stage in ("zero1", "zero2", "zero3")}
    after = run("sharded", "zero1", size.steps)
    # The machine may have been busier at one end.
    seconds = [statistics.mean(ends) for ends in zip(before["seconds"], after["seconds"], strict=True)]
    return {"sharded": {**before, "seconds": seconds}, **inside}


def print_engine(size: Size, result: dict[str, dict[str, Any]]) -> None:
    ours = result["sharded"]
    for place, tokens in enumerate(size.tokens):
        print_table(
            f"The table sharded (row-wise Adagrad) and inside DeepSpeed (AdamW): {size.items_of_rivals:,} "
            f"items, {RANKS * tokens:,} tokens, {size.negatives:,} negatives",
            ["table", "step ms", "/ sharded"],
            [
                [
                    name,
                    f"{side['seconds'][place] * 1e3:,.1f}",
                    f"{side['seconds'][place] / ours['seconds'][place]:.1f}",
                ]
                for name, side in result.items()
            ],
        )
    rows = []
    for name, side in result.items():
        pairs = [(side[kind], ours[kind]) for kind in ("peak_bytes", "added_bytes")]
        rows.append([name, *itertools.chain(*([f"{it / MIB:,.0f}", f"{our / it:.2f}"] for it, our in pairs))])
    print_table(
        f"Memory of a rank, {RANKS * size.tokens[0]:,} tokens",
        ["table", "peak MiB", "sharded / it", "added MiB", "sharded / it"],
        rows,
        f"added: over the peak of the same process with a table of {size.items[0]:,} items.",
    )


def measure_torchrec(size: Size) -> list[dict[str, Any]]:
    """Lookup and update alone, beside torchrec's; the sides run one after the other, in turns."""
    theirs = {
        "function": "benchmarks.yardsticks.torchrec_table:measure",
        "python": environment("torchrec", *TORCHREC),
    }
    sides: dict[str, dict[str, Any]] = {
        "recgpt": {"function": "benchmarks.table_ranks:lookup_steps"},
        "torchrec": {**theirs, "unique": False},
        "torchrec_distinct": {**theirs, "unique": True},
    }
    result = []
    for tokens in size.lookup_tokens:
        work = {
            "num_rows": size.items_of_rivals,
            "width": size.width,
            "tokens": tokens,
            "steps": size.lookup_steps,
            "learning_rate": 0.1,
            "epsilon": 1e-8,
        }
        seconds: dict[str, list[float]] = {side: [] for side in sides}
        with tempfile.TemporaryDirectory() as folder:
            for _ in range(size.rounds):
                for side, call in sides.items():
                    ranks = run_ranks(**call, **work, vectors=f"{folder}/{side}")
                    settled = [one[len(one) // 10 :] for one in ranks]
                    seconds[side].append(step_seconds(settled))
            difference = max(_difference(Path(folder), side) for side in sides)
        assert difference < SAME_ROWS, f"the rows differ by {difference:.1e}: not the same work"
        medians = {side: statistics.median(each) for side, each in seconds.items()}
        result.append({"tokens_of_a_rank": tokens, "seconds": medians, "largest_difference": difference})
    return result


def _difference(folder: Path, side: str) -> float:
    """Between the used rows in the end and ours: that they agree shows that the work is the same."""
    pairs = [(f"recgpt-{rank}.npy", f"{side}-{rank}.npy") for rank in range(RANKS)]
    return max(
        float(np.abs(np.load(folder / ours) - np.load(folder / theirs)).max()) for ours, theirs in pairs
    )


def print_torchrec(size: Size, result: list[dict[str, Any]]) -> None:
    print_table(
        f"Lookup and update (row-wise Adagrad), beside torchrec: {size.items_of_rivals:,} rows, "
        f"width {size.width}",
        ["tokens of a rank", "ours ms", "torchrec ms", "/ ours", "distinct ids ms", "/ ours"],
        [[f"{row['tokens_of_a_rank']:,}", *_against(row["seconds"])] for row in result],
        f"The rows differ by at most {max(row['largest_difference'] for row in result):.1e} after "
        f"{size.lookup_steps} steps. distinct ids: duplicates removed before torchrec sees them.",
    )


def _against(seconds: dict[str, float]) -> list[str]:
    ours, *others = seconds.values()
    cells = ([f"{other * 1e3:.2f}", f"{other / ours:.2f}"] for other in others)
    return [f"{ours * 1e3:.2f}", *itertools.chain(*cells)]


def measure_traffic(size: Size) -> list[dict[str, Any]]:
    """Bytes of whole steps, which must be what the formula says."""
    tables = [(items, row_dtype) for row_dtype in VALUE_BYTES for items in size.items[:3]]
    ranks = run_ranks(
        "benchmarks.table_ranks:bytes_of_steps",
        tables=tables,
        tokens=size.tokens[0],
        negatives=size.negatives,
        width=size.width,
    )
    result = []
    for (items, row_dtype), *steps in zip(tables, *ranks, strict=True):
        total = {kind: sum(step[kind] for step in steps) for kind in steps[0]}
        expected = total["unique_ids"] * (8 + 2 * size.width * VALUE_BYTES[row_dtype])
        assert total["all_to_all"] == expected, (total, expected)
        result.append({"row_dtype": row_dtype, "items": items, **total})
    return result


def print_traffic(size: Size, result: list[dict[str, Any]]) -> None:
    kinds = ("unique_ids", "all_to_all", "all_gather", "all_reduce")
    print_table(
        f"Bytes handed over in a step, by both ranks together: {RANKS * size.tokens[0]:,} tokens, "
        f"width {size.width}",
        ["rows", "items", "unique ids", *kinds[1:]],
        [[row["row_dtype"], f"{row['items']:,}", *(f"{row[kind]:,}" for kind in kinds)] for row in result],
        "all_to_all (lookup) is exactly unique ids x (8 + 2 x width x bytes of a value); all_gather and "
        "all_reduce (loss) depend on the tokens alone. DeepSpeed's own traffic is not counted.",
    )


PARTS: dict[Part, tuple[Callable[[Size], Any], Callable[[Size, Any], None]]] = {
    Part.size: (measure_size, print_size),
    Part.engine: (measure_engine, print_engine),
    Part.torchrec: (measure_torchrec, print_torchrec),
    Part.traffic: (measure_traffic, print_traffic),
}


def main(
    part: Annotated[list[Part] | None, typer.Option(help="What to measure; all if not given.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Where to write the numbers.")] = None,
) -> None:
    """Measure the sharded item table."""
    size = Size()
    results: dict[str, Any] = {"machine": machine()}
    for name in part or list(Part):
        measure, show = PARTS[name]
        results[name.value] = measure(size)
        show(size, results[name.value])
        if json_file:  # after each part, for those that are finished
            write_json(json_file, results)


if __name__ == "__main__":
    typer.run(main)
