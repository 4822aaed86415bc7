"""Interactions: deciding the types of their ids, cleaning them, dividing them by user."""

from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recgpt.data.arrow import combine
from recgpt.data.hashing import part_of_hash, stable_hash
from recgpt.data.sources import ColumnType
from recgpt.schema import USER_ID

_CANONICAL_INTEGER = r"^(0|-?[1-9][0-9]{0,18})$"


def type_as_read(types: Iterable[ColumnType]) -> pa.DataType:
    """The one type in which the ids of all files are read: int64 only if all files store integers."""
    return pa.int64() if set(types) == {"int64"} else pa.string()


def final_type(types: Iterable[ColumnType], texts_are_integers: bool) -> pa.DataType:
    """The type of the ids in the dataset, over all files together.

    Where one file stores strings, all ids are strings. Text without types gives int64 if every
    token of every file is an integer as it would be printed (so that "007" stays what it is).
    """
    kinds = set(types)
    integers = "string" not in kinds and (texts_are_integers or "text" not in kinds)
    return pa.int64() if integers else pa.string()


def are_integers(ids: pa.ChunkedArray) -> bool:
    """True if every id (nulls aside) is stored as, or written as, an int64 in its usual form."""
    if pa.types.is_integer(ids.type):
        return True
    if pc.all(pc.match_substring_regex(ids, _CANONICAL_INTEGER)).as_py() is False:
        return False
    try:
        ids.cast(pa.int64())
    except pa.ArrowInvalid:  # 19 digits may be too many
        return False
    return True


def clean(interactions: pa.Table, schema: pa.Schema) -> tuple[pa.Table, int]:
    """The interactions in the dataset's types, without those that lack a value, and how many these were."""
    complete = interactions.drop_null()
    return complete.cast(schema), len(interactions) - len(complete)


def divide_by_user(interactions: pa.Table, num_parts: int) -> Sequence[pa.Table]:
    """One table per part; a user is whole in one of them, and parts are in the order of the user's hash."""
    if num_parts == 1:
        return [interactions]
    part = part_of_hash(stable_hash(combine(interactions[USER_ID])), num_parts)
    ordered = interactions.take(pa.array(np.argsort(part, kind="stable")))
    ends = np.cumsum(np.bincount(part, minlength=num_parts)).tolist()
    return [ordered.slice(start, end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
