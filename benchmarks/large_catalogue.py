"""A catalogue of ten million items on one machine: the console's verbs from the log to the exported model.

    python -m benchmarks.large_catalogue --json large_catalogue.json

Makes up a log in which every item occurs, prepares it, trains on two workers until two checkpoints are
there, kills everything with SIGKILL, goes on with three workers, kills again, goes on with one worker to
the end of the epoch, and compares every exported row with its initial value. Each phase is a process of
its own with its descendants (Ray's among them), whose memory is sampled every second. Linux only; takes
15 GB of disk for a while, where temporary files go (TMPDIR).
"""

import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import machine, print_table, write_json
from benchmarks.process_tree import PeakMemory, adopt_orphans, kill_descendants
from recgpt.training import checkpoint
from recgpt.training.run_folder import METRICS_FILE

REPOSITORY = Path(__file__).parent.parent
GIB = 2**30
LIMIT_GIB = 20.0
WORKERS = (2, 3, 1)  # of one run, one after the other; all but the last are killed
CHECKPOINTS_BEFORE_KILL = 2
SECONDS_BETWEEN_LOOKS = 0.1
LINES_SHOWN = 20  # of the output of a verb that failed


@dataclass(frozen=True)
class Size:
    """How large the run is; see ``TrainSettings``."""

    items: int = 10_000_000
    tokens_per_batch: int = 8192
    negatives: int = 2048
    checkpoint_every_steps: int = 150


@dataclass
class Phase:
    """What one phase did and took."""

    name: str
    seconds: float
    peak_memory_gib: float
    facts: dict[str, Any] = field(default_factory=dict)


class Benchmark:
    """The phases in their order; everything lies in ``folder``."""

    def __init__(self, folder: Path, size: Size):
        self.folder = folder
        self.size = size
        self.log, self.dataset, self.run_folder = (folder / name for name in ("log", "dataset", "run"))
        self.phases: list[Phase] = []

    def run(self) -> list[Phase]:
        log = ["benchmarks.large_log", "--items", self.size.items, "--output", self.log]
        self._phase("make the log", log)
        self._phase("prepare", ["ray_jobs.cli", "prepare", "--input", self.log, "--output", self.dataset])
        for workers in WORKERS[:-1]:
            self._train(workers, kill=True)
        self._train(WORKERS[-1], kill=False)
        self._compare_rows()
        return self.phases

    def _train(self, workers: int, kill: bool) -> None:
        """Begin or go on with the run, to its end or until there are some more checkpoints."""
        before = self._checkpoints()
        begun_at = step_of(before)
        recorded = self._metrics(until=begun_at)

        def enough() -> bool:
            return len(set(self._checkpoints()) - set(before)) >= CHECKPOINTS_BEFORE_KILL

        name = f"train, {workers} worker{'s' * (workers > 1)}, {'SIGKILL' if kill else 'to the end'}"
        killed = self._phase(name, self._training(workers), until=enough if kill else None)
        assert killed == kill, f"{name}: ended before it could be killed"
        # The lines hold times that were measured: were they written anew, they would differ.
        assert self._metrics(until=begun_at) == recorded, f"{name}: did not go on from step {begun_at}"
        self.phases[-1].facts = {"from_step": begun_at, "to_step": step_of(self._checkpoints())}
        if not kill:
            self.phases[-1].facts |= {"validation": self._metrics()[-1]}

    def _compare_rows(self) -> None:
        result = self.folder / "rows.json"
        arguments = ["--run", self.run_folder, "--dataset", self.dataset, "--json", result]
        self._phase("compare exported rows", ["benchmarks.exported_rows", *arguments])
        self.phases[-1].facts = json.loads(result.read_text())

    def _training(self, workers: int) -> list[Any]:
        settings = {
            "threads_per_worker": max(1, 2 // workers),
            "checkpoint_every_steps": self.size.checkpoint_every_steps,
            "model.width": 64,
            "model.members": 1,
            "model.similarity": "dot",
            "model.dropout": 0.1,
            "item_table.placement": "sharded",
            "item_table.optimizer": "adagrad",
            "loss.kind": "sampled",
            "loss.negatives": self.size.negatives,
            "data.tokens_per_batch": self.size.tokens_per_batch,
            "data.lanes": 6,  # a multiple of each number of workers
            "pretrain.max_epochs": 1,
            "pretrain.optimizer.table_learning_rate": 0.05,
            "validation.max_users": 500,  # a rank among all items is a scan of the whole table
        }
        command = ["ray_jobs.cli", "train", "--dataset", self.dataset, "--output", self.run_folder]
        command += ["--workers", workers, "--stages", "pretrain", "--set"]
        return [*command, *(f"{key}={value}" for key, value in settings.items())]

    def _phase(self, name: str, module: Sequence[Any], until: Callable[[], bool] | None = None) -> bool:
        """Run a module to its end or, with ``until``, kill it and all below it once that holds: True then."""
        typer.echo(f"{name} ...", err=True)
        output = self.folder / "output.txt"
        started = time.monotonic()
        with PeakMemory() as memory, output.open("wb") as stream:
            command = [sys.executable, "-m", *map(str, module)]
            process = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, cwd=REPOSITORY)
            killed = False
            while process.poll() is None and not killed:
                time.sleep(SECONDS_BETWEEN_LOOKS)
                killed = until is not None and until()
            kill_descendants()  # also what of Ray outlives its driver
            process.wait()
        if process.returncode and not killed:
            last = "\n".join(output.read_text().splitlines()[-LINES_SHOWN:])
            raise SystemExit(f"{name}: exit status {process.returncode}\n{last}")
        self.phases.append(Phase(name, time.monotonic() - started, memory.bytes / GIB))
        return killed

    def _checkpoints(self) -> list[str]:
        return checkpoint.finished(str(self.run_folder))

    def _metrics(self, until: float = float("inf")) -> list[dict[str, Any]]:
        file = self.run_folder / METRICS_FILE
        lines = file.read_text().splitlines() if file.exists() else []
        # What a checkpoint has cost is noted when the next one begins: a killed run may not have come to it.
        return [
            line for line in map(json.loads, lines) if line["step"] <= until and line["kind"] != "checkpoint"
        ]


def step_of(checkpoints: Sequence[str]) -> int:
    """The optimizer steps of the newest of some checkpoints; 0 if there are none."""
    return max((int(name.split("-")[1]) for name in checkpoints), default=0)


def show(phases: Sequence[Phase]) -> None:
    rows = []
    for phase in phases:
        first, last = phase.facts.get("from_step"), phase.facts.get("to_step")
        steps = "" if last is None else f"{first:,} to {last:,}"
        rows.append((phase.name, f"{phase.seconds:.0f}", f"{phase.peak_memory_gib:.1f}", steps))
    print_table("From the log to the model", ("phase", "seconds", "peak memory, GiB", "steps"), rows)


def main(
    json_file: Annotated[Path, typer.Option("--json", help="File to write the result to.")],
    items: Annotated[int, typer.Option(help="Items in the log.")] = Size.items,
    keep: Annotated[bool, typer.Option("--keep", help="Leave log, dataset and run where they are.")] = False,
) -> None:
    """Show that one machine trains, resumes and exports a very large catalogue within 20 GiB of memory."""
    adopt_orphans()
    folder = Path(tempfile.mkdtemp(prefix="large_catalogue_"))
    try:
        phases = Benchmark(folder, Size(items)).run()
    finally:
        kill_descendants()
        if keep:
            typer.echo(f"kept: {folder}", err=True)
        else:
            shutil.rmtree(folder)
    show(phases)
    result = {"machine": machine(), "items": items, "phases": [asdict(phase) for phase in phases]}
    write_json(json_file, result)
    if max(phase.peak_memory_gib for phase in phases) > LIMIT_GIB:
        raise SystemExit(f"more than {LIMIT_GIB:.0f} GiB")


if __name__ == "__main__":
    typer.run(main)
