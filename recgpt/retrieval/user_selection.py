"""The users that candidates are wanted for, as pieces of work: all, those of a list, those that changed."""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recgpt import storage
from recgpt.data.arrow import combine, damaged, make_lists
from recgpt.data.dataset import HistoryDataset, RowGroup
from recgpt.data.hashing import stable_hash
from recgpt.errors import UserError
from recgpt.retrieval.id_files import read_ids
from recgpt.schema import ITEM_INDICES, USER_HASH, USER_ID

UNKNOWN_USERS_PER_PART = 8192
_READERS = 8  # row groups read at once: each waits for storage most of the time

RowFilter = Callable[[int], npt.NDArray[np.bool_]]
"""Which users of a row group, by its number, are wanted: bool [rows]."""


@dataclass(frozen=True)
class WorkUnit:
    """Users whose candidates make one part file: of one row group of the dataset, or unknown to it."""

    part: int
    """Number of the part file: the place of the row group in the dataset, or one after the last."""
    num_users: int
    row_group: RowGroup | None
    """None for users that the dataset does not know."""
    chosen: bytes | None = None
    """A bit for each user of the row group, set for those that are wanted; None: all of them."""
    unknown_users: pa.Array | None = None
    """The ids of users that the dataset does not know."""

    @property
    def rows(self) -> npt.NDArray[np.int64] | None:
        """Ascending rows of the wanted users in the row group; None: all of them."""
        if self.chosen is None or self.row_group is None:
            return None
        return np.flatnonzero(np.unpackbits(np.frombuffer(self.chosen, np.uint8), count=self.row_group.rows))

    def histories(self, dataset: HistoryDataset) -> pa.Table:
        """The users' user_id, user_hash and item_indices; unknown users have empty histories."""
        if self.row_group is None:
            empty = make_lists(np.empty(0, np.int32), np.zeros(self.num_users + 1, np.int64))
            users = {USER_ID: self.unknown_users, USER_HASH: stable_hash(self.unknown_users)}
            return pa.table({**users, ITEM_INDICES: empty})
        table = dataset.read_row_group(self.row_group, [USER_ID, USER_HASH, ITEM_INDICES])
        return table if self.rows is None else table.take(self.rows)


def all_users(dataset: HistoryDataset) -> list[WorkUnit]:
    return [WorkUnit(part, row_group.rows, row_group) for part, row_group in enumerate(dataset.row_groups)]


def select_users(dataset: HistoryDataset, users: str | None, changed: RowFilter | None) -> list[WorkUnit]:
    """The users in the file ``users``, of them those that ``changed`` wants; each means all if it is None.

    Row groups without any of them are left out. Listed users that the dataset does not know come after all
    others, unless only changed ones are wanted: they have no history that could have changed.
    Raises ``UserError`` if the list cannot be read.
    """
    listed = None if users is None else ListedUsers(dataset, users)
    filters = [some for some in (listed, changed) if some is not None]
    if not filters:
        return all_users(dataset)

    def wanted_of(unit: WorkUnit) -> WorkUnit:
        chosen = filters[0](unit.part)
        for wanted in filters[1:]:
            chosen = chosen & wanted(unit.part) if chosen.any() else chosen
        return replace(unit, num_users=int(chosen.sum()), chosen=np.packbits(chosen).tobytes())

    with ThreadPoolExecutor(_READERS) as readers:
        units = [unit for unit in readers.map(wanted_of, all_users(dataset)) if unit.num_users]
    if listed is None or changed is not None:
        return units
    return units + _units_of_unknown(listed.unknown(), len(dataset.row_groups))


def _units_of_unknown(users: pa.Array, first_part: int) -> list[WorkUnit]:
    pieces = [
        users.slice(start, UNKNOWN_USERS_PER_PART) for start in range(0, len(users), UNKNOWN_USERS_PER_PART)
    ]
    return [
        WorkUnit(first_part + number, len(piece), None, unknown_users=piece)
        for number, piece in enumerate(pieces)
    ]


class ListedUsers:
    """The users of a file, looked for in the row groups of a dataset.

    Raises ``UserError`` if the list cannot be read.
    """

    def __init__(self, dataset: HistoryDataset, path: str):
        id_type = pa.int64() if dataset.manifest.user_id_type == "int64" else pa.string()
        self._dataset = dataset
        self._listed = read_ids(path, USER_ID, id_type, "--users")
        hashes = stable_hash(self._listed)
        self._order = np.argsort(hashes, kind="stable")
        self._hashes, self._by_hash = hashes[self._order], self._listed.take(pa.array(self._order))
        self._known = np.zeros(len(hashes), np.bool_)
        bounds = hash_bounds(dataset)
        self._first = np.searchsorted(self._hashes, bounds[:, 0], "left")
        self._end = np.searchsorted(self._hashes, bounds[:, 1], "right")

    def __call__(self, part: int) -> npt.NDArray[np.bool_]:
        row_group = self._dataset.row_groups[part]
        first, end = self._first[part], self._end[part]
        if first == end:  # none has a hash in the range of this row group, which need not be read
            return np.zeros(row_group.rows, np.bool_)
        users = combine(self._dataset.read_row_group(row_group, [USER_ID])[USER_ID]).cast(self._listed.type)
        here = self._by_hash.slice(first, end - first)
        self._known[first:end] |= pc.is_in(here, value_set=users).to_numpy(zero_copy_only=False)
        return pc.is_in(users, value_set=here).to_numpy(zero_copy_only=False)

    def unknown(self) -> pa.Array:
        """The users found in none of the row groups that were asked about, in the order of the list."""
        return self._listed.take(pa.array(np.sort(self._order[~self._known])))


def hash_bounds(dataset: HistoryDataset) -> npt.NDArray[np.int64]:
    """The least and the greatest user hash of each row group, [row groups, 2], from the ends of the files."""

    def bounds_of(path: str) -> list[tuple[int, int]]:
        with dataset.open_part(path) as file:
            bounds = _bounds(file.metadata)
        if bounds is None:
            url = storage.join(dataset.url, path)
            raise damaged(url, "run `recgpt prepare` again")(f"it does not say the bounds of {USER_HASH}")
        return bounds

    with ThreadPoolExecutor(_READERS) as readers:
        paths = [file.path for file in dataset.manifest.files]
        bounds = [pair for pairs in readers.map(bounds_of, paths) for pair in pairs]
    return np.array(bounds, np.int64).reshape(-1, 2)


def _bounds(metadata: pq.FileMetaData) -> list[tuple[int, int]] | None:
    """The least and the greatest user hash of each row group of a file, or None if it does not say them."""
    names = [metadata.schema.column(place).path for place in range(metadata.num_columns)]
    if USER_HASH not in names:
        return None
    groups = [metadata.row_group(group) for group in range(metadata.num_row_groups)]
    statistics = [group.column(names.index(USER_HASH)).statistics for group in groups]
    bounds = [(some.min, some.max) for some in statistics if some is not None and some.has_min_max]
    whole = len(bounds) == len(groups) and all(isinstance(bound, int) for pair in bounds for bound in pair)
    return bounds if whole else None


def find_user(dataset: HistoryDataset, user_id: str) -> tuple[int, int] | None:
    """Number of the row group and row of one user, given as text; None if the dataset does not know it.

    Raises ``UserError`` if the dataset's ids are integers and this is none.
    """
    user = one_id(user_id, dataset)
    bounds, user_hash = hash_bounds(dataset), stable_hash(user)[0]
    for part in np.flatnonzero((bounds[:, 0] <= user_hash) & (user_hash <= bounds[:, 1])).tolist():
        users = dataset.read_row_group(dataset.row_groups[part], [USER_ID])[USER_ID]
        row = pc.index(combine(users), user[0]).as_py()
        if row >= 0:
            return part, row
    return None


def one_id(user_id: str, dataset: HistoryDataset) -> pa.Array:
    """A user id given as text, in the type of the dataset's, [1]. Raises ``UserError`` as ``find_user``."""
    if dataset.manifest.user_id_type == "string":
        return pa.array([user_id], pa.string())
    try:
        return pa.array([int(user_id)], pa.int64())
    except (ValueError, OverflowError):
        raise UserError(f"--user {user_id}: the user ids of {dataset.url} are integers; give one") from None


def checksum_of_units(units: Sequence[WorkUnit]) -> str:
    """SHA-256 over parts and users: equal for two selections of a dataset only if they are the same."""
    digest = hashlib.sha256()
    for unit in units:
        unknown = None if unit.unknown_users is None else unit.unknown_users.to_pylist()
        chosen = None if unit.chosen is None else unit.chosen.hex()
        digest.update((json.dumps([unit.part, unit.num_users, chosen, unknown]) + "\n").encode())
    return digest.hexdigest()
