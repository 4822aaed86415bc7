"""Trains and generates while workers, actors, drivers and the object store fail: nothing may be lost.

    python -m benchmarks.chaos --minutes 30 --seed 0 --json chaos.json

First comes an undisturbed run on a made-up log: prepare, train on two workers, generate with two actors,
evaluate. Then round after round does the same into a fresh folder, in turns on the local disk and in an
object store, while faults are injected; a command that ended with anything but 0 is started again as it
was. At its end a round must have made the same model, candidates and figures, to the last bit, and left no
process and no file that it should not. The seed decides which faults come when. Linux only.
"""

import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer

from benchmarks.chaos_checks import COMPARED, Leftovers, Outcome, find_leftovers
from benchmarks.chaos_faults import KINDS, plan
from benchmarks.chaos_places import DISK, STORE, Place, Places, open_places
from benchmarks.chaos_rounds import Injected, Lost, Notes, Round, Task
from benchmarks.common import machine, print_table, write_json
from benchmarks.process_tree import adopt_orphans, kill_descendants
from recgpt import storage
from recgpt.data.synthetic import SyntheticSettings, write_log
from recgpt.errors import UserError

UNDISTURBED = "undisturbed"
SETTINGS = """
model: {{width: 16, layers: 1, heads: 1, members: 1, max_history: 12}}
data: {{tokens_per_batch: {tokens_per_batch}, lanes: 4}}
item_table: {{placement: sharded}}
pretrain: {{max_epochs: {epochs}}}
prompt_tune: {{max_epochs: 1}}
validation: {{max_users: 2000}}
checkpoint_every_steps: {checkpoint_every_steps}
collective_timeout_seconds: 8
"""


@dataclass(frozen=True)
class Size:
    """How long the commands take, and how much happens to them; see ``TrainSettings``."""

    users: int = 100_000
    items: int = 1000
    mean_length: int = 6
    tokens_per_batch: int = 4096
    epochs: int = 3
    checkpoint_every_steps: int = 10
    recall_options: tuple[str, ...] = ("--k", "100", "--quotas", "30,10,10,10,10,10,10,10")
    places: tuple[str, ...] = (DISK, STORE)
    """Of the rounds, in turns."""
    evaluates: bool = True
    """Whether candidates are evaluated; the same model gives the same figures."""
    training_faults: int = 5
    recall_faults: int = 3


@dataclass
class RoundResult:
    """What a round took, and what came of it."""

    place: str
    faults: int
    starts: int
    """Of commands, those that look at the results among them."""
    seconds: float
    same: dict[str, bool]
    """As the undisturbed run, by what was compared; empty if the round did not end."""
    leftovers: Leftovers | None
    processes_left: list[str]


class Chaos:
    """The undisturbed run, and rounds that are compared with it; all lies in ``folder``."""

    def __init__(self, folder: Path, places: Places, seed: int, size: Size):
        self.folder = folder
        self.places = places
        self.seed = seed
        self.size = size
        self.notes = Notes()
        self.results: list[RoundResult] = []
        self.settings = folder / "settings.yaml"
        self.dataset = str(folder / "dataset")

    def run(self, minutes: float) -> None:
        undisturbed = self._undisturbed()
        deadline = time.monotonic() + 60 * minutes
        number = 0
        while not number or time.monotonic() < deadline:
            self._round(number, undisturbed)
            number += 1

    def _undisturbed(self) -> Outcome:
        size = self.size
        log = str(self.folder / "log")
        write_log(SyntheticSettings(size.users, size.items, mean_length=size.mean_length), log)
        self.settings.write_text(SETTINGS.format(**asdict(size)))
        first = self._new_round(-1, DISK, self.places.make(DISK, UNDISTURBED))
        self.notes.say("undisturbed: prepare, train, generate, evaluate")
        first.run_quietly("prepare", ["--input", log, "--output", self.dataset])
        for task in self._tasks(first, self.dataset, None):
            first.run_quietly(task.verb, task.arguments)
        self._look_at(first, self.dataset)
        outcome = Outcome.of(first.place.url)
        self.notes.say(f"undisturbed: {outcome.steps} steps, {len(outcome.candidates)} parts")
        return outcome

    def _round(self, number: int, undisturbed: Outcome) -> None:
        kind = self.size.places[number % len(self.size.places)]
        place = self.places.make(kind, f"round-{number}")
        this = self._new_round(number, kind, place)
        dataset = self._dataset_at(kind)
        begun = time.monotonic()
        same: dict[str, bool] = {}
        leftovers = None
        try:
            for task, faults in zip(
                self._tasks(this, dataset, undisturbed),
                (self.size.training_faults, self.size.recall_faults),
                strict=True,
            ):
                this.disturb(task, plan(self.seed, number, task.verb, kind == STORE, faults))
                this.check_finished(task)
            self._heal()
            self._look_at(this, dataset)
            same = Outcome.of(place.url).compare(undisturbed)
            leftovers = find_leftovers(place.url)
        except (Lost, UserError) as lost:
            self.notes.problem(f"round {number} ({kind}): {lost}")
        self._heal()
        left = this.wait_for_the_end()
        faults_done = sum(fault.round == number for fault in self.notes.injected)
        seconds = time.monotonic() - begun
        result = RoundResult(kind, faults_done, this.starts, seconds, same, leftovers, left)
        self.results.append(result)
        self._judge(number, result)
        if same and all(same.values()):
            storage.remove(place.url)

    def _judge(self, number: int, result: RoundResult) -> None:
        where = f"round {number} ({result.place})"
        for name in [name for name, same in result.same.items() if not same]:
            self.notes.problem(f"{where}: another {name} than undisturbed")
        if result.leftovers and result.leftovers.unexpected:
            self.notes.problem(f"{where}: left {', '.join(result.leftovers.unexpected[:5])}")
        if result.processes_left:
            self.notes.problem(f"{where}: left running: {', '.join(result.processes_left)}")
        self.notes.say(f"{where}: ended after {result.seconds:.0f} s and {result.faults} faults")

    def _tasks(self, this: Round, dataset: str, undisturbed: Outcome | None) -> list[Task]:
        steps, parts = (undisturbed.steps, len(undisturbed.candidates)) if undisturbed else (1, 1)
        options = list(self.size.recall_options)
        return [this.training(dataset, self.settings, steps), this.recall(dataset, options, parts)]

    def _look_at(self, this: Round, dataset: str) -> None:
        this.verify_candidates(dataset)
        if self.size.evaluates:
            this.evaluate(dataset)

    def _new_round(self, number: int, kind: str, place: Place) -> Round:
        return Round(number, kind, place, self.notes, self.folder / "output.txt")

    def _dataset_at(self, kind: str) -> str:
        """The dataset, where the commands of a round read it: the same files."""
        if kind == DISK:
            return self.dataset
        url = self.places.make(STORE, "dataset").url
        if storage.is_empty(url):
            for path in Path(self.dataset).rglob("*"):
                if path.is_file():
                    name = str(path.relative_to(self.dataset))
                    storage.write_bytes(storage.join(url, name), path.read_bytes())
        return url

    def _heal(self) -> None:
        self.places.proxy.heal()


def fault_rows(injected: list[Injected]) -> list[dict[str, Any]]:
    """A row for each kind of fault, and one for all."""
    rows = []
    kinds = [kind for kind in KINDS if any(fault.kind == kind for fault in injected)]
    for name in [*kinds, "all"]:
        of_kind = [fault for fault in injected if name in (fault.kind, "all")]
        seconds = [fault.seconds for fault in of_kind if fault.seconds is not None]
        by_itself = sum(fault.by_itself and fault.seconds is not None for fault in of_kind)
        rows.append(
            {
                "fault": name,
                "injected": len(of_kind),
                "by_itself": by_itself,
                "by_the_same_command": len(seconds) - by_itself,
                "lost": len(of_kind) - len(seconds),
                "median_seconds": median(seconds) if seconds else None,
                "longest_seconds": max(seconds, default=None),
            }
        )
    return rows


def show(chaos: Chaos) -> None:
    rows = []
    for row in fault_rows(chaos.notes.injected):
        name, *counts, middle, longest = row.values()
        rows.append((name, *map(str, counts), _whole(middle), _whole(longest)))
    columns = ("fault", "injected", "by itself", "by command", "lost", "seconds", "at most")
    note = (
        "by itself, by command: how the command went on, alone or started again as it was\n"
        "seconds: until it was further than before the fault, median and most"
    )
    print_table(f"Faults, seed {chaos.seed}", columns, rows, note)
    rounds = [(str(number), *_cells(result)) for number, result in enumerate(chaos.results)]
    columns_of_rounds = (
        "round", "place", "faults", "starts", "seconds", "same", "temporary", "other", "running",
    )  # fmt: skip
    note = (
        f"same: of the {COMPARED} results that are compared with the undisturbed run's, to the last bit\n"
        "starts: of commands; temporary: files and unfinished checkpoints for the cleaner\n"
        "other: files that nobody would remove; running: processes left behind"
    )
    print_table("Rounds", columns_of_rounds, rounds, note)


def _whole(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def _cells(result: RoundResult) -> tuple[str, ...]:
    left = result.leftovers or Leftovers(0, 0, [])
    return (
        result.place,
        str(result.faults),
        str(result.starts),
        _whole(result.seconds),
        f"{sum(result.same.values())} of {COMPARED}",
        str(left.temporary + left.unfinished_checkpoints),
        str(len(left.unexpected)),
        str(len(result.processes_left)),
    )


def figures(chaos: Chaos) -> dict[str, Any]:
    return {
        "machine": machine(),
        "seed": chaos.seed,
        "size": asdict(chaos.size),
        "faults": fault_rows(chaos.notes.injected),
        "rounds": [asdict(result) for result in chaos.results],
        "injected": [asdict(fault) for fault in chaos.notes.injected],
        "problems": chaos.notes.problems,
    }


def run_chaos(minutes: float, seed: int, size: Size, keep: bool = False) -> Chaos:
    """Everything that it starts has ended when it returns."""
    adopt_orphans()
    folder = Path(tempfile.mkdtemp(prefix="chaos_"))
    try:
        with open_places(folder) as places:
            chaos = Chaos(folder, places, seed, size)
            chaos.run(minutes)
    finally:
        kill_descendants()
        if keep:
            typer.echo(f"kept: {folder}", err=True)
        else:
            shutil.rmtree(folder)
    return chaos


def main(
    minutes: Annotated[float, typer.Option(help="No round begins later.")] = 30.0,
    seed: Annotated[int, typer.Option(help="Decides which faults come when.")] = 0,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the figures to.")] = None,
    keep: Annotated[bool, typer.Option("--keep", help="Leave all files where they are.")] = False,
) -> None:
    """Show that nothing is lost, whatever fails."""
    chaos = run_chaos(minutes, seed, Size(), keep)
    show(chaos)
    if json_file:
        write_json(json_file, figures(chaos))
    if chaos.notes.problems:
        print(f"\n{len(chaos.notes.problems)} problems:", *chaos.notes.problems, sep="\n")
        raise SystemExit(1)
    print(f"\n{len(chaos.notes.injected)} faults in {len(chaos.results)} rounds, nothing lost")


if __name__ == "__main__":
    typer.run(main)
