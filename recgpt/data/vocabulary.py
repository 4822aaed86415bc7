"""The frozen map between item ids and dense item indices, with each item's count."""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from recgpt import storage
from recgpt.data.arrow import column_problem, combine, content_errors, damaged, string_bytes
from recgpt.data.hashing import stable_hash
from recgpt.errors import UserError
from recgpt.schema import COUNT, ITEM_ID, ITEM_INDEX, VOCABULARY_FILE


@dataclass(frozen=True)
class Vocabulary:
    """Items in index order: the item at position i has index i + 1; index 0 is padding."""

    item_ids: pa.Array
    """int64 or string [num_items], distinct."""
    counts: npt.NDArray[np.int64] = field(compare=False)
    """Interactions of each item in the prepared dataset, [num_items]."""

    @property
    def num_items(self) -> int:
        return len(self.item_ids)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of the ids with their type and order."""
        if pa.types.is_integer(self.item_ids.type):
            parts = [self.item_ids.to_numpy(zero_copy_only=False).astype("<i8")]
        else:
            offsets, data = string_bytes(self.item_ids)
            parts = [offsets.astype("<i8"), data]
        digest = hashlib.sha256(f"{self.item_ids.type}:".encode())
        for part in parts:
            digest.update(np.ascontiguousarray(part).data)
        return digest.hexdigest()

    def encode(self, item_ids: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.int32]:
        """Item indices, int32 [n]; 0 for ids that are unknown or null.

        Raises ``UserError`` if the ids are of another type than the vocabulary's.
        """
        if item_ids.type != self.item_ids.type:
            raise UserError(
                f"item ids are {item_ids.type} but the vocabulary holds {self.item_ids.type}; "
                "use a dataset prepared from the same log"
            )
        # Nulls match nothing: the vocabulary holds none.
        position = pc.fill_null(pc.index_in(item_ids, value_set=self.item_ids), -1)
        if isinstance(position, pa.ChunkedArray):
            position = position.combine_chunks()
        return position.to_numpy(zero_copy_only=False).astype(np.int32, copy=False) + np.int32(1)

    def decode(self, item_indices: npt.NDArray[np.integer]) -> pa.Array:
        """The log's item ids for indices in [0, num_items], any integer dtype [n]; null for index 0."""
        indices = np.asarray(item_indices).astype(np.int64)
        return self.item_ids.take(pa.array(indices - 1, mask=indices == 0))

    def save(self, dataset_url: str) -> str:
        """Write the vocabulary file of a dataset folder; returns its SHA-256."""
        table = pa.table(
            {
                ITEM_ID: self.item_ids,
                ITEM_INDEX: np.arange(1, self.num_items + 1, dtype=np.int32),
                COUNT: self.counts,
            }
        )
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        storage.write_bytes(storage.join(dataset_url, VOCABULARY_FILE), data)
        return storage.checksum_of(data)

    @classmethod
    def load(cls, dataset_url: str, sha256: str | None = None) -> "Vocabulary":
        """Read the vocabulary file of a dataset folder.

        ``sha256``: what its checksum must be; None for any.
        Raises ``UserError`` if it is missing or damaged.
        """
        table = _read(dataset_url, [ITEM_ID, COUNT], sha256)
        return cls(combine(table[ITEM_ID]), table[COUNT].to_numpy())

    @staticmethod
    def load_counts(dataset_url: str, sha256: str | None = None) -> npt.NDArray[np.int64]:
        """The counts alone, [num_items]. Raises ``UserError`` as ``load``."""
        return _read(dataset_url, [COUNT], sha256)[COUNT].to_numpy()


def _read(dataset_url: str, columns: list[str], sha256: str | None) -> pa.Table:
    url = storage.join(dataset_url, VOCABULARY_FILE)
    broken = damaged(url, "run `recgpt prepare` again")
    try:
        data = storage.read_bytes(url)
    except FileNotFoundError:
        raise UserError(f"{url}: no such file; run `recgpt prepare` again") from None
    if sha256 is not None and storage.checksum_of(data) != sha256:
        raise broken("its SHA-256 is not the manifest's")
    with content_errors(broken):
        file = pq.ParquetFile(pa.BufferReader(data))
        table = file.read(columns)
    types = {ITEM_ID: (pa.int64(), pa.string()), COUNT: (pa.int64(),)}
    if problem := column_problem(table, {name: types[name] for name in columns}):
        raise broken(problem)
    return table


def vocabulary_order(item_ids: pa.Array) -> pa.Array:
    """Distinct ids in the order of the vocabulary: by stable hash, ties by id.

    Not by popularity: the item table is sharded in ranges of rows, and popular items shall spread
    evenly over them.
    """
    return item_ids.take(_hash_order(item_ids))


def grown_order(item_ids: pa.Array, num_known: int) -> npt.NDArray[np.int64]:
    """Places of distinct ids in the vocabulary's order, [n]: the known ones first, as they stand."""
    new = _hash_order(item_ids[num_known:]).to_numpy().astype(np.int64)
    return np.concatenate([np.arange(num_known), num_known + new])


def _hash_order(item_ids: pa.Array) -> pa.Array:
    table = pa.table({"hash": stable_hash(item_ids), ITEM_ID: item_ids})
    return pc.sort_indices(table, [("hash", "ascending"), (ITEM_ID, "ascending")])
