"""Processes below this one: found by name, and reaped when their parents are gone."""

import os
from pathlib import Path

from benchmarks.process_tree import descendants


def name_of(pid: int) -> str:
    """What it was started as, or calls itself, as Ray's workers do; empty if it has ended."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def below(ancestor: int, name: str) -> list[int]:
    """Processes of this name below another one, ascending."""
    return sorted(pid for pid in descendants() if name in name_of(pid) and _is_below(pid, ancestor))


def _is_below(pid: int, ancestor: int) -> bool:
    while pid > 1 and pid != ancestor:
        pid = _state_and_parent(pid)[1]
    return pid == ancestor


def reap_orphans(spared: set[int]) -> None:
    """Take note of the ends of processes that were adopted; ``spared`` are those that are our own.

    Nobody else does, and as long as a process is a zombie, Ray's workers believe that it is alive.
    """
    for stat in Path("/proc").glob("[0-9]*/stat"):
        pid = int(stat.parent.name)
        if pid not in spared and _state_and_parent(pid) == ("Z", os.getpid()):
            os.waitpid(pid, os.WNOHANG)


def _state_and_parent(pid: int) -> tuple[str, int]:
    try:
        state, parent, *_ = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "", 0
    return state, int(parent)
