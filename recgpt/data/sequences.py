"""Histories as flat arrays, and their division into training, validation and test.

Shapes: B users, N interactions of these users together.
"""

from typing import Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recgpt.config import SplitSettings
from recgpt.data.arrow import list_arrays, make_lists, offsets_of
from recgpt.data.dataset import DatasetManifest
from recgpt.errors import UserError
from recgpt.schema import ITEM_INDICES, TARGET, TIMESTAMPS, USER_HASH, USER_ID

Part = Literal["train", "valid", "test", "all"]

_MIN_ITEMS_TO_HOLD_OUT = 3  # one to start from, one for validation, one for test


def split_columns(split: SplitSettings) -> list[str]:
    """The columns of the histories that ``split_histories`` needs, and the user's hash."""
    return [USER_HASH, ITEM_INDICES, *([TIMESTAMPS] if split.protocol == "time" else [])]


def history_lists(table: pa.Table) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Item indices of all users, int32 [N], and where each user's begin and end, int64 [B+1].

    The values share memory with a table of one chunk; they are read-only then.
    """
    values, offsets = list_arrays(table[ITEM_INDICES])
    return values.astype(np.int32, copy=False), offsets


def resolve_time_bounds(split: SplitSettings, manifest: DatasetManifest) -> tuple[int, int] | None:
    """``(valid_from, test_from)`` of the protocol `time`, in the unit of the log; else None.

    Raises ``UserError`` if the dataset has no timestamps, or if validation does not begin before test.
    """
    if split.protocol != "time":
        return None
    if manifest.time_quantiles is None:
        raise UserError("split protocol time: the dataset has no timestamps; use protocol leave_one_out")
    valid_from = manifest.time_quantiles["0.8"] if split.valid_from is None else split.valid_from
    test_from = manifest.time_quantiles["0.9"] if split.test_from is None else split.test_from
    if valid_from >= test_from:
        raise UserError(
            f"split protocol time: valid_from={valid_from} is not before test_from={test_from}; "
            "set both so that validation comes before test"
        )
    return valid_from, test_from


def split_histories(
    table: pa.Table, split: SplitSettings, part: Part, time_bounds: tuple[int, int] | None = None
) -> pa.Table:
    """The part of each history that belongs to training, validation or test.

    ``table`` has the columns of the histories, at least ``split_columns``; ``time_bounds`` come from
    ``resolve_time_bounds``. The result has the columns user_id and user_hash as far as ``table`` has
    them, item_indices (list<int32>, what the model may see), and for `valid` and `test` also target
    (int32, the item to be found).

    `leave_one_out`: of users with 3 items or more the last item is the test target and the one before
    it the validation target, each with all that precedes it as input; training has all but these two.
    Shorter histories are whole in training and absent elsewhere.
    `time`: training has what lies before valid_from. Validation sees the same and has to find the first
    item in [valid_from, test_from); test sees all before test_from and has to find the first item after.
    Validation and test leave out users without an input or a target; training keeps every user, so that
    under protocol `time` a training history may be empty.
    `all` is the whole history under either protocol.
    Raises ``UserError`` for protocol `time` on histories without timestamps.
    """
    values, offsets = history_lists(table)
    lengths = np.diff(offsets)
    if part == "all":
        return _users(table).append_column(ITEM_INDICES, table[ITEM_INDICES])
    if split.protocol == "leave_one_out":
        enough = lengths >= _MIN_ITEMS_TO_HOLD_OUT
        if part == "train":
            return _prefixes(table, values, offsets, lengths - 2 * enough)
        held_out = 1 if part == "test" else 2
        return _prefixes(table, values, offsets, lengths - held_out, targets_of=enough)

    before_valid, before_test = _lengths_before(table, offsets, time_bounds)
    if part == "train":
        return _prefixes(table, values, offsets, before_valid)
    known, end = (before_valid, before_test) if part == "valid" else (before_test, lengths)
    return _prefixes(table, values, offsets, known, targets_of=(known > 0) & (known < end))


def _lengths_before(
    table: pa.Table, offsets: npt.NDArray[np.int64], time_bounds: tuple[int, int] | None
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """How many interactions of each user lie before the two instants, int64 [B] each."""
    if TIMESTAMPS not in table.column_names or time_bounds is None:
        raise UserError("split protocol time: the histories have no timestamps; use protocol leave_one_out")
    times, _ = list_arrays(table[TIMESTAMPS])

    def count_before(instant: int) -> npt.NDArray[np.int64]:
        before = np.concatenate([[0], np.cumsum(times < instant)])
        return before[offsets[1:]] - before[offsets[:-1]]

    return count_before(time_bounds[0]), count_before(time_bounds[1])


def _users(table: pa.Table) -> pa.Table:
    return table.select([name for name in (USER_ID, USER_HASH) if name in table.column_names])


def _prefixes(
    table: pa.Table,
    values: npt.NDArray[np.int32],
    offsets: npt.NDArray[np.int64],
    lengths: npt.NDArray[np.int64],
    targets_of: npt.NDArray[np.bool_] | None = None,
) -> pa.Table:
    """The first ``lengths`` items of each user; of the users in ``targets_of`` alone, with the item after."""
    kept = lengths if targets_of is None else np.where(targets_of, lengths, 0)
    place = np.arange(len(values)) - np.repeat(offsets[:-1], np.diff(offsets))
    inputs = values[place < np.repeat(kept, np.diff(offsets))]
    users = _users(table)
    if targets_of is None:
        return users.append_column(ITEM_INDICES, make_lists(inputs, offsets_of(kept)))
    histories = make_lists(inputs, offsets_of(kept[targets_of]))
    targets = pa.array(values[(offsets[:-1] + lengths)[targets_of]])
    users = users.filter(pa.array(targets_of))
    return users.append_column(ITEM_INDICES, histories).append_column(TARGET, targets)
