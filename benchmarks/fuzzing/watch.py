"""A process that reads what is hostile, under watch: bounded memory and time, and no code from data.

What Python itself reports (audit events) shows a reader that unpickles, starts a process, connects to
somewhere or opens a file that its input must not lead to.
"""

import contextlib
import multiprocessing
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
GIB = 2**30

_FORBIDDEN = {
    "pickle.find_class",
    "os.system",
    "subprocess.Popen",
    "os.posix_spawn",
    "os.exec",
    "socket.connect",
}


@dataclass
class Witness:
    """What a process does that no reader may do; nothing in ``forbidden_folder`` may be opened."""

    forbidden_folder: str = ""
    seen: list[str] = field(default_factory=list)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _FORBIDDEN:
            self.seen.append(f"{event} {arguments!r}"[:200])
        elif event == "open" and isinstance(arguments[0], str):
            path = arguments[0]
            if path == "/etc/passwd" or (self.forbidden_folder and path.startswith(self.forbidden_folder)):
                self.seen.append(f"open {path}")


def watch() -> Witness:
    """Watch this process from now on."""
    witness = Witness()
    sys.addaudithook(witness)
    return witness


def limit_memory(further: int) -> None:
    """This process may take so many bytes of addresses more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + further
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


class WatchedPool(Generic[Task]):
    """Processes that work on tasks; one that hangs or dies is replaced, and its task has that as result.

    Args:
        make_work: called in each new process; gives the function that works on a task.
        seconds: of computing (or ten times as long waiting), after which a task counts as hanging: how busy
            the machine is makes no difference.
    """

    def __init__(self, processes: int, make_work: Callable[[], Callable[[Task], Any]], seconds: float):
        self._make_work = make_work
        self._seconds = seconds
        self._workers = [self._start() for _ in range(processes)]

    def run(self, tasks: Iterator[Task], failed: Callable[[Task, str], Any]) -> Iterator[Any]:
        """The results of all tasks as they come; ``failed(task, reason)`` for those without one."""
        busy: dict[Connection, tuple[Task, float, float]] = {}
        for worker in self._workers:
            self._give(worker, tasks, busy)
        while busy:
            wait(list(busy), timeout=0.5)
            for worker in [one for one in self._workers if one.connection in busy]:
                task, deadline, cpu_deadline = busy[worker.connection]
                reason = None
                try:
                    if worker.connection.poll():
                        yield worker.connection.recv()
                    elif time.monotonic() > deadline or worker.cpu_seconds() > cpu_deadline:
                        reason = f"no end within {self._seconds:g} seconds"
                    else:
                        continue
                except EOFError:
                    worker.process.join()
                    reason = f"the process died (exit code {worker.process.exitcode})"
                del busy[worker.connection]
                if reason is not None:
                    yield failed(task, reason)
                    worker.stop()
                    self._workers.remove(worker)
                    worker = self._start()
                    self._workers.append(worker)
                self._give(worker, tasks, busy)
        for worker in self._workers:
            worker.stop()

    def _give(
        self, worker: "_Worker", tasks: Iterator[Task], busy: dict[Connection, tuple[Task, float, float]]
    ) -> None:
        task = next(tasks, None)
        if task is not None:
            deadlines = time.monotonic() + 10 * self._seconds, worker.cpu_seconds() + self._seconds
            worker.connection.send(task)
            busy[worker.connection] = (task, *deadlines)

    def _start(self) -> "_Worker":
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(
            target=_work, args=(there, here, self._make_work), daemon=True
        )
        process.start()
        there.close()
        return _Worker(process, here)


@dataclass
class _Worker:
    process: Any
    connection: Connection

    def cpu_seconds(self) -> float:
        """What it has computed so far; 0 once it has ended."""
        with contextlib.suppress(OSError, IndexError):
            times = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            return sum(map(int, times)) / os.sysconf("SC_CLK_TCK")
        return 0.0

    def stop(self) -> None:
        self.connection.close()
        self.process.kill()
        self.process.join()


def _work(
    connection: Connection, other_end: Connection, make_work: Callable[[], Callable[[Any], Any]]
) -> None:
    other_end.close()  # or the end of the pool would never show here
    work = make_work()
    while True:
        try:
            task = connection.recv()
        except EOFError:
            return
        connection.send(work(task))
