"""Writing checkpoints beside the training: a copy is taken, the step goes on, a thread writes."""

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType

import torch

from recgpt.distributed import collectives
from recgpt.training import checkpoint
from recgpt.training.checkpoint import Snapshot

# The training's own collectives find out about a rank that hangs, and much sooner: see ``_finish``.
_LONGEST_WRITE = timedelta(hours=2)
_SECONDS_BETWEEN_SIGNS = 1.0
_PATIENCE_AFTER_AN_ERROR = 10.0  # seconds for the checkpoint that is being written


@dataclass
class Written:
    """What a checkpoint cost."""

    name: str
    bytes: int
    """Of all files."""
    pause_seconds: float
    """How long training stood still on this rank."""
    write_seconds: float
    """From the copy to the manifest."""


class CheckpointWriter:
    """Writes one checkpoint at a time, and then removes those that are no longer needed.

    Collective: every rank has one and calls the same methods in the same order. Open it with ``with``.

    Args:
        needed: the checkpoints to keep, once one is written and its files are there with their sizes;
            asked for on rank 0.
        check_may_write: raises on rank 0 if another process has taken over the run.
        in_background: training goes on while the files are written, which takes a second copy of this
            rank's part of the state in host memory.
        device: where the training's collectives take their tensors from.
    """

    def __init__(
        self,
        run: str,
        needed: Callable[[], set[str]],
        check_may_write: Callable[[], None],
        in_background: bool,
        device: torch.device | None = None,
    ):
        self._run = run
        self._needed = needed
        self._check_may_write = check_may_write
        self._in_background = in_background
        self._device = device
        # The thread's collectives must not meet those of the training.
        self._group = collectives.side_group(_LONGEST_WRITE)
        self._writing: Future[Written] | None = None

    def __enter__(self) -> "CheckpointWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif self._writing:
            # Another rank may be lost, and with it the end of the writing; what is not whole is not loaded.
            with contextlib.suppress(Exception):
                self._writing.exception(_PATIENCE_AFTER_AN_ERROR)

    def save(self, take: Callable[[], Snapshot]) -> Written | None:
        """Write what ``take()`` gives; returns what the checkpoint before has cost, if there was one.

        Raises what the checkpoint before could not be written for.
        """
        begun = time.monotonic()
        before = self.wait()
        snapshot = take()
        if self._in_background:
            _copy_tables(snapshot)
        pause = time.monotonic() - begun
        self._writing = Future()
        # A daemon: a process that has failed must not wait for it.
        thread = threading.Thread(target=self._run_write, args=(snapshot, pause, self._writing), daemon=True)
        thread.start()
        if not self._in_background:
            self._finish(self._writing)
        return before

    def wait(self) -> Written | None:
        """Until the last checkpoint is written. Raises what it could not be written for."""
        writing = self._writing
        if writing is None:
            return None
        self._finish(writing)
        self._writing = None
        return writing.result()

    def _finish(self, writing: "Future[Written]") -> None:
        """Until the writing has ended, well or not, on all ranks.

        They tell each other that they wait, in a collective of the training: a store may be slow for as long
        as it is, but a process that stands still while its thread writes is found out as one that stands
        still in a step is. (A thread that alone hangs in a call to the store is given ``_LONGEST_WRITE``.)
        """
        busy = torch.ones((), device=self._device)
        while busy:
            wait_for([writing], _SECONDS_BETWEEN_SIGNS)
            busy = collectives.sum_over_ranks(torch.full_like(busy, not writing.done()))

    def _run_write(self, snapshot: Snapshot, pause: float, writing: "Future[Written]") -> None:
        try:
            writing.set_result(self._write(snapshot, pause))
        except BaseException as error:
            writing.set_exception(error)

    def _write(self, snapshot: Snapshot, pause: float) -> Written:
        begun = time.monotonic()
        manifest = checkpoint.write(self._run, snapshot, self._group, self._check_may_write)
        seconds = time.monotonic() - begun
        collectives.on_every_rank(self._remove_old, self._group)
        size = sum(entry.bytes for entry in manifest.files)
        if not self._in_background:
            pause += seconds
        return Written(snapshot.name, size, pause, seconds)

    def _remove_old(self) -> None:
        if collectives.rank() == 0:
            checkpoint.keep_only(self._run, self._needed())


def _copy_tables(snapshot: Snapshot) -> None:
    """To host memory: the next step changes the rows in place."""
    for part in snapshot.tables.values():
        for name, tensor in part.tensors.items():
            part.tensors[name] = torch.empty_like(tensor, device="cpu").copy_(tensor)
