"""Files that name users or items: text with one id per line, or Parquet with a column of ids."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recgpt import storage
from recgpt.data.arrow import combine, content_errors
from recgpt.data.sources import CANONICAL_INTEGER
from recgpt.data.vocabulary import Vocabulary
from recgpt.errors import UserError
from recgpt.schema import ITEM_ID

_PARQUET_MAGIC = b"PAR1"
_KINDS_OF_IDS = (pa.types.is_integer, pa.types.is_string, pa.types.is_large_string)


def read_ids(path: str, column: str, id_type: pa.DataType, option: str) -> pa.Array:
    """Distinct ids in the order of a file: text, one id per line, or Parquet with a column of that name.

    In text, blank lines and spaces around an id are ignored. ``option`` is named in errors.
    Raises ``UserError`` if the file is missing, holds no id, or holds one that is not of the dataset's type.
    """
    kind = column.removesuffix("_id")
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {option} takes a list of {kind} ids") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; {option} takes one text or Parquet file") from None
    ids = _parquet_ids(path, data, column) if data.startswith(_PARQUET_MAGIC) else _text_ids(path, data)
    # Whole numbers come as floats from programs that have no integers with nulls.
    whole = pa.types.is_floating(ids.type) and pa.types.is_integer(id_type)
    if not whole and not any(is_kind(ids.type) for is_kind in _KINDS_OF_IDS):
        raise UserError(f"{path}: column {column} is {ids.type}; ids must be integers or strings")
    if not len(ids):
        raise UserError(f"{path}: names no {kind}; leave {option} out to do without a list")
    if pa.types.is_integer(id_type) and pa.types.is_string(ids.type):
        others = ids.filter(pc.invert(pc.match_substring_regex(ids, CANONICAL_INTEGER)))
        if len(others):
            raise UserError(f"{path}: the dataset's {kind} ids are {id_type}: {others[0].as_py()!r} is none")
    try:
        return pc.unique(ids.cast(id_type))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(
            f"{path}: the dataset's {kind} ids are {id_type}: {' '.join(str(error).split())}"
        ) from None


def _text_ids(path: str, data: bytes) -> pa.Array:
    try:
        lines = data.decode("utf-8-sig").split("\n")  # other characters may be part of an id
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: neither UTF-8 text nor Parquet ({error.reason} at byte {error.start})"
        ) from None
    ids = (line.strip(" \t\r") for line in lines)
    return pa.array([id for id in ids if id], pa.string())


def _parquet_ids(path: str, data: bytes, column: str) -> pa.Array:
    with content_errors(lambda reason: UserError(f"{path}: not a readable Parquet file ({reason})")):
        file = pq.ParquetFile(pa.BufferReader(data))
        names = file.schema_arrow.names
        if names.count(column) != 1:
            count = names.count(column) or "no"
            raise UserError(f"{path}: {count} column {column}; it has {', '.join(names)}")
        ids = combine(file.read([column])[column])
        if pa.types.is_dictionary(ids.type):
            ids = ids.dictionary_decode()
        ids.validate(full=True)
    if ids.null_count:
        raise UserError(f"{path}: {ids.null_count} rows have no {column}; remove them")
    return ids


def allowed_items(
    vocabulary: Vocabulary, exclude: str | None, only: str | None
) -> tuple[npt.NDArray[np.int64], dict[str, int]]:
    """Indices, ascending, of the items that may be candidates, and how many unknown ids each file names.

    Args:
        exclude: file of items that may not.
        only: file of the items that may; all without it.

    Raises ``UserError`` as ``read_ids``, if a file names no known item, or if no item is left.
    """
    allowed = np.ones(vocabulary.num_items + 1, np.bool_)
    allowed[0] = False  # padding
    unknown: dict[str, int] = {}
    for path, option in ((only, "--only-items"), (exclude, "--exclude-items")):
        if path is None:
            continue
        ids = read_ids(path, ITEM_ID, vocabulary.item_ids.type, option)
        named = np.zeros(len(allowed), np.bool_)
        named[vocabulary.encode(ids)] = True
        known = int(named[1:].sum())
        if not known:
            raise UserError(f"{path}: none of its {len(ids)} items is in the dataset; check {option}")
        unknown[path] = len(ids) - known
        allowed &= named if option == "--only-items" else ~named
    if not allowed.any():
        raise UserError(
            "--exclude-items and --only-items leave no item; name fewer in the one or more in the other"
        )
    return np.flatnonzero(allowed), unknown
