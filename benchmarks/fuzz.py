"""Thousands of bad inputs for every reader: each must be refused in words, quarantined, or read right.

``python -m benchmarks.fuzz --inputs 10000 --seed 0``. An input follows from the seed, the reader's name and
its number; ``--reader NAME --only NUMBER`` makes one again and shows what comes of it.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from benchmarks.common import machine, print_table, write_json
from benchmarks.fuzzing.folder_readers import folder_readers
from benchmarks.fuzzing.hostile import bombs
from benchmarks.fuzzing.log_readers import log_readers
from benchmarks.fuzzing.mutators import SECRET
from benchmarks.fuzzing.readers import Input, Place, Reader, files_of, problem_of_message
from benchmarks.fuzzing.run_readers import run_readers
from benchmarks.fuzzing.text_readers import text_readers
from benchmarks.fuzzing.watch import GIB, WatchedPool, Witness, limit_memory, watch
from recgpt.errors import UserError

REFUSED, QUARANTINED, RIGHT, ALLOWED, DEFECT = OUTCOMES = (
    "clear error", "quarantined", "right", "allowed", "defect",
)  # fmt: skip
_NOTE = "right: as the good input is read; allowed: read otherwise, as the format's rules have it"
SECONDS = 120  # after which a reader counts as hanging; on a busy machine a good one may take some ten
MEMORY = 4 * GIB  # of addresses that a reader may take


@dataclass(frozen=True)
class Task:
    reader: str
    number: int


@dataclass(frozen=True)
class Outcome:
    """What came of an input."""

    task: Task
    kind: str
    how: str = ""
    """How the input was made."""
    detail: str = ""
    """The error's line, or what is wrong."""


def all_readers() -> dict[str, Reader]:
    return {
        reader.name: reader for reader in [*text_readers(), *log_readers(), *folder_readers(), *run_readers()]
    }


class Bench:
    """One process's bench: a folder of its own, the readers with their good inputs, and who watches."""

    def __init__(self, seed: int, root: str):
        self.seed = seed
        self.root = Path(root)
        self.readers = all_readers()
        self.truths: dict[str, Any] = {}
        self.witness: Witness = watch()
        os.environ["AWS_SECRET_ACCESS_KEY"] = SECRET

    def __call__(self, task: Task) -> Outcome:
        reader = self.readers[task.reader]
        place = Place(self.root / task.reader.replace(" ", "-").replace(":", "").replace(",", ""))
        if task.reader not in self.truths:
            self.truths[task.reader] = self._good(reader, place)
        chance = random.Random(f"{self.seed}/{task.reader}/{task.number}")
        given = reader.spoil(chance, place)
        _put(place, given)
        self.witness.forbidden_folder, self.witness.seen = str(place.outside), []
        kind, detail = judged(reader, place, given, self.truths[task.reader])
        forbidden = [*self.witness.seen, *(["code from the data ran"] if place.marker.exists() else [])]
        if forbidden:
            kind, detail = DEFECT, "; ".join(forbidden)
            shutil.rmtree(place.marker, ignore_errors=True)
        return Outcome(task, kind, given.how, detail)

    def _good(self, reader: Reader, place: Place) -> Any:
        place.root.mkdir()
        reader.make_good(place)
        reader.good = files_of(place.folder)
        shutil.copytree(place.folder, place.outside)
        return reader.read(place, Input(reader.good, "good"))


def _put(place: Place, given: Input) -> None:
    shutil.rmtree(place.folder, ignore_errors=True)
    place.folder.mkdir()
    for name, data in given.files.items():
        path = place.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def judged(reader: Reader, place: Place, given: Input, truth: Any) -> tuple[str, str]:
    """What a reader does with an input, and why that is wrong, or the line of its error."""
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            value = reader.read(place, given)
    except UserError as error:
        problem = problem_of_message(str(error))
        return (DEFECT, problem) if problem else (REFUSED, str(error))
    except BaseException as error:
        trace = traceback.extract_tb(error.__traceback__)
        where = next((frame for frame in reversed(trace) if "/recgpt/" in frame.filename), trace[-1])
        line = f"{Path(where.filename).name}:{where.lineno} {where.name}"
        return DEFECT, f"{type(error).__name__} at {line}: {' '.join(str(error).split())[:300]}"
    right = repr(value) == repr(truth)
    if not right and (objection := reader.objection(value, truth, given)) is not None:
        return DEFECT, objection
    if given.must_be_refused and not reader.is_quarantined(value):
        return DEFECT, "a name that leads elsewhere was followed"
    if reader.is_quarantined(value):
        return QUARANTINED, ""
    return (RIGHT if right else ALLOWED), ""


def run(inputs: int, seed: int, processes: int, readers: list[str] | None = None) -> Iterator[Outcome]:
    """The outcomes of so many inputs, dealt out evenly to the readers, as they come."""
    names = readers or list(all_readers())
    tasks = (Task(names[number % len(names)], number // len(names)) for number in range(inputs))
    bombs()  # made once, before there are processes
    with tempfile.TemporaryDirectory(prefix="recgpt-fuzz-") as folder:
        pool = WatchedPool(processes, _make_bench(seed, folder), SECONDS)
        yield from pool.run(tasks, lambda task, reason: Outcome(task, DEFECT, "see --only", reason))


def _make_bench(seed: int, folder: str) -> Callable[[], Bench]:
    def make() -> Bench:
        torch.set_num_threads(1)
        pa.set_memory_pool(pa.system_memory_pool())  # others keep what was freed, of which the next has less
        limit_memory(MEMORY)
        return Bench(seed, tempfile.mkdtemp(dir=folder))

    return make


def table_of(outcomes: list[Outcome]) -> list[dict[str, Any]]:
    """A row for each reader: how many inputs, and what came of them."""
    counts: dict[str, Counter[str]] = {}
    for outcome in outcomes:
        counts.setdefault(outcome.task.reader, Counter())[outcome.kind] += 1
    order = [name for name in all_readers() if name in counts]
    return [
        {"reader": name, "inputs": counts[name].total(), **{kind: counts[name][kind] for kind in OUTCOMES}}
        for name in order
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--reader", action="append", help="these readers alone")
    parser.add_argument("--only", type=int, help="this input alone, with the reader's answer")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    arguments = parser.parse_args()
    if arguments.only is not None:
        with tempfile.TemporaryDirectory() as folder:
            print(Bench(arguments.seed, folder)(Task(arguments.reader[0], arguments.only)))
        return
    outcomes = list(run(arguments.inputs, arguments.seed, arguments.processes, arguments.reader))
    rows = table_of(outcomes)
    total = {"reader": "all", **{name: sum(row[name] for row in rows) for name in ("inputs", *OUTCOMES)}}
    cells = [[str(value) for value in row.values()] for row in [*rows, total]]
    print_table(f"{total['inputs']:,} bad inputs, seed {arguments.seed}", list(total), cells, _NOTE)
    defects = [outcome for outcome in outcomes if outcome.kind == DEFECT]
    for outcome in defects:
        print(f"{outcome.task.reader} {outcome.task.number}: {outcome.how}: {outcome.detail}")
    if arguments.json:
        found = [{**vars(one), "task": vars(one.task)} for one in defects]
        write_json(
            arguments.json,
            {"seed": arguments.seed, "machine": machine(), "readers": rows, "all": total, "found": found},
        )
    sys.exit(1 if defects else 0)


if __name__ == "__main__":
    main()
