"""What a machine has of what RecGPT needs: findings, each with what to do about it. Starts nothing."""

import os
import re
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from recgpt import storage
from recgpt.errors import UserError

GIGABYTE = 10**9
SHARED_MEMORY_WANTED = 2 * GIGABYTE  # bytes; Ray's object store lies there
MEMORY_WANTED = 8 * GIGABYTE
DISK_WANTED = 10 * GIGABYTE
OLDEST_GPU = (8, 0)  # compute capability from which the kernel for packed histories runs

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: State
    """`note`: works, but not as well as it could. `problem`: something will fail."""
    seen: str
    advice: str = ""
    """What to do; empty if all is well."""


def look(storage_url: str | None = None) -> Iterator[Finding]:
    """Look at this machine, and at a folder of an object store if one is given."""
    yield from _versions()
    yield _processors()
    yield _memory()
    yield _room("shared memory", "/dev/shm", SHARED_MEMORY_WANTED, "give the container more (--shm-size=8g)")
    temporary = os.environ.get("RAY_TMPDIR", "/tmp")
    yield _room("room for Ray's files", temporary, DISK_WANTED, "free some, or set RAY_TMPDIR")
    yield _port()
    yield _gpu()
    if storage_url is not None:
        yield _store(storage_url)


def _versions() -> Iterator[Finding]:
    """Every package that RecGPT requires, in a version that it knows."""
    python = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", "ok", python)
    for text in metadata.requires("recgpt") or []:
        if "extra ==" in text:
            continue
        name, ranges = _requirement(text)
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield Finding(name, "problem", "not installed", f"pip install '{text}'")
            continue
        if all(_holds(version, sign, bound) for sign, bound in ranges):
            yield Finding(name, "ok", version)
        else:
            yield Finding(name, "problem", version, f"pip install '{text}'")


def _requirement(text: str) -> tuple[str, list[tuple[str, str]]]:
    """Name and bounds of a requirement as RecGPT's own are written: ``name[extra]>=1.2,<3``."""
    name = re.match(r"[\w.-]+", text)
    assert name, text
    return name[0], re.findall(r"(>=|<)\s*([\d.]+)", text)


def _holds(version: str, sign: str, bound: str) -> bool:
    numbers, limit = (tuple(map(int, re.findall(r"\d+", one)[:3])) for one in (version, bound))
    return numbers >= limit if sign == ">=" else numbers < limit


def _processors() -> Finding:
    number = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if number < 2:
        advice = "two are the least for a training worker and what feeds it"
        return Finding("processors", "note", str(number), advice)
    return Finding("processors", "ok", str(number))


def _memory() -> Finding:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    seen = f"{total / GIGABYTE:.0f} GB, {free / GIGABYTE:.0f} GB unused"
    if total < MEMORY_WANTED:
        return Finding("memory", "note", seen, "Ray and two workers take some 6 GB before any data")
    return Finding("memory", "ok", seen)


def _room(what: str, folder: str, wanted: int, advice: str) -> Finding:
    if not Path(folder).is_dir():
        return Finding(what, "problem", f"{folder} is no folder", advice)
    free = shutil.disk_usage(folder).free
    seen = f"{folder}: {free / GIGABYTE:.1f} GB free"
    return Finding(what, "ok", seen) if free >= wanted else Finding(what, "note", seen, advice)


def _port() -> Finding:
    """Whether a server can listen on this machine alone, as Ray's and the workers' do."""
    try:
        with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
            return Finding("ports on 127.0.0.1", "ok", "can be opened and reached")
    except OSError as error:
        advice = "allow connections of the machine to itself in its firewall"
        return Finding("ports on 127.0.0.1", "problem", str(error), advice)


def _gpu() -> Finding:
    import torch

    if not torch.cuda.is_available():
        return Finding("GPU", "note", "none that torch can use", "training and recall run on CPUs, with gloo")
    names = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    seen = f"{', '.join(names)}; CUDA {torch.version.cuda}"
    oldest = min(torch.cuda.get_device_capability(number) for number in range(len(names)))
    if not torch.distributed.is_nccl_available():
        return Finding("GPU", "problem", f"{seen}, no NCCL", "install a torch that is built with NCCL")
    if oldest < OLDEST_GPU:
        return Finding(
            "GPU", "note", seen, "attention over packed histories needs an Ampere GPU or a newer one"
        )
    return Finding("GPU", "ok", seen)


def _store(url: str) -> Finding:
    """Write, read and remove one small file."""
    file = storage.join(url, f".recgpt-doctor-{os.getpid()}")
    what = f"store {url}"
    advice = "check the address, AWS_ENDPOINT_URL, and that the credentials may read, write and delete there"

    def round_trip() -> bool:
        storage.write_bytes(file, b"recgpt")
        same = storage.read_bytes(file) == b"recgpt"
        storage.remove(file)
        return same

    return _tried(what, round_trip, "a file was written, read and removed", advice)


def _tried(what: str, attempt: Callable[[], bool], seen: str, advice: str) -> Finding:
    try:
        if attempt():
            return Finding(what, "ok", seen)
        return Finding(what, "problem", "what was written came back as something else", advice)
    except UserError as error:
        return Finding(what, "problem", str(error), advice)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        return Finding(what, "problem", f"{type(error).__name__}: {text}", advice)
