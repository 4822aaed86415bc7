"""What a prepared dataset looks like, in figures small enough for a report."""

import datetime
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recgpt.data.arrow import list_arrays
from recgpt.data.times import SECONDS_PER_DAY, UNITS, Unit
from recgpt.schema import ITEM_INDICES, TIMESTAMPS

COLD_BELOW = 5
_CURVE_POINTS = 100
_FIRST_DAY = datetime.date(1970, 1, 1)
_DAYS_WITH_A_DATE = range(-_FIRST_DAY.toordinal() + 1, (datetime.date.max - _FIRST_DAY).days + 1)


@dataclass(frozen=True)
class BadRow:
    """A row of the log that was put into the quarantine."""

    path: str
    """The input file."""
    row: int
    """Its place in the file, from 1, a header not counted."""
    reason: str


@dataclass(frozen=True)
class DataSummary:
    """The distributions that the data report shows."""

    interactions_per_day: dict[str, int]
    """ISO date (UTC) -> interactions; empty if the log's times are no instants."""
    users_by_length: dict[int, int]
    """History length -> users with a history of that length, ascending."""
    item_counts: list[tuple[int, int]]
    """(rank, interactions) of items from the most popular (rank 1) on, at ranks even in log scale."""
    cold_item_share: float
    """Share of items with fewer than ``COLD_BELOW`` interactions."""
    cold_interaction_share: float
    """Share of all interactions that are with such items."""
    new_item_share: float | None
    """Of the newest tenth of interactions, the share with items not seen before it; None without times."""


@dataclass
class PartSummary:
    """The same for some users; counters add up."""

    days: Counter[int] = field(default_factory=Counter)
    """Days since 1970 -> interactions."""
    lengths: Counter[int] = field(default_factory=Counter)
    """History length -> users."""
    late: int = 0
    """Interactions from the given instant on."""
    late_with_new_items: int = 0
    """Those of them with items that do not occur before that instant."""

    def __add__(self, other: "PartSummary") -> "PartSummary":
        return PartSummary(
            self.days + other.days,
            self.lengths + other.lengths,
            self.late + other.late,
            self.late_with_new_items + other.late_with_new_items,
        )


def summarise_part(
    histories: pa.Table, time_unit: Unit | None, late_from: int, is_new: npt.NDArray[np.bool_]
) -> PartSummary:
    """Figures of some histories.

    Args:
        time_unit: of the timestamps; None if they are no instants.
        late_from: first of the late instants.
        is_new: by item index, [num_items + 1]: whether an item does not occur before ``late_from``.
    """
    items, offsets = list_arrays(histories[ITEM_INDICES])
    times, _ = list_arrays(histories[TIMESTAMPS])
    late = times >= late_from
    days = times // (UNITS[time_unit] * SECONDS_PER_DAY) if time_unit else np.empty(0, np.int64)
    return PartSummary(
        _counter(days), _counter(np.diff(offsets)), int(late.sum()), int(is_new[items[late]].sum())
    )


def _counter(values: npt.NDArray[np.int64]) -> Counter[int]:
    distinct, counts = np.unique(values, return_counts=True)
    return Counter(dict(zip(distinct.tolist(), counts.tolist(), strict=True)))


def summarise(
    parts: Sequence[PartSummary], item_counts: npt.NDArray[np.int64], has_timestamps: bool
) -> DataSummary:
    """The figures of a dataset from those of its parts and the counts of its items, [num_items]."""
    total = sum(parts, PartSummary())
    descending = np.sort(item_counts)[::-1]
    ranks = np.unique(np.geomspace(1, len(descending), _CURVE_POINTS).round().astype(np.int64))
    cold = item_counts < COLD_BELOW
    new_share = total.late_with_new_items / max(total.late, 1) if has_timestamps else None
    return DataSummary(
        interactions_per_day={
            _date(day): count for day, count in sorted(total.days.items()) if day in _DAYS_WITH_A_DATE
        },
        users_by_length=dict(sorted(total.lengths.items())),
        item_counts=[(int(rank), int(descending[rank - 1])) for rank in ranks],
        cold_item_share=float(cold.mean()),
        cold_interaction_share=float(item_counts[cold].sum() / item_counts.sum()),
        new_item_share=new_share,
    )


def _date(day: int) -> str:
    return (_FIRST_DAY + datetime.timedelta(days=day)).isoformat()
