"""Units of timestamps: recognising them, converting between them, and instants on the command line."""

import datetime
import re
from collections.abc import Collection
from typing import Literal

import numpy as np
import numpy.typing as npt

from recgpt.errors import UserError

Unit = Literal["seconds", "milliseconds", "microseconds", "nanoseconds"]
UNITS: dict[Unit, int] = {
    "seconds": 1,
    "milliseconds": 1_000,
    "microseconds": 1_000_000,
    "nanoseconds": 1_000_000_000,
}
"""Ticks per second, from the coarsest to the finest."""

SECONDS_PER_DAY = 86_400
# As seconds since 1970: from March 1973 to the year 5138. Each finer unit has the thousandfold range, so
# that every number belongs to one unit at most; smaller ones are no times of day, but places in an order.
_SMALLEST_SECONDS = 10**8
_DATE_IN_DIGITS = re.compile(r"(19|20)\d\d(0[1-9]|1[0-2])([0-2]\d|3[01])")


def recognise_unit(times: npt.NDArray[np.floating] | npt.NDArray[np.integer]) -> Unit | None:
    """The unit that most of the numbers [n] have if they are times since 1970; None if they are too small."""
    magnitude = np.abs(np.asarray(times, np.float64))
    magnitude = magnitude[np.isfinite(magnitude)]
    bounds = [_SMALLEST_SECONDS * ticks for ticks in UNITS.values()]
    place = np.searchsorted(bounds, magnitude, side="right")  # 0: below all
    most = int(np.bincount(place, minlength=1).argmax())
    return list(UNITS)[most - 1] if most else None


def finest(units: Collection[Unit]) -> Unit:
    """The unit in which times of all these units are exact."""
    return max(units, key=lambda unit: UNITS[unit])


def parse_instant(text: str, unit: Unit | None, option: str) -> int:
    """An instant given as a number in the log's unit or as ISO text (UTC where no zone is given).

    Raises ``UserError`` for anything else, and for ISO text where the log's numbers are no times.
    """
    try:
        number = int(text)
    except ValueError:
        pass
    else:
        if unit is None or not _DATE_IN_DIGITS.fullmatch(text):
            return number
        raise UserError(
            f"{option} {text}: is this a date? write {text[:4]}-{text[4:6]}-{text[6:]}; "
            f"a number means {unit} since 1970"
        )
    try:
        instant = datetime.datetime.fromisoformat(text)
    except ValueError:
        raise UserError(
            f"{option} {text}: expected an ISO date or time such as 2026-01-31, or a number in the log's unit"
        ) from None
    if unit is None:
        raise UserError(f"{option} {text}: the log's times are plain numbers; give such a number")
    if instant.tzinfo is None:
        instant = instant.replace(tzinfo=datetime.timezone.utc)
    since = instant - datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
    return since // datetime.timedelta(microseconds=1) * UNITS[unit] // UNITS["microseconds"]
