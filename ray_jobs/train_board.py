"""What the training workers and the driver of `recgpt train` tell each other, over a small actor."""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from ray_jobs.train_gauges import TrainGauges
from recgpt.progress import is_quiet, progress_bar

SECONDS_BETWEEN_LOOKS = 1.0
SECONDS_BETWEEN_SIGNS = 2.0
SECONDS_OF_SILENCE = 6.0  # after which a worker counts as one that hangs
MOST_LINES = 10_000  # kept for a driver that does not take them


class TrainBoard:
    """An actor: lines for the driver to show, signs of life of the workers, and the wish to stop.

    ``run``: the name under which Ray's metrics show the figures.
    """

    def __init__(self, run: str) -> None:
        self._gauges = TrainGauges(run)
        self._lines: list[dict[str, Any]] = []
        self._signs: dict[int, tuple[float, str, str]] = {}  # by rank: when, who, where in the training
        self._stop_wanted = False
        self._results: dict[str, Any] = {}
        self._stopped: str | None = None
        self._verdict: str | None = None

    def show(self, line: dict[str, Any]) -> None:
        self._lines = [*self._lines, line][-MOST_LINES:]
        self._gauges.show(line)

    def take_lines(self) -> list[dict[str, Any]]:
        lines, self._lines = self._lines, []
        return lines

    def begin(self, num_workers: int) -> str | None:
        """A group of workers starts; returns why it must not train, if that has been found."""
        self._signs = {rank: sign for rank, sign in self._signs.items() if rank < num_workers}
        return self._verdict

    def sign(self, rank: int, who: str, where: str) -> bool:
        """A worker is alive; tells it whether to stop."""
        self._signs[rank] = time.monotonic(), who, where
        return self._stop_wanted

    def stop(self) -> None:
        """From now on workers are told to stop."""
        self._stop_wanted = True

    def condemn(self, verdict: str) -> None:
        """To start the workers again would be of no use: what is wrong is for the user to put right."""
        self._verdict = self._verdict or verdict

    def finish(self, results: dict[str, Any] | None, stopped: str | None) -> None:
        """How training ended on the first worker."""
        self._results, self._stopped = results or {}, stopped

    def outcome(self) -> tuple[dict[str, Any], str | None, str | None]:
        """Results by stage; how it was stopped, if it was; what is for the user to put right."""
        return self._results, self._stopped, self._verdict

    def waited_in_vain(self, rank: int, where: str) -> None:
        """A worker gave up waiting for the others: say for whom."""
        now = time.monotonic()
        silent = [
            f"worker {other} ({who}) has given no sign for {now - when:.0f} s, since {place}"
            for other, (when, who, place) in sorted(self._signs.items())
            if other != rank and now - when > SECONDS_OF_SILENCE
        ]
        behind = [
            f"worker {other} ({who}) was last heard of at {place}"
            for other, (_, who, place) in sorted(self._signs.items())
            if other != rank and place != where
        ]
        # With a short time-out all may be at the same place, and nobody silent for long enough.
        longest = [
            f"worker {other} ({who}) was last heard of {now - when:.0f} s ago"
            for when, other, who in sorted(
                (when, other, who) for other, (when, who, _) in self._signs.items() if other != rank
            )
        ][:1]
        others = "; ".join(silent or behind or longest)
        self.show(
            {"kind": "warning", "text": f"worker {rank} waited in vain for the others at {where}: {others}"}
        )


class SignsOfLife:
    """In a worker, a thread that reports to the board where the worker is, and hears whether to stop."""

    def __init__(self, board: Any, rank: int, where: Callable[[], str]):
        self._board = board
        self._rank = rank
        self._where = where
        self._who = f"process {os.getpid()} on {socket.gethostname()}"
        self._stop_wanted = False
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._report, daemon=True)

    def __enter__(self) -> "SignsOfLife":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()

    def stop_wanted(self) -> bool:
        return self._stop_wanted

    def _report(self) -> None:
        import ray

        while not self._done.wait(SECONDS_BETWEEN_SIGNS):
            self._stop_wanted = ray.get(self._board.sign.remote(self._rank, self._who, self._where()))


class LiveProgress:
    """While it is open, a thread draws a bar for the current epoch and a line for each validation.

    SIGTERM then makes the workers stop in good order; a second one ends the process at once.
    ``max_epochs``: by stage.
    """

    def __init__(self, board: Any, num_users: int, max_epochs: dict[str, int]):
        self._board = board
        self._num_users = num_users
        self._max_epochs = max_epochs
        self._done = threading.Event()
        self._stop_wanted = False
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._handler_before: Any = None

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._handler_before = signal.signal(signal.SIGTERM, self._want_stop)
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()
        if self._handler_before is not None:
            signal.signal(signal.SIGTERM, self._handler_before)

    def _want_stop(self, number: int, frame: FrameType | None) -> None:
        self._stop_wanted = True  # the thread does the rest: a handler must not wait
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _watch(self) -> None:
        import ray

        bar = _Bar(self._num_users, self._max_epochs)
        with contextlib.suppress(ray.exceptions.RayError):  # Ray is lost: the main thread hears of it too
            self._watch_board(bar)
        bar.close()

    def _watch_board(self, bar: "_Bar") -> None:
        import ray

        done = told = False
        while not done:
            done = self._done.wait(SECONDS_BETWEEN_LOOKS)
            if self._stop_wanted and not told:
                told = True
                self._board.stop.remote()
                bar.note("recgpt: stopping after this step, with a checkpoint")
            for line in ray.get(self._board.take_lines.remote()):
                bar.show(line)


class _Bar:
    """The bar of the current epoch, and lines above it."""

    def __init__(self, num_users: int, max_epochs: dict[str, int]):
        self._num_users = num_users
        self._max_epochs = max_epochs
        self._epoch: tuple[str, int] | None = None
        self._bar = progress_bar("train: starting workers", None, "user")

    def show(self, line: dict[str, Any]) -> None:
        shown: dict[str, Callable[[dict[str, Any]], None]] = {
            "train": self._advance,
            "validation": lambda line: self.note(validation_text(line)),
            "warning": lambda line: self._write(f"recgpt: warning: {line['text']}"),
        }
        if line["kind"] in shown:
            shown[line["kind"]](line)

    def _advance(self, line: dict[str, Any]) -> None:
        if self._epoch != (line["stage"], line["epoch"]):
            self._epoch = (line["stage"], line["epoch"])
            self._bar.close()
            title = f"{line['stage']} epoch {line['epoch'] + 1}/{self._max_epochs[line['stage']]}"
            self._bar = progress_bar(title, self._num_users, "user", passing=True)
        rate = f"{line['targets_per_second']:,.0f}"
        self._bar.set_postfix(
            {"step": line["step"], "loss": f"{line['loss']:.3f}", "targets/s": rate}, refresh=False
        )
        self._bar.update(line["users"] - self._bar.n)

    def note(self, text: str) -> None:
        if not is_quiet():
            self._write(text)

    def _write(self, text: str) -> None:
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()


def validation_text(line: dict[str, Any]) -> str:
    figures = " ".join(f"{key} {value:.4f}" for key, value in line.items() if "@" in key)
    return f"{line['stage']} after epoch {line['epoch']}, step {line['step']}: {figures}"
