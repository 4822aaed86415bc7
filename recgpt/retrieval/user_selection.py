"""The users that candidates are wanted for: read from a list, and found in the dataset."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recgpt import storage
from recgpt.data.arrow import combine
from recgpt.data.dataset import HistoryDataset, RowGroup
from recgpt.data.hashing import stable_hash
from recgpt.errors import UserError
from recgpt.schema import USER_HASH, USER_ID

_PARQUET_MAGIC = b"PAR1"
_READERS = 8  # row groups read at once: each waits for storage most of the time


@dataclass(frozen=True)
class WorkUnit:
    """Users of one row group of the dataset, whose candidates make one part file."""

    part: int
    """Place of the row group in the dataset, and number of the part file."""
    row_group: RowGroup
    rows: npt.NDArray[np.int32] | None
    """Ascending rows of the wanted users; None: all of them."""

    @property
    def num_users(self) -> int:
        return self.row_group.rows if self.rows is None else len(self.rows)


def all_users(dataset: HistoryDataset) -> list[WorkUnit]:
    return [WorkUnit(part, row_group, None) for part, row_group in enumerate(dataset.row_groups)]


def selected_users(dataset: HistoryDataset, path: str) -> list[WorkUnit]:
    """The users listed in a file; row groups without any of them are left out.

    Raises ``UserError`` if the list cannot be read, is empty, or names a user that the dataset lacks.
    """
    wanted = read_user_list(path, pa.int64() if dataset.manifest.user_id_type == "int64" else pa.string())
    hashes = stable_hash(wanted)
    by_hash = np.argsort(hashes, kind="stable")
    hashes, wanted_by_hash = hashes[by_hash], wanted.take(pa.array(by_hash))
    known = np.zeros(len(wanted), dtype=bool)

    def rows_of(row_group: RowGroup) -> npt.NDArray[np.int32]:
        # A row group is sorted by hash: only the wanted users in its range of hashes can be in it.
        table = dataset.read_row_group(row_group, [USER_ID, USER_HASH])
        bounds = table[USER_HASH].take([0, len(table) - 1]).to_numpy()
        first, end = np.searchsorted(hashes, bounds[0], "left"), np.searchsorted(hashes, bounds[1], "right")
        here, users = wanted_by_hash.slice(first, end - first), combine(table[USER_ID]).cast(wanted.type)
        known[first:end] |= pc.is_in(here, value_set=users).to_numpy(zero_copy_only=False)
        return np.flatnonzero(pc.is_in(users, value_set=here)).astype(np.int32)

    with ThreadPoolExecutor(_READERS) as readers:
        rows = list(readers.map(rows_of, dataset.row_groups))
    if not known.all():
        unknown = np.sort(by_hash[~known])
        raise UserError(
            f"{path}: {len(unknown)} of {len(wanted)} users are not in {dataset.url}, "
            f"the first is {wanted[int(unknown[0])].as_py()!r}; remove them from the list"
        )
    units = zip(all_users(dataset), rows, strict=True)
    return [WorkUnit(unit.part, unit.row_group, chosen) for unit, chosen in units if len(chosen)]


def read_user_list(path: str, user_id_type: pa.DataType) -> pa.Array:
    """Distinct user ids in the order of a file: text, one id per line, or Parquet with a column user_id.

    In text, blank lines and spaces around an id are ignored. Raises ``UserError`` if the file is missing,
    holds no user, or holds an id that is not of the dataset's type.
    """
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --users takes a list of user ids") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder; --users takes one text or Parquet file") from None
    ids = _parquet_ids(path, data) if data.startswith(_PARQUET_MAGIC) else _text_ids(path, data)
    if not len(ids):
        raise UserError(f"{path}: names no user; leave --users out to get candidates for all")
    try:
        return pc.unique(ids.cast(user_id_type))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise UserError(
            f"{path}: the dataset's user ids are {user_id_type}: {' '.join(str(error).split())}"
        ) from None


def _text_ids(path: str, data: bytes) -> pa.Array:
    try:
        lines = data.decode("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: neither UTF-8 text nor Parquet ({error.reason} at byte {error.start})"
        ) from None
    return pa.array([line.strip() for line in lines if line.strip()], pa.string())


def _parquet_ids(path: str, data: bytes) -> pa.Array:
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        if USER_ID not in file.schema_arrow.names:
            raise UserError(f"{path}: no column {USER_ID}; it has {', '.join(file.schema_arrow.names)}")
        ids = combine(file.read([USER_ID])[USER_ID])
    except pa.ArrowInvalid as error:
        raise UserError(f"{path}: not a readable Parquet file ({' '.join(str(error).split())})") from None
    if ids.null_count:
        raise UserError(f"{path}: {ids.null_count} rows have no {USER_ID}; remove them")
    return ids
