"""The users whose history has changed: since an instant, or since an older dataset."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from recgpt import storage
from recgpt.data.arrow import combine, list_arrays
from recgpt.data.dataset import HistoryDataset
from recgpt.data.times import UNITS, parse_instant
from recgpt.errors import UserError
from recgpt.retrieval.user_selection import RowFilter, hash_bounds
from recgpt.schema import ITEM_INDICES, MANIFEST_FILE, TIMESTAMPS, USER_ID

OPTION = "--only-changed-since"
_ROW_GROUPS_KEPT = 16  # of the older dataset: neighbouring row groups need the same ones


def resolve_since(text: str, dataset: HistoryDataset) -> int | HistoryDataset:
    """An older dataset folder, or an instant as ISO text or number, in the unit of ``dataset``.

    Raises ``UserError`` if it is neither, if ``dataset`` has no times to compare an instant with, or if its
    items are not those of the older dataset and some more.
    """
    if storage.exists(storage.join(text, MANIFEST_FILE)) or "/" in text:
        older = HistoryDataset.open(text)
        _check_same_ids(dataset, older)
        return older
    if not dataset.manifest.has_timestamps:
        raise UserError(f"{OPTION} {text}: {dataset.url} has no times; give the older dataset's folder")
    unit = dataset.manifest.time_unit
    try:
        return parse_instant(text, next((known for known in UNITS if known == unit), None), OPTION)
    except UserError as error:
        raise UserError(f"{error}; or the folder of an older dataset") from None


def _check_same_ids(dataset: HistoryDataset, older: HistoryDataset) -> None:
    known = [ancestor.vocabulary_fingerprint for ancestor in dataset.lineage()]
    if older.manifest.vocabulary_fingerprint not in known:
        raise UserError(
            f"{OPTION} {older.url}: its item indices mean other items than those of {dataset.url}; "
            "give a dataset that this one was appended to, or an instant"
        )
    if older.manifest.user_id_type != dataset.manifest.user_id_type:
        raise UserError(f"{OPTION} {older.url}: its user ids are of another type than those of {dataset.url}")


def changed_since(dataset: HistoryDataset, since: int | HistoryDataset) -> RowFilter:
    """The users with an interaction at or after an instant, or with other items than in an older dataset."""
    return _since_instant(dataset, since) if isinstance(since, int) else _since_dataset(dataset, since)


def _since_instant(dataset: HistoryDataset, instant: int) -> RowFilter:
    def changed(part: int) -> npt.NDArray[np.bool_]:
        times, offsets = list_arrays(
            dataset.read_row_group(dataset.row_groups[part], [TIMESTAMPS])[TIMESTAMPS]
        )
        late = np.concatenate([[0], np.cumsum(times >= instant)])
        return late[offsets[1:]] > late[offsets[:-1]]

    return changed


def _since_dataset(dataset: HistoryDataset, older: HistoryDataset) -> RowFilter:
    bounds, older_bounds = hash_bounds(dataset), hash_bounds(older)

    @lru_cache(_ROW_GROUPS_KEPT)
    def older_histories(part: int) -> pa.Table:
        return older.read_row_group(older.row_groups[part], [USER_ID, ITEM_INDICES])

    def changed(part: int) -> npt.NDArray[np.bool_]:
        table = dataset.read_row_group(dataset.row_groups[part], [USER_ID, ITEM_INDICES])
        least, greatest = bounds[part]
        overlap = np.flatnonzero((older_bounds[:, 0] <= greatest) & (least <= older_bounds[:, 1]))
        result = np.ones(len(table), np.bool_)
        for number in overlap.tolist():  # one at a time: there may be any number of them
            result &= differing(table, older_histories(number))
        return result

    return changed


def differing(histories: pa.Table, older: pa.Table) -> npt.NDArray[np.bool_]:
    """Which users of ``histories`` have other items in ``older``, or are not there; bool [len(histories)]."""
    place = pc.index_in(combine(histories[USER_ID]), value_set=combine(older[USER_ID]))
    known = place.is_valid().to_numpy(zero_copy_only=False)
    result = np.ones(len(histories), np.bool_)
    result[known] = _lists_differ(
        combine(histories[ITEM_INDICES]).filter(pa.array(known)),
        combine(older[ITEM_INDICES]).take(place.drop_null()),
    )
    return result


def _lists_differ(lists: pa.ListArray, others: pa.ListArray) -> npt.NDArray[np.bool_]:
    """Row by row, whether two columns of lists of the same length differ."""
    length = pc.list_value_length(lists).to_numpy(zero_copy_only=False)
    result = length != pc.list_value_length(others).to_numpy(zero_copy_only=False)
    equally_long = np.flatnonzero(~result)
    values = lists.take(pa.array(equally_long)).flatten().to_numpy(zero_copy_only=False)
    other_values = others.take(pa.array(equally_long)).flatten().to_numpy(zero_copy_only=False)
    row = np.repeat(equally_long, length[equally_long])
    result[row[values != other_values]] = True
    return result
