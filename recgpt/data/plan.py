"""The order in which histories are read: a function of (seed, epoch), never of timing or workers.

An epoch's order: the dataset's row groups are shuffled and strung together into windows, users
are shuffled inside each window, and the resulting line of users is cut into lanes of equal length.
A rank reads whole lanes, so the batches do not depend on the number of ranks. A cursor is the
number of users consumed per lane; the stream goes on from it exactly.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from recgpt.config import SplitSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.data.sequences import split_columns, split_histories
from recgpt.schema import ITEM_INDICES, USER_HASH

LANE = "lane"


@dataclass(frozen=True)
class ReadUnit:
    """A piece of one lane: users ``start`` to ``end`` of a shuffled window."""

    lane: int
    row_groups: tuple[int, ...]  # the window: positions in HistoryDataset.row_groups, in reading order
    shuffle_key: tuple[int, int, int]  # (seed, epoch, window)
    start: int
    end: int


def epoch_units(
    row_counts: Sequence[int],
    lanes: Sequence[int],
    total_lanes: int,
    window_users: int,
    shuffle: tuple[int, int],
    consumed: Sequence[int],
) -> list[ReadUnit]:
    """The units of some lanes in reading order: first the first unit of each lane, then the second ...

    Args:
        row_counts: users in each row group of the dataset.
        lanes: the lanes wanted.
        total_lanes: lanes into which the epoch is cut.
        window_users: least number of users in a window; the last one of the epoch may have fewer.
        shuffle: (seed, epoch).
        consumed: users to skip at the start of each lane, by lane number.
    """
    windows = _windows(row_counts, window_users, shuffle)
    total = sum(row_counts)
    numbered = []
    for lane in lanes:
        first = lane * total // total_lanes + consumed[lane]
        end = (lane + 1) * total // total_lanes
        number = 0
        window_first = 0
        for window, (row_groups, rows) in enumerate(windows):
            start = max(first - window_first, 0)
            stop = min(end - window_first, rows)
            if start < stop:
                numbered.append((number, ReadUnit(lane, row_groups, (*shuffle, window), start, stop)))
                number += 1
            window_first += rows
    return [unit for _, unit in sorted(numbered, key=lambda pair: (pair[0], pair[1].lane))]


def read_unit(
    dataset: HistoryDataset, unit: ReadUnit, split: SplitSettings, time_bounds: tuple[int, int] | None
) -> pa.Table:
    """The training histories of a unit: lane int32, user_hash int64, item_indices list<int32>.

    Every user of the unit is a row, also those without a training history (an empty list), so
    that rows count users and the cursor stays exact.
    """
    columns = split_columns(split)
    groups = [dataset.read_row_group(dataset.row_groups[group], columns) for group in unit.row_groups]
    window = pa.concat_tables(groups)
    order = np.random.default_rng(unit.shuffle_key).permutation(len(window))
    chosen = window.take(pa.array(order[unit.start : unit.end])).combine_chunks()
    train = split_histories(chosen, split, "train", time_bounds)
    lane = pa.array(np.full(len(train), unit.lane, dtype=np.int32))
    return pa.table({LANE: lane, USER_HASH: train[USER_HASH], ITEM_INDICES: train[ITEM_INDICES]})


def _windows(
    row_counts: Sequence[int], window_users: int, shuffle: tuple[int, int]
) -> list[tuple[tuple[int, ...], int]]:
    """(row groups, users) of each window, in the order of this epoch."""
    order = np.random.default_rng(shuffle).permutation(len(row_counts))
    windows: list[tuple[tuple[int, ...], int]] = []
    groups: list[int] = []
    rows = 0
    for group in order.tolist():
        groups.append(group)
        rows += row_counts[group]
        if rows >= window_users:
            windows.append((tuple(groups), rows))
            groups, rows = [], 0
    if groups:
        windows.append((tuple(groups), rows))
    return windows
