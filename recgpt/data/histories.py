"""From the interactions of some users to their histories, filtered and numbered.

A histories table has one row per user, in the order of (user_hash, user_id), and the columns user_id,
user_hash, item_indices and timestamps; item indices count from 1 in the vocabulary that goes with it.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recgpt.data.arrow import combine, list_arrays, make_lists, offsets_of
from recgpt.data.hashing import stable_hash
from recgpt.errors import UserError
from recgpt.schema import ITEM_ID, ITEM_INDICES, TIMESTAMP, TIMESTAMPS, USER_HASH, USER_ID

USERS_PER_ROW_GROUP = 8192
DUPLICATES = "duplicates"
REPEATS = "repeats"
OVER_MAX_HISTORY = "over_max_history"
_SUMMARY_VALUES = 65_536
_KEY_BITS = 63


class PartHistories(NamedTuple):
    """The histories of some users, before items have their final numbers."""

    histories: pa.Table
    item_ids: pa.Array
    """The items that occur, ascending: item index i is the one at position i - 1."""
    dropped: dict[str, int]
    """Interactions left out, by reason."""


def build_histories(
    interactions: pa.Table, collapse_repeats: bool = False, max_history: int | None = None
) -> PartHistories:
    """Group interactions by user and sort them by time; at equal times, by item id.

    The order of the rows does not matter. Exact duplicates are kept once; with ``collapse_repeats``, an item
    that comes several times in a row is kept the first time; of what is left, the newest ``max_history``.
    """
    user_codes, users = _codes(interactions[USER_ID])
    hashes = stable_hash(users)
    user_table = pa.table({USER_HASH: hashes, USER_ID: users})
    user_order = pc.sort_indices(user_table, [(USER_HASH, "ascending"), (USER_ID, "ascending")]).to_numpy()
    item_codes, items = _codes(interactions[ITEM_ID])
    item_order = pc.sort_indices(items).to_numpy()
    user, time, item = _sorted(
        _ranks(user_order)[user_codes],
        combine(interactions[TIMESTAMP]).to_numpy(),
        _ranks(item_order)[item_codes],
    )
    dropped = {}
    same_item = (user[1:] == user[:-1]) & (item[1:] == item[:-1])
    kept = np.ones(len(user), np.bool_)
    kept[1:] = ~(same_item & (time[1:] == time[:-1]))
    dropped[DUPLICATES] = int(len(kept) - kept.sum())
    if collapse_repeats:
        kept[1:] &= ~same_item
        dropped[REPEATS] = int(len(kept) - kept.sum()) - dropped[DUPLICATES]
    user, time, item = user[kept], time[kept], item[kept]
    if max_history is not None:
        ends = np.cumsum(np.bincount(user, minlength=len(users)))
        newest = ends[user] - np.arange(len(user)) <= max_history
        dropped[OVER_MAX_HISTORY] = int(len(newest) - newest.sum())
        user, time, item = user[newest], time[newest], item[newest]
    offsets = offsets_of(np.bincount(user, minlength=len(users)))
    histories = pa.table(
        {
            USER_ID: users.take(pa.array(user_order)),
            USER_HASH: hashes[user_order],
            ITEM_INDICES: make_lists(item.astype(np.int32) + np.int32(1), offsets),
            TIMESTAMPS: make_lists(time, offsets),
        }
    )
    return PartHistories(histories, items.take(pa.array(item_order)), dropped)


def _sorted(
    user: npt.NDArray[np.int32], time: npt.NDArray[np.int64], item: npt.NDArray[np.int32]
) -> tuple[npt.NDArray[np.integer], npt.NDArray[np.int64], npt.NDArray[np.integer]]:
    """The three columns in the order of (user, time, item)."""
    if len(user) == 0:
        return user, time, item
    earliest = int(time.min())
    user_bits, time_bits, item_bits = (
        int(greatest).bit_length() for greatest in (user.max(), int(time.max()) - earliest, item.max())
    )
    if user_bits + time_bits + item_bits > _KEY_BITS:
        order = np.lexsort((item, time, user))
        return user[order], time[order], item[order]
    # Sorting one number per row, instead of an order over three columns, takes a tenth of the time.
    key = user.astype(np.int64) << time_bits
    key = (key | (time - earliest)) << item_bits | item
    key.sort()
    return (
        key >> (time_bits + item_bits),
        (key >> item_bits & ((1 << time_bits) - 1)) + earliest,
        key & ((1 << item_bits) - 1),
    )


def check_one_line_per_user(interactions: pa.Table) -> None:
    """Raises ``UserError`` if a user of the format `sequences` stands on two lines.

    Nothing says which line comes first, and the order of files shall not decide.
    """
    first_items = interactions.filter(pc.equal(interactions[TIMESTAMP], 0))
    lines = pc.value_counts(combine(first_items[USER_ID]))
    repeated = lines.filter(pc.greater(lines.field("counts"), 1)).field("values")
    if len(repeated):
        raise UserError(
            f"user {repeated.sort()[0].as_py()} stands on two lines of the sequences; "
            "join the items of a user in one line, in time order"
        )


def renumber_items(
    histories: pa.Table, new_index: npt.NDArray[np.int32], min_user_interactions: int
) -> pa.Table:
    """Give items new indices, remove those whose new index is 0, then users with too few interactions left.

    ``new_index`` is int32 [items + 1], 0 at position 0. Users without an interaction always go.
    """
    old, offsets = list_arrays(histories[ITEM_INDICES])
    times, _ = list_arrays(histories[TIMESTAMPS])
    items = new_index[old]
    kept_before = offsets_of((items != 0).astype(np.int64))
    lengths = np.diff(kept_before[offsets])
    enough = lengths >= max(min_user_interactions, 1)
    kept = (items != 0) & np.repeat(enough, np.diff(offsets))
    new_offsets = offsets_of(lengths[enough])
    users = histories.select([USER_ID, USER_HASH]).filter(pa.array(enough))
    return users.append_column(ITEM_INDICES, make_lists(items[kept], new_offsets)).append_column(
        TIMESTAMPS, make_lists(times[kept], new_offsets)
    )


def count_items(histories: pa.Table, num_items: int) -> npt.NDArray[np.int64]:
    """Interactions of each item, [num_items]."""
    items, _ = list_arrays(histories[ITEM_INDICES])
    return np.bincount(items, minlength=num_items + 1)[1:]


def num_interactions(histories: pa.Table) -> int:
    return sum(len(lists.flatten()) for lists in histories[ITEM_INDICES].chunks)


def first_times(histories: pa.Table, num_items: int) -> npt.NDArray[np.int64]:
    """The time of the first interaction with each item, [num_items]; the largest int64 for those without."""
    items, _ = list_arrays(histories[ITEM_INDICES])
    times, _ = list_arrays(histories[TIMESTAMPS])
    first = np.full(num_items + 1, np.iinfo(np.int64).max)
    np.minimum.at(first, items, times)
    return first[1:]


class TimeSummary(NamedTuple):
    """Timestamps of some interactions, ascending, with how many each stands for."""

    times: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]


def summarise_times(histories: pa.Table) -> TimeSummary:
    """Exact up to 65,536 different timestamps; beyond, runs of near ones are represented by their first."""
    times, counts = np.unique(list_arrays(histories[TIMESTAMPS])[0], return_counts=True)
    starts = np.arange(0, len(times), max(1, -(-len(times) // _SUMMARY_VALUES)))
    if not len(starts):
        return TimeSummary(times, counts)
    return TimeSummary(times[starts], np.add.reduceat(counts, starts))


def time_quantile(summaries: list[TimeSummary], share: float) -> int:
    """The timestamp at place floor(share * n) of all n, ascending: about that share lies before it."""
    times = np.concatenate([summary.times for summary in summaries])
    counts = np.concatenate([summary.counts for summary in summaries])
    order = np.argsort(times, kind="stable")
    ends = np.cumsum(counts[order])
    return int(times[order][np.searchsorted(ends, int(share * ends[-1]), side="right")])


def histories_file(histories: pa.Table, columns: list[str]) -> bytes:
    """The content of a part file: the columns in row groups of 8,192 users; equal tables give equal bytes."""
    sink = pa.BufferOutputStream()
    table = histories.select(columns).combine_chunks()
    # With a checksum in each page: a reader of one row group notices damage without reading the whole file.
    pq.write_table(
        table, sink, row_group_size=USERS_PER_ROW_GROUP, compression="zstd", write_page_checksum=True
    )
    return sink.getvalue().to_pybytes()


def _codes(ids: pa.ChunkedArray) -> tuple[npt.NDArray[np.int32], pa.Array]:
    """A number for each id, [n], and the distinct ids that the numbers stand for."""
    encoded = combine(ids).dictionary_encode()
    return encoded.indices.to_numpy(zero_copy_only=False), encoded.dictionary


def _ranks(order: npt.NDArray[np.integer]) -> npt.NDArray[np.int32]:
    """The inverse of a permutation."""
    ranks = np.empty(len(order), np.int32)
    ranks[order] = np.arange(len(order), dtype=np.int32)
    return ranks
