"""`recgpt prepare` beside DuckDB, which does the same job in SQL: seconds, memory, and how both grow.

    python -m benchmarks.prepare --json prepare.json

Logs with string ids are made up and prepared by both sides, which take turns; each is a process of its own
with its descendants (Ray's among them). Seconds are from the start of the process to its end. Both must find
the same numbers of users, items and interactions, and on the smallest log the same histories. Linux only;
takes 3 GB of disk for a while, where temporary files go (TMPDIR).

Shapes: U users, M interactions.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import pyarrow as pa
import pyarrow.parquet as pq
import typer

from benchmarks.common import environment, machine, print_table, write_json
from benchmarks.process_tree import PeakMemory, adopt_orphans, kill_descendants
from benchmarks.string_log import write_log
from recgpt.data.arrow import combine, list_arrays, make_lists
from recgpt.schema import (
    COUNT,
    HISTORIES_FOLDER,
    ITEM_ID,
    ITEM_IDS,
    ITEM_INDEX,
    ITEM_INDICES,
    MANIFEST_FILE,
    TIMESTAMPS,
    USER_ID,
    VOCABULARY_FILE,
)

REPOSITORY = Path(__file__).parent.parent
GIB = 2**30
DUCKDB = (["duckdb==2.0.1"],)
SIZES = "1000000,10000000,50000000"
TURNS_OF_SMALLER_LOGS = 3
INTERACTIONS_PER_USER = 50
INTERACTIONS_PER_ITEM = 100
MOST_ITEMS = 500_000
FILES = 64
GOALS = "Goals at 50 million rows: RecGPT in at most 3 times DuckDB's seconds, and within 6 GiB."
LINES_SHOWN = 30  # of the output of a process that failed


@dataclass(frozen=True)
class Turn:
    """What one side found in a log, and what that took."""

    users: int
    items: int
    interactions: int
    seconds: float
    peak_bytes: int


def measure(sizes: Sequence[int], turns_of_largest: int, python: str) -> dict[str, Any]:
    """All sizes, ascending, as JSON values.

    Args:
        sizes: interactions of each log.
        turns_of_largest: of each side on the largest log; on smaller ones it has at least three.
        python: that of an environment which has DuckDB.
    """
    logs = []
    for size in sorted(sizes):
        turns = turns_of_largest if size == max(sizes) else max(TURNS_OF_SMALLER_LOGS, turns_of_largest)
        with tempfile.TemporaryDirectory(prefix="prepare_") as folder:
            logs.append(measure_log(Path(folder), size, turns, python, compare=size == min(sizes)))
    ray_seconds = statistics.median(seconds for log in logs for seconds in log["ray"])
    return {"ray_seconds": ray_seconds, "figures": figures(logs, ray_seconds), "logs": logs}


def measure_log(
    folder: Path, num_interactions: int, turns: int, python: str, compare: bool
) -> dict[str, Any]:
    """Both sides on one log, which is made in the folder.

    Raises ``RuntimeError`` if a side fails or, with ``compare``, if the histories differ.
    """
    typer.echo(f"{num_interactions:,} interactions ...", err=True)
    log = folder / "log"
    items = min(MOST_ITEMS, num_interactions // INTERACTIONS_PER_ITEM)
    write_log(log, num_interactions, num_interactions // INTERACTIONS_PER_USER, items, FILES)
    sides = {"duckdb": partial(duckdb_turn, python), "recgpt": recgpt_turn}
    taken: dict[str, list[Turn]] = {side: [] for side in sides}
    ray_seconds = []
    for _ in range(turns):
        for side, take_turn in sides.items():
            shutil.rmtree(folder / side, ignore_errors=True)
            os.sync()  # what was written so far is not for this side to wait for
            taken[side].append(take_turn(log, folder / side))
        ray_seconds.append(ray_alone())
    found = {(turn.users, turn.items, turn.interactions) for side in sides for turn in taken[side]}
    wrong = [f"users, items, interactions: {sorted(found)}"] if len(found) > 1 else []
    if compare:
        wrong += differences(*(read_dataset(folder / side) for side in sides))
    if wrong:
        raise RuntimeError("\n".join(["the sides differ:", *wrong]))
    return {
        "interactions": num_interactions,
        "histories_compared": compare,
        "ray": ray_seconds,
        **{side: [asdict(turn) for turn in taken[side]] for side in sides},
    }


def duckdb_turn(python: str, log: Path, output: Path) -> Turn:
    """DuckDB is one process and knows its own peak: brief runs end before the first sample."""
    result = output.with_suffix(".json")
    call = [python, "-m", "benchmarks.yardsticks.duckdb_prepare", "--input", log, "--output", output]
    threads = str(os.cpu_count())  # as many tasks as a local Ray runs at once
    seconds, _ = run([*call, "--threads", threads, "--json", result])
    found = json.loads(result.read_text())
    return Turn(found["users"], found["items"], found["interactions"], seconds, found["peak_bytes"])


def recgpt_turn(log: Path, output: Path) -> Turn:
    call = [sys.executable, "-m", "ray_jobs.cli", "prepare", "--input", log, "--output", output]
    seconds, peak_bytes = run(call)
    found = json.loads((output / MANIFEST_FILE).read_text())
    numbers = (found[name] for name in ("num_users", "num_items", "num_interactions"))
    return Turn(*numbers, seconds, peak_bytes)


def ray_alone() -> float:
    """Seconds of a process that starts Ray as `recgpt prepare` does, and ends."""
    return run(
        [sys.executable, "-c", "from ray_jobs.runtime import start_ray; start_ray(2, large_objects=True)"]
    )[0]


def run(call: Sequence[str | Path]) -> tuple[float, int]:
    """Seconds of a process, and the most bytes that were seen in it and its descendants together.

    Raises ``RuntimeError`` with the end of its output if it fails.
    """
    with tempfile.TemporaryFile() as output, PeakMemory() as memory:
        started = time.perf_counter()
        process = subprocess.Popen(call, stdout=output, stderr=subprocess.STDOUT, cwd=REPOSITORY)
        process.wait()
        seconds = time.perf_counter() - started
        kill_descendants()  # what of Ray outlives its driver
        if process.returncode:
            output.seek(0)
            last = output.read().decode(errors="replace").splitlines()[-LINES_SHOWN:]
            raise RuntimeError("\n".join([f"{' '.join(map(str, call))} failed:", *last]))
    return seconds, memory.bytes


@dataclass(frozen=True)
class Prepared:
    """What a side wrote, in a form that does not depend on how it numbers items and orders users."""

    histories: pa.Table
    """By user id: user_id, item_ids and timestamps, [U]."""
    counts: pa.Table
    """By item id: item_id and count."""


def read_dataset(folder: Path) -> Prepared:
    """Either side's vocabulary and histories."""
    vocabulary = pq.read_table(folder / VOCABULARY_FILE).sort_by(ITEM_INDEX)
    item_ids = combine(vocabulary[ITEM_ID])
    columns = [USER_ID, ITEM_INDICES, TIMESTAMPS]
    table = pq.read_table(folder / HISTORIES_FOLDER, columns=columns).combine_chunks().sort_by(USER_ID)
    indices_M, offsets = list_arrays(table[ITEM_INDICES])
    times_M, offsets_of_times = list_arrays(table[TIMESTAMPS])
    histories = {
        USER_ID: combine(table[USER_ID]),
        ITEM_IDS: make_lists(item_ids.take(pa.array(indices_M - 1)), offsets),
        TIMESTAMPS: make_lists(times_M, offsets_of_times),
    }
    counts = pa.table({ITEM_ID: item_ids, COUNT: combine(vocabulary[COUNT])}).sort_by(ITEM_ID)
    return Prepared(pa.table(histories), counts)


def differences(one: Prepared, other: Prepared) -> list[str]:
    """What is not the same, in words; empty if all is."""
    wrong = [] if one.counts.equals(other.counts) else ["items or their interactions"]
    if not one.histories[USER_ID].equals(other.histories[USER_ID]):
        return [*wrong, "users"]
    for column in (ITEM_IDS, TIMESTAMPS):
        mine, theirs = (combine(side.histories[column]).to_pylist() for side in (one, other))
        users = [n for n, pair in enumerate(zip(mine, theirs, strict=True)) if pair[0] != pair[1]]
        if users:
            first = one.histories[USER_ID][users[0]]
            wrong.append(f"{column} of {len(users):,} users, {first} among them")
    return wrong


def figures(logs: Sequence[dict[str, Any]], ray_seconds: float) -> list[dict[str, float]]:
    """Of each log: medians of seconds, highest peaks, the ratio, and growth beside the first log.

    Growth is in seconds per interaction. Ray's start is the same on any log and would hide it.
    """
    result: list[dict[str, float]] = []
    for log in logs:
        row = {"interactions": log["interactions"]}
        for side, fixed in (("duckdb", 0.0), ("recgpt", ray_seconds)):
            row[f"{side}_seconds"] = statistics.median(turn["seconds"] for turn in log[side])
            row[f"{side}_peak_bytes"] = max(turn["peak_bytes"] for turn in log[side])
            each = (row[f"{side}_seconds"] - fixed) / log["interactions"]
            row[f"{side}_seconds_per_interaction"] = each
            row[f"{side}_growth"] = each / (result or [row])[0][f"{side}_seconds_per_interaction"]
        row["ratio"] = row["recgpt_seconds"] / row["duckdb_seconds"]
        result.append(row)
    return result


def show(result: dict[str, Any]) -> None:
    rows = [
        [
            f"{row['interactions'] / 1e6:g}",
            f"{row['duckdb_seconds']:.1f}",
            f"{row['recgpt_seconds']:.1f}",
            f"{row['recgpt_seconds'] - result['ray_seconds']:.1f}",
            f"{row['ratio']:.1f}",
            f"{row['duckdb_peak_bytes'] / GIB:.1f}",
            f"{row['recgpt_peak_bytes'] / GIB:.1f}",
            f"{row['recgpt_growth']:.2f}",
        ]
        for row in result["figures"]
    ]
    columns = ["million rows", "DuckDB s", "RecGPT s", "less Ray's start", "ratio"]
    columns += ["DuckDB GiB", "RecGPT GiB", "growth"]
    growth = "growth: RecGPT's seconds per interaction, less Ray's start, over those of the smallest log."
    print_table("From a log to histories", columns, rows, f"{growth}\n{GOALS}")


def main(
    interactions: Annotated[str, typer.Option(help="Of each log, between commas.")] = SIZES,
    repeats: Annotated[
        int, typer.Option(help="Turns of each side on the largest log; on smaller ones it has three or more.")
    ] = 1,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the numbers to.")] = None,
) -> None:
    """Prepare made-up logs of several sizes with DuckDB and with RecGPT."""
    adopt_orphans()
    try:
        sizes = [int(size) for size in interactions.split(",")]
        result = measure(sizes, repeats, environment("duckdb", *DUCKDB))
    finally:
        kill_descendants()
    show(result)
    if json_file:
        write_json(json_file, {"machine": machine(), **result})


if __name__ == "__main__":
    typer.run(main)
