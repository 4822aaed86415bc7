"""A prepared dataset: its manifest, its vocabulary and its histories, read by row group."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from recgpt import storage
from recgpt.data.vocabulary import Vocabulary
from recgpt.errors import UserError
from recgpt.schema import DATASET_SCHEMA_VERSION, ITEM_INDICES, MANIFEST_FILE, TIMESTAMPS, USER_HASH, USER_ID

IdType = Literal["int64", "string"]


@dataclass(frozen=True)
class HistoryFile:
    """One part file of the histories."""

    path: str
    """Inside the dataset folder."""
    rows: int
    """Users in the file."""
    interactions: int
    sha256: str
    row_groups: list[int]
    """Users in each row group, in file order."""


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
    num_users: int
    num_items: int
    num_interactions: int
    has_timestamps: bool
    """False if the log gives an order but no times (format `sequences`)."""
    time_unit: str | None
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
        values = storage.read_json(manifest_url)
        version = values.get("schema_version") if isinstance(values, dict) else None
        if version != DATASET_SCHEMA_VERSION:
            raise UserError(
                f"{url}: prepared with schema version {version}, this release reads version "
                f"{DATASET_SCHEMA_VERSION}; run `recgpt prepare` again"
            )
        try:
            return cls(url, TypeAdapter(DatasetManifest).validate_python(values))
        except ValidationError as error:
            problem = error.errors()[0]
            key = ".".join(map(str, problem["loc"]))
            raise UserError(
                f"{manifest_url}: damaged, {key}: {problem['msg']}; run `recgpt prepare` again"
            ) from None

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
        vocabulary = Vocabulary.load(self.url)
        if vocabulary.fingerprint != self.manifest.vocabulary_fingerprint:
            raise UserError(f"{self.url}: the vocabulary is not the manifest's; run `recgpt prepare` again")
        return vocabulary

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
        url = storage.join(self.url, row_group.file)
        filesystem, path = storage.filesystem_and_path(url)
        try:
            with filesystem.open(path, "rb") as file:
                return pq.ParquetFile(file).read_row_group(row_group.index, columns=columns)
        except FileNotFoundError:
            raise UserError(f"{url}: no such file; run `recgpt prepare` again") from None
        except pa.ArrowInvalid as error:
            raise UserError(f"{url}: damaged ({error}); run `recgpt prepare` again") from None
