"""Progress with rate and ETA: one live bar on a terminal, a plain line now and then elsewhere; and notes.

All of it goes to stderr, and none of it is there with `--quiet`; results and errors do not go through here.
"""

import sys
from typing import TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0

_quiet = _verbose = False


def set_talk(*, quiet: bool = False, verbose: bool = False) -> None:
    """How much this process says from now on."""
    global _quiet, _verbose
    _quiet, _verbose = quiet, verbose


def is_quiet() -> bool:
    """Whether only results and errors are wanted."""
    return _quiet


def is_verbose() -> bool:
    """Whether what Ray and its workers say is wanted too."""
    return _verbose


def note(text: str) -> None:
    """A line that a person may want to know, on stderr."""
    if not _quiet:
        print(text, file=sys.stderr, flush=True)


def warn(text: str) -> None:
    """A line on something that may be wrong, on stderr, quiet or not."""
    print(f"recgpt: warning: {text}", file=sys.stderr, flush=True)


class _Lines:
    """A text stream on which tqdm's redraws become separate plain lines."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> None:
        line = text.replace("\r", "").strip()
        if line:
            self._stream.write(line + "\n")

    def flush(self) -> None:
        self._stream.flush()


def progress_bar(
    description: str, total: int | None, unit: str, *, initial: int = 0, passing: bool = False
) -> tqdm:
    """A tqdm bar on stderr; ``update(n)`` counts units, ``set_postfix(loss=...)`` adds figures.

    ``initial``: units that an earlier run has done; they do not count for the rate.
    ``passing``: one of many bars, such as one per epoch; it is wiped at its end on a terminal, and
    elsewhere it writes no line unless it lasts.
    """
    if _quiet or sys.stderr.isatty():
        return tqdm(
            disable=_quiet,
            desc=description,
            total=total,
            initial=initial,
            unit=unit,
            unit_scale=True,
            dynamic_ncols=True,
            leave=not passing,
        )
    return tqdm(
        desc=f"{description}: ",  # as tqdm's set_description leaves it
        total=total,
        initial=initial,
        unit=unit,
        unit_scale=True,
        file=_Lines(sys.stderr),
        mininterval=SECONDS_BETWEEN_LINES,
        leave=not passing,
        delay=1e-9 if passing else 0,  # with any delay tqdm writes nothing before the first interval
        bar_format="{desc}{n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}, {rate_fmt}{postfix}]",
        maxinterval=SECONDS_BETWEEN_LINES,
    )
