"""Progress with rate and ETA: one live bar on a terminal, a plain line now and then elsewhere."""

import sys
from typing import TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 15.0


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
    if sys.stderr.isatty():
        return tqdm(
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
