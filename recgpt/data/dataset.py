"""A prepared dataset: its manifest, its vocabulary and its histories, read by row group."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import IO, Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from recgpt import storage
from recgpt.data.arrow import column_problem, content_errors, damaged, list_arrays
from recgpt.data.times import Unit
from recgpt.data.vocabulary import Vocabulary
from recgpt.errors import UserError
from recgpt.manifests import validated
from recgpt.schema import DATASET_SCHEMA_VERSION, ITEM_INDICES, MANIFEST_FILE, TIMESTAMPS, USER_HASH, USER_ID

IdType = Literal["int64", "string"]
Count = Annotated[int, Field(ge=0, lt=2**63)]

_AGAIN = "run `recgpt prepare` again"


@dataclass(frozen=True)
class HistoryFile:
    """One part file of the histories."""

    path: str
    """Inside the dataset folder."""
    rows: Count
    """Users in the file."""
    interactions: Count
    sha256: str
    row_groups: list[Annotated[int, Field(gt=0)]]
    """Users in each row group, in file order."""
    footer_sha256: str | None = None
    """Of the file's footer (``parquet_footer``): what a reader of one row group looks at, beside the
    checksums of its pages. None in datasets of older releases."""


@dataclass(frozen=True)
class BadFile:
    """An input file that could not be read; nothing of it is in the dataset."""

    path: str
    reason: str
    bytes: int


@dataclass(frozen=True)
class Ancestor:
    """A dataset that this one was appended to, directly or through others."""

    url: str
    dataset_fingerprint: str
    vocabulary_fingerprint: str
    num_items: int
    """Its items are the first ones of this dataset's vocabulary, with the same indices."""
    num_interactions: int


@dataclass(frozen=True)
class DatasetManifest:
    """What ``recgpt prepare`` says about the dataset it wrote; written last."""

    schema_version: int
    num_users: Count
    num_items: Annotated[int, Field(ge=0, lt=2**31)]
    num_interactions: Count
    has_timestamps: bool
    """False if the log gives an order but no times (format `sequences`)."""
    time_unit: Unit | Literal["unstated"] | None
    """Unit of the timestamps; "unstated" for plain numbers, which stand as in the log."""
    user_id_type: IdType
    item_id_type: IdType
    vocabulary_fingerprint: str
    time_quantiles: dict[str, int] | None
    """For "0.8" and "0.9": the instant before which that share of all interactions lies."""
    sources: list[dict[str, Any]]
    """The input files."""
    settings: dict[str, Any]
    """The settings of ``recgpt prepare``."""
    dropped: dict[str, int]
    """Interactions that were left out, by reason."""
    files: list[HistoryFile]
    bad_files: list[BadFile] = field(default_factory=list)
    """Input files that could not be read."""
    lineage: list[Ancestor] = field(default_factory=list)
    """What this dataset was appended to, the oldest first; empty for a log of its own."""
    vocabulary_sha256: str | None = None
    """Of the vocabulary's file; None in datasets of older releases."""


@dataclass(frozen=True)
class RowGroup:
    """One row group of a part file: the unit in which histories are read."""

    file: str
    """Path inside the dataset folder."""
    index: int
    """Position of the row group in its file."""
    rows: int
    """Users in the row group."""


def history_columns(has_timestamps: bool) -> list[str]:
    """Columns of a part file."""
    return [USER_ID, USER_HASH, ITEM_INDICES, *([TIMESTAMPS] if has_timestamps else [])]


def history_problem(
    histories: pa.Table, columns: Sequence[str], user_id_type: str, num_items: int
) -> str | None:
    """What is wrong with histories, if they have not just these columns with what belongs into them."""
    types = {
        USER_ID: pa.int64() if user_id_type == "int64" else pa.string(),
        USER_HASH: pa.int64(),
        ITEM_INDICES: pa.list_(pa.int32()),
        TIMESTAMPS: pa.list_(pa.int64()),
    }
    if problem := column_problem(histories, {name: [types[name]] for name in columns}):
        return problem
    lists = [list_arrays(histories[name]) for name in columns if name in (ITEM_INDICES, TIMESTAMPS)]
    if len(lists) == 2 and not np.array_equal(lists[0][1], lists[1][1]):
        return f"{ITEM_INDICES} and {TIMESTAMPS} differ in length"
    if ITEM_INDICES in columns:
        items, _ = list_arrays(histories[ITEM_INDICES])
        if len(items) and not (items.min() >= 1 and items.max() <= num_items):
            return f"items {items.min()} to {items.max()}, of {num_items} in the vocabulary"
    return None


def open_histories(file: IO[bytes], footer_sha256: str | None) -> pq.ParquetFile:
    """A part file whose footer is the one that was written, and whose pages are checked as they are read.

    Raises ``pa.ArrowInvalid`` if the footer is another one; None: it is not looked at.
    """
    if footer_sha256 not in (None, storage.checksum_of(parquet_footer(file))):
        raise pa.ArrowInvalid("its footer is not the one that was written")
    return pq.ParquetFile(file, page_checksum_verification=True)


def parquet_footer(file: IO[bytes]) -> bytes:
    """The end of a Parquet file, which says what lies where in it."""
    end = max(file.seek(0, os.SEEK_END) - 8, 0)
    file.seek(end)
    length = int.from_bytes(file.read(4), "little")
    file.seek(max(end - length, 0))
    return file.read()


@dataclass(frozen=True)
class HistoryDataset:
    """A dataset folder written by ``recgpt prepare``; cheap to open and to pickle."""

    url: str
    """Absolute path or URL of the dataset folder."""
    manifest: DatasetManifest

    @classmethod
    def open(cls, url: str) -> "HistoryDataset":
        """Read the manifest of a dataset.

        Raises ``UserError`` if the folder is no finished dataset, or one of another schema version.
        """
        url = storage.absolute(url)
        manifest_url = storage.join(url, MANIFEST_FILE)
        if not storage.exists(manifest_url):
            raise UserError(
                f"{url}: no prepared dataset ({MANIFEST_FILE} is missing); run `recgpt prepare` first"
            )
        return cls(url, _read_manifest(url, manifest_url))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the manifest, which names the checksum of every file of histories."""
        return storage.checksum(storage.join(self.url, MANIFEST_FILE))

    def lineage(self) -> list[Ancestor]:
        """What a dataset that is appended to this one descends from, this one last."""
        manifest = self.manifest
        this = Ancestor(
            self.url,
            self.fingerprint,
            manifest.vocabulary_fingerprint,
            manifest.num_items,
            manifest.num_interactions,
        )
        return [*manifest.lineage, this]

    @property
    def num_users(self) -> int:
        return self.manifest.num_users

    @property
    def num_items(self) -> int:
        return self.manifest.num_items

    @property
    def columns(self) -> list[str]:
        """Columns of the histories; timestamps only where the log has them."""
        return history_columns(self.manifest.has_timestamps)

    def vocabulary(self) -> Vocabulary:
        """Read the vocabulary.

        Raises ``UserError`` if it is not the one that the manifest names.
        """
        vocabulary = Vocabulary.load(self.url, self.manifest.vocabulary_sha256)
        same = vocabulary.fingerprint == self.manifest.vocabulary_fingerprint
        if not same or vocabulary.num_items != self.num_items:
            raise UserError(f"{self.url}: the vocabulary is not the manifest's; {_AGAIN}")
        return vocabulary

    def item_counts(self) -> npt.NDArray[np.int64]:
        """Interactions of each item, [num_items]; no ids are kept. Raises ``UserError`` as ``vocabulary``."""
        counts = Vocabulary.load_counts(self.url, self.manifest.vocabulary_sha256)
        if len(counts) != self.num_items:
            raise UserError(f"{self.url}: the vocabulary is not the manifest's; {_AGAIN}")
        return counts

    @cached_property
    def row_groups(self) -> list[RowGroup]:
        """All row groups, in file order."""
        return [
            RowGroup(file.path, index, rows)
            for file in self.manifest.files
            for index, rows in enumerate(file.row_groups)
        ]

    @property
    def files(self) -> list[str]:
        """Absolute paths or URLs of the part files, in order."""
        return [storage.join(self.url, file.path) for file in self.manifest.files]

    def read_row_group(self, row_group: RowGroup, columns: list[str] | None = None) -> pa.Table:
        """Histories of one row group, all columns or those named.

        Raises ``UserError`` if the file is missing or damaged.
        """
        columns = self.columns if columns is None else columns
        with self.open_part(row_group.file) as file:
            table = file.read_row_group(row_group.index, columns=columns)
        problem = history_problem(table, columns, self.manifest.user_id_type, self.num_items)
        if problem is not None:
            raise damaged(storage.join(self.url, row_group.file), _AGAIN)(problem)
        return table

    @contextlib.contextmanager
    def open_part(self, path: str) -> Iterator[pq.ParquetFile]:
        """A part file, by its path in the manifest, whose pages are checked as they are read.

        Raises ``UserError`` if it is missing or damaged, which may show only when it is read.
        """
        url = storage.join(self.url, path)
        filesystem, place = storage.filesystem_and_path(url)
        try:
            with content_errors(damaged(url, _AGAIN)), filesystem.open(place, "rb") as opened:
                file = open_histories(opened, self._files[path].footer_sha256)
                groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
                if groups != self._files[path].row_groups:
                    raise damaged(url, _AGAIN)(f"row groups of {groups} users are not the manifest's")
                yield file
        except FileNotFoundError:
            raise UserError(f"{url}: no such file; {_AGAIN}") from None

    @cached_property
    def _files(self) -> dict[str, HistoryFile]:
        return {file.path: file for file in self.manifest.files}


def _read_manifest(url: str, where: str) -> DatasetManifest:
    values = storage.read_json(where)
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != DATASET_SCHEMA_VERSION:
        raise UserError(
            f"{url}: prepared with schema version {version}, this release reads version "
            f"{DATASET_SCHEMA_VERSION}; {_AGAIN}"
        )
    manifest = validated(DatasetManifest, values, where, _AGAIN)
    if contradiction := _contradiction(manifest):
        raise UserError(f"{where}: damaged, {contradiction}; {_AGAIN}")
    for file in manifest.files:
        storage.join_inside(url, file.path, where)
    return manifest


def _contradiction(manifest: DatasetManifest) -> str | None:
    """Where a manifest says two things that cannot both be."""
    files = manifest.files
    for name, said, found in (
        ("num_users", manifest.num_users, sum(file.rows for file in files)),
        ("num_interactions", manifest.num_interactions, sum(file.interactions for file in files)),
        *((f"rows of {file.path}", file.rows, sum(file.row_groups)) for file in files),
        ("files", len(files), len({file.path for file in files})),
    ):
        if said != found:
            return f"{name} is {said}, what it says further makes {found}"
    if manifest.has_timestamps != (manifest.time_unit is not None):
        return f"has_timestamps is {manifest.has_timestamps}, time_unit is {manifest.time_unit}"
    quantiles = manifest.time_quantiles
    if quantiles is not None and not quantiles.get("0.8", np.inf) <= quantiles.get("0.9", -np.inf):
        return f"time_quantiles are {quantiles}"
    return None
