"""One round of the chaos benchmark: train and recall into a fresh folder, disturbed by a plan of faults."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from json import JSONDecodeError
from pathlib import Path

from benchmarks.chaos_checks import CANDIDATES, EVALUATION, RUN
from benchmarks.chaos_faults import GENERATE, KINDS, STOP_WORKER, STOPPED, TRAIN, Fault, Scene
from benchmarks.chaos_places import Place
from benchmarks.chaos_processes import name_of, reap_orphans
from benchmarks.process_tree import descendants
from recgpt import storage
from recgpt.retrieval.candidate_job import RECEIPTS_FOLDER
from recgpt.schema import SUCCESS_FILE
from recgpt.training.run_folder import read_metrics

REPOSITORY = Path(__file__).parent.parent
SECONDS_BETWEEN_LOOKS = 0.3
SECONDS_WITHOUT_PROGRESS = 300.0  # after which a command counts as hanging
SECONDS_TO_END = 60.0  # for what a lost driver leaves running
MOST_STARTS = 30
LINES_SHOWN = 15  # of the output of a command that ended badly
RAY_SPEAKS = "(raylet)"  # in lines that Ray prints when it hears of something, be it after the command's last
TRACEBACK = "Traceback (most recent call last)"


@dataclass
class Injected:
    """A fault that was done, and what came of it."""

    round: int
    place: str
    verb: str
    kind: str
    detail: str
    at_seconds: float
    """Since the benchmark began."""
    at_progress: int
    """Steps of training or parts of candidates, and so is what is compared with it."""
    by_itself: bool = True
    """Whether the command went on without being started again."""
    seconds: float | None = None
    """Until more was done than before."""


@dataclass(frozen=True)
class Task:
    """A command, and how far it is."""

    verb: str
    arguments: list[str]
    progress: Callable[[], int]
    total: int


@dataclass
class Notes:
    """What is written down of all rounds."""

    injected: list[Injected] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    begun: float = field(default_factory=time.monotonic)

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self.begun:7.1f} s  {text}", flush=True)

    def problem(self, text: str) -> None:
        self.problems.append(text)
        self.say(f"PROBLEM: {text}")


class Lost(Exception):
    """A command that cannot be brought to its end."""


def steps_done(run: str) -> int:
    """The newest step that metrics.jsonl tells of; it is written with every checkpoint."""
    try:
        return max((line["step"] for line in read_metrics(run, until_step=10**12)), default=0)
    except (FileNotFoundError, JSONDecodeError):
        return 0


def parts_done(candidates: str, total: int) -> int:
    if storage.exists(storage.join(candidates, SUCCESS_FILE)):
        return total
    receipts = storage.join(storage.staging_folder(candidates), RECEIPTS_FOLDER)
    return len([name for name in storage.list_names(receipts) if name.endswith(".json")])


class Round:
    """Commands that are disturbed, and started again until they have ended well."""

    def __init__(self, number: int, kind: str, place: Place, notes: Notes, output: Path):
        self.number = number
        self.kind = kind
        self.place = place
        self.notes = notes
        self.output = output
        """Of the command that runs now: a file."""
        self.starts = 0
        self._stopped: list[int] = []  # processes that must not be left asleep

    def training(self, dataset: str, settings: Path, total: int) -> Task:
        run = storage.join(self.place.url, RUN)
        arguments = ["--dataset", dataset, "--output", run, "--config", str(settings), "--workers", "2"]
        return Task(TRAIN, arguments, lambda: steps_done(run), total)

    def recall(self, dataset: str, options: list[str], total: int) -> Task:
        run, candidates = (storage.join(self.place.url, name) for name in (RUN, CANDIDATES))
        arguments = ["--model", run, "--dataset", dataset, "--output", candidates, "--actors", "2", *options]
        return Task(GENERATE, arguments, lambda: parts_done(candidates, total), total)

    def disturb(self, task: Task, plan: list[Fault]) -> None:
        """Bring a command to its end in spite of the faults. Raises ``Lost`` if that is not to be done."""
        waiting = list(plan)
        for _ in range(MOST_STARTS):
            if self._run_once(task, waiting) == 0:
                break
        else:
            raise Lost(f"{task.verb} was started {MOST_STARTS} times")
        for fault in waiting:
            self.notes.say(f"{self._where(task)}: ended before: {fault.kind}")

    def check_finished(self, task: Task) -> None:
        """The same command once more says that it is finished."""
        self.run_quietly(task.verb, task.arguments)
        if "is finished already" not in self.output.read_text():
            self.notes.problem(f"{self._where(task)}: does not say that it is finished")

    def verify_candidates(self, dataset: str) -> None:
        candidates = storage.join(self.place.url, CANDIDATES)
        self.run_quietly("verify-candidates", [candidates, "--dataset", dataset])

    def evaluate(self, dataset: str) -> None:
        run, result = (storage.join(self.place.url, name) for name in (RUN, EVALUATION))
        options = ["--model", run, "--dataset", dataset, "--json", result, "--no-baselines"]
        self.run_quietly("evaluate", options)

    def run_quietly(self, verb: str, arguments: list[str]) -> None:
        """A command that nobody disturbs."""
        status = self._start(verb, arguments).wait()
        if status:
            self._report_bad_end(f"round {self.number}, {verb}", status)
            raise Lost(f"{verb} failed undisturbed")

    def wait_for_the_end(self) -> list[str]:
        """Names of processes that are still there some time after their driver."""
        for process in self._stopped:
            if process in descendants():
                os.kill(process, signal.SIGCONT)  # a stopped process cannot see that its driver is gone
        deadline = time.monotonic() + SECONDS_TO_END
        while (left := self._others()) and time.monotonic() < deadline:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            reap_orphans({self.place.server})
        return [name_of(pid) for pid in left]

    def _others(self) -> list[int]:
        return [pid for pid in descendants() if pid != self.place.server]

    def _start(self, verb: str, arguments: list[str]) -> "subprocess.Popen[bytes]":
        self.starts += 1
        call = [sys.executable, "-m", "ray_jobs.cli", verb, *arguments]
        with self.output.open("wb") as stream:
            return subprocess.Popen(
                call, stdout=stream, stderr=subprocess.STDOUT, cwd=REPOSITORY, env=self.place.environment
            )

    def _run_once(self, task: Task, waiting: list[Fault]) -> int:
        """Start the command, do to it what is due, and return its exit status."""
        driver = self._start(task.verb, task.arguments)
        scene = Scene(task.verb, driver, self.place, storage.join(self.place.url, RUN))
        done = task.progress()
        for fault in self._of_this_round(task):
            if fault.seconds is None:  # what was left of the driver may have gone on a little
                fault.at_progress = max(fault.at_progress, done)
        mine: list[Injected] = []
        last = moved = time.monotonic()
        while driver.poll() is None:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            reap_orphans({driver.pid, self.place.server})
            now = time.monotonic()
            if (progress := task.progress()) != done:
                done, moved = progress, now
            self._note_progress(task, done)
            if now - max(moved, last) > SECONDS_WITHOUT_PROGRESS:
                driver.kill()
                self._report_bad_end(f"{self._where(task)}: hangs", driver.wait())
                raise Lost(f"{task.verb} hangs")
            if waiting and self._is_due(waiting[0], scene, done / task.total, now - last):
                mine.append(self._inject(task, waiting.pop(0), scene, done))
                last = time.monotonic()
        return self._ended(task, driver.returncode, mine)

    def _is_due(self, fault: Fault, scene: Scene, share: float, seconds: float) -> bool:
        due = seconds >= fault.pause if fault.share is None else share >= fault.share
        return due and scene.driver.poll() is None and KINDS[fault.kind].possible(scene)

    def _inject(self, task: Task, fault: Fault, scene: Scene, done: int) -> Injected:
        seconds = time.monotonic() - self.notes.begun
        detail = KINDS[fault.kind].inject(scene, fault)
        if fault.kind == STOP_WORKER:
            self._stopped.append(int(detail.split()[-1]))
        self.notes.say(f"{self._where(task)} at {done} of {task.total}: {fault.kind} ({detail})")
        injected = Injected(self.number, self.kind, task.verb, fault.kind, detail, seconds, done)
        self.notes.injected.append(injected)
        return injected

    def _of_this_round(self, task: Task) -> list[Injected]:
        return [one for one in self.notes.injected if (one.round, one.verb) == (self.number, task.verb)]

    def _note_progress(self, task: Task, done: int) -> None:
        for fault in self._of_this_round(task):
            if fault.seconds is None and (done > fault.at_progress or done >= task.total):
                fault.seconds = time.monotonic() - self.notes.begun - fault.at_seconds

    def _ended(self, task: Task, status: int, mine: list[Injected]) -> int:
        text = self.output.read_text(errors="replace")
        expected = {0, *(status for fault in mine for status in KINDS[fault.kind].statuses)}
        faults = ", ".join(fault.kind for fault in mine) or "no fault"
        if status not in expected or TRACEBACK in text or not says_why(status, text):
            self._report_bad_end(f"{self._where(task)} after {faults}", status)
        if status == 0:
            self._note_progress(task, task.total)
            return 0
        for fault in mine:
            if KINDS[fault.kind].ends_command:
                fault.seconds = None  # until it goes on in earnest
        for fault in self._of_this_round(task):
            fault.by_itself &= fault.seconds is not None
        self.notes.say(f"{self._where(task)}: ended with {status}, started again")
        return status

    def _report_bad_end(self, where: str, status: int) -> None:
        lines = self.output.read_text(errors="replace").replace("\r", "\n").splitlines()
        shown = "\n".join(f"    {line[:200]}" for line in lines[-LINES_SHOWN:])
        self.notes.problem(f"{where}: exit status {status}\n{shown}")

    def _where(self, task: Task) -> str:
        return f"round {self.number} ({self.kind}), {task.verb}"


def says_why(status: int, text: str) -> bool:
    """Whether the last line tells what to do, where a command could still say something."""
    lines = text.replace("\r", "\n").strip().splitlines()
    last = [line for line in lines if RAY_SPEAKS not in line][-1:]
    if status == STOPPED:
        return "the same command goes on" in "".join(last)
    return status != 2 or "".join(last).startswith("recgpt: error:")
