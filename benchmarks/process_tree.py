"""All processes below this one: their memory together, and their end. Linux only."""

import ctypes
import os
import signal
import threading
import time
from pathlib import Path
from types import TracebackType

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
SECONDS_BETWEEN_SAMPLES = 1.0
SECONDS_TO_DIE = 30.0


def adopt_orphans() -> None:
    """From now on a process below this one whose parent has ended becomes a child of this one.

    Without it such processes (Ray's, when their driver is killed) go to the system's first process,
    and ``descendants`` misses them.
    """
    status = ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    assert status == 0, os.strerror(ctypes.get_errno())


def descendants() -> list[int]:
    """Ids of the running processes below this one."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            # pid (name) state parent ...; the name may hold anything
            state, parent, *_ = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has ended since
        if state != "Z":
            children.setdefault(int(parent), []).append(int(stat.parent.name))
    found = [os.getpid()]
    for process in found:  # grows while it is gone through
        found += children.get(process, [])
    return found[1:]


def memory_of(process: int) -> int:
    """Bytes that a process holds of its own and in shared memory; 0 if it has ended.

    Pages shared by n processes count 1/n in each (proportional set size). Pages of mapped files, such as
    libraries, are left out: the system drops and rereads them, and their share would grow in one process
    whenever another one that maps the same library ends, be it below this one or not.
    """
    try:
        lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))


def kill_descendants() -> None:
    """SIGKILL to all of them, until none is left."""
    deadline = time.monotonic() + SECONDS_TO_DIE
    while processes := descendants():
        assert time.monotonic() < deadline, f"processes {processes} do not end"
        for process in processes:
            try:
                os.kill(process, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


class PeakMemory:
    """While it is open, a thread samples the memory of all descendants together."""

    def __init__(self) -> None:
        self.samples: list[tuple[float, int]] = []
        """Time by the system's monotonic clock, bytes."""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()

    @property
    def bytes(self) -> int:
        """The most that was seen."""
        return max((size for _, size in self.samples), default=0)

    def _watch(self) -> None:
        while not self._done.wait(SECONDS_BETWEEN_SAMPLES):
            self.samples.append((time.monotonic(), sum(map(memory_of, descendants()))))
