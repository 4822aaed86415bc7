"""The steps of preparing a dataset that work on one block of a log or on the users of one part.

Each returns first what is small and counts, then what is large and stays where it was made.
"""

import hashlib

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from recgpt import storage
from recgpt.data.dataset import HistoryFile
from recgpt.data.histories import (
    USERS_PER_ROW_GROUP,
    TimeSummary,
    build_histories,
    check_one_line_per_user,
    count_items,
    histories_file,
    renumber_items,
    summarise_times,
)
from recgpt.data.interactions import are_integers, clean, divide_by_user
from recgpt.data.vocabulary import Vocabulary
from recgpt.schema import HISTORIES_FOLDER, ITEM_ID, USER_ID


def survey(interactions: pa.Table) -> tuple[bool, bool]:
    """Whether all user ids, and all item ids, of a block are integers."""
    return are_integers(interactions[USER_ID]), are_integers(interactions[ITEM_ID])


def divide(interactions: pa.Table, schema: pa.Schema, num_parts: int) -> tuple[int | pa.Table, ...]:
    """How many interactions lack a value; then the others in the dataset's types, a table per part."""
    complete, missing = clean(interactions, schema)
    return missing, *divide_by_user(complete, num_parts)


def build(has_timestamps: bool, *pieces: pa.Table) -> tuple[int, pa.Array, pa.Table]:
    """Number of duplicates, item ids and histories of one part, from its pieces.

    Raises ``UserError`` if a user stands on two lines of a log without timestamps.
    """
    interactions = pa.concat_tables(pieces)
    if not has_timestamps:
        check_one_line_per_user(interactions)
    built = build_histories(interactions)
    return built.duplicates, built.item_ids, built.histories


def number_items(
    ids_of_part: pa.Array, histories: pa.Table, item_ids: pa.Array, min_user_interactions: int
) -> tuple[npt.NDArray[np.int64], pa.Table]:
    """Number the items by their places in ``item_ids``, those of all parts, and remove rare users.

    Returns the interactions left of each item, [len(item_ids)], and the histories left.
    """
    vocabulary = Vocabulary(item_ids, np.zeros(len(item_ids), np.int64))
    new_index = np.concatenate([np.zeros(1, np.int32), vocabulary.encode(ids_of_part)])
    numbered = renumber_items(histories, new_index, min_user_interactions)
    return count_items(numbered, len(item_ids)), numbered


def remove_items(
    histories: pa.Table, removed: npt.NDArray[np.bool_], min_user_interactions: int
) -> tuple[npt.NDArray[np.int64], pa.Table]:
    """Remove the items at these places, bool [num_items], and users who become rare by that.

    Returns the interactions left of each item, [num_items], and the histories left; numbers stay.
    """
    numbers = np.arange(1, len(removed) + 1, dtype=np.int32)
    new_index = np.concatenate([np.zeros(1, np.int32), np.where(removed, np.int32(0), numbers)])
    left = renumber_items(histories, new_index, min_user_interactions)
    return count_items(left, len(removed)), left


def write_part(
    histories: pa.Table, new_index: npt.NDArray[np.int32], columns: list[str], folder: str, number: int
) -> tuple[HistoryFile, TimeSummary]:
    """Write the part file of this number with the items' final indices; none if no user is left in it."""
    final = renumber_items(histories, new_index, min_user_interactions=1)
    content = histories_file(final, columns)
    path = f"{HISTORIES_FOLDER}/part-{number:05d}.parquet"
    if len(final):
        storage.write_bytes(storage.join(folder, path), content)
    starts = range(0, len(final), USERS_PER_ROW_GROUP)
    file = HistoryFile(
        path=path,
        rows=len(final),
        interactions=int(count_items(final, int(new_index.max())).sum()),
        sha256=hashlib.sha256(content).hexdigest(),
        row_groups=[min(USERS_PER_ROW_GROUP, len(final) - start) for start in starts],
    )
    return file, summarise_times(final)
