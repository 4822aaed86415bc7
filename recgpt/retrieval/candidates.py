"""Candidates as written: one row per user with the log's own ids, and a manifest of the files.

A finished folder holds ``part-00000.parquet`` ..., ``_manifest.json`` and, written last, ``_SUCCESS``.
It can be read as a plain Parquet folder: readers skip names that begin with an underscore.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Annotated

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import Field

from recgpt import storage
from recgpt.config import RecallSettings
from recgpt.data.arrow import column_problem, content_errors, damaged, list_arrays, make_lists, offsets_of
from recgpt.data.dataset import Count
from recgpt.data.vocabulary import Vocabulary
from recgpt.errors import UserError
from recgpt.manifests import validated
from recgpt.retrieval.autoregressive import Recalled
from recgpt.schema import (
    CANDIDATES_MANIFEST_FILE,
    CANDIDATES_SCHEMA_VERSION,
    ITEM_IDS,
    MANIFEST_FILE,
    PADDING_INDEX,
    POPULARITY_STEP,
    SCORES,
    STEPS,
    SUCCESS_FILE,
    USER_ID,
)

ListLength = Annotated[int, Field(gt=0, lt=2**31)]

_AGAIN = "run `recgpt generate` again with --overwrite"
_COLUMNS = {
    USER_ID: (pa.int64(), pa.string()),
    ITEM_IDS: (pa.list_(pa.int64()), pa.list_(pa.string())),
    SCORES: (pa.list_(pa.float32()),),
    STEPS: (pa.list_(pa.int8()),),
}


@dataclass(frozen=True)
class CandidateFile:
    """One part file."""

    path: str
    """Inside the candidates folder."""
    rows: Count
    """Users in the file."""
    candidates: Count
    """Items over all its users."""
    sha256: str
    by_popularity: Count = 0
    """Users without a history, who got the most popular items."""


@dataclass(frozen=True)
class MadeFrom:
    """What the candidates were made from."""

    model: str
    """Where the exported model lay."""
    model_fingerprint: str
    """SHA-256 over the files of the exported model."""
    dataset: str
    """Where the dataset lay."""
    dataset_fingerprint: str
    """SHA-256 of the dataset's manifest, which holds the checksums of its histories."""
    vocabulary_fingerprint: str
    index: str | None = None
    """SHA-256 of the approximate index and the effort it was searched with; None: exact search."""


@dataclass(frozen=True)
class AskedFor:
    """Which users get candidates, and which items they may get; all of the dataset by default."""

    users: str | None = None
    """File with the ids of the users."""
    changed_since: str | None = None
    """Only users that changed since: an instant, or an older dataset."""
    exclude_items: str | None = None
    """File with the ids of items that no user gets."""
    only_items: str | None = None
    """File with the ids of the only items that users get."""

    @property
    def sources(self) -> list[str]:
        """What is read, as far as it lies in files: an instant does not."""
        named = [self.users, self.exclude_items, self.only_items]
        since = self.changed_since
        if since is not None and storage.exists(storage.join(since, MANIFEST_FILE)):
            named.append(since)
        return [source for source in named if source is not None]


@dataclass(frozen=True)
class CandidatesManifest:
    """What ``recgpt generate`` says about the candidates it wrote."""

    schema_version: int
    num_users: Count
    num_candidates: Count
    """Items over all users; less than num_users * k where a user has too few items left."""
    k: ListLength
    quotas: list[ListLength]
    keep_seen: bool
    made_from: MadeFrom
    files: list[CandidateFile]
    num_by_popularity: Count = 0
    """Users without a history, who got the most popular items."""
    continuation: str = "best"
    """What each recall step went on from (see ``RecallSettings``)."""
    asked_for: AskedFor = AskedFor()
    num_allowed_items: Count | None = None
    """Items that could be candidates; None: all of the dataset."""
    job: str = ""
    """Fingerprint of the job that made them (see ``CandidateJob``)."""


def part_name(part: int) -> str:
    return f"part-{part:05d}.parquet"


def part_order(name: str) -> tuple[int, str]:
    """Sorts names of parts by their numbers, those with more than five digits too: they are longer."""
    return len(name), name


def candidates_table(user_ids: pa.ChunkedArray, recalled: Recalled, vocabulary: Vocabulary) -> pa.Table:
    """One row per user: user_id, item_ids (list of the log's ids), scores (list<float>), steps (list<int8>).

    Step 1 comes first, scores descend within a step, and places that recall could not fill are left out.
    """
    item_index_BK = recalled.item_index_BK.numpy()
    found_BK = item_index_BK != PADDING_INDEX
    offsets = offsets_of(found_BK.sum(1))
    scores = recalled.score_BK.numpy()[found_BK].astype(np.float32)
    lists = {
        ITEM_IDS: make_lists(vocabulary.decode(item_index_BK[found_BK]), offsets),
        SCORES: make_lists(scores, offsets),
        STEPS: make_lists(recalled.step_BK.numpy()[found_BK], offsets),
    }
    return pa.table({USER_ID: user_ids, **lists})


def write_part(folder: str, part: int, table: pa.Table) -> CandidateFile:
    """Write one part file, whole or not at all; the same table gives the same bytes."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    data = sink.getvalue().to_pybytes()
    name = part_name(part)
    storage.write_bytes(storage.join(folder, name), data)
    return _description(name, table, storage.checksum_of(data))


def _description(name: str, table: pa.Table, sha256: str) -> CandidateFile:
    steps, offsets = list_arrays(table[STEPS])
    by_popularity = len(
        np.unique(np.repeat(np.arange(len(table)), np.diff(offsets))[steps == POPULARITY_STEP])
    )
    return CandidateFile(name, len(table), len(steps), sha256, by_popularity)


def manifest_of(
    files: list[CandidateFile], recall: RecallSettings, made_from: MadeFrom
) -> CandidatesManifest:
    """The manifest of all part files, which may come in any order."""
    return CandidatesManifest(
        schema_version=CANDIDATES_SCHEMA_VERSION,
        num_users=sum(file.rows for file in files),
        num_candidates=sum(file.candidates for file in files),
        k=recall.k,
        quotas=list(recall.quotas),
        keep_seen=recall.keep_seen,
        made_from=made_from,
        files=sorted(files, key=lambda file: part_order(file.path)),
        num_by_popularity=sum(file.by_popularity for file in files),
        continuation=recall.continuation,
    )


def finish(folder: str, manifest: CandidatesManifest) -> None:
    """Write the manifest, remove everything that it does not name, and write ``_SUCCESS``."""
    storage.write_json(storage.join(folder, CANDIDATES_MANIFEST_FILE), asdict(manifest))
    named = {CANDIDATES_MANIFEST_FILE, *(file.path for file in manifest.files)}
    for name in storage.list_names(folder):
        if name not in named:
            storage.remove(storage.join(folder, name))
    storage.write_bytes(storage.join(folder, SUCCESS_FILE), b"")


def read_manifest(url: str) -> CandidatesManifest:
    """The manifest of a finished candidates folder.

    Raises ``UserError`` if the folder is not finished, or was written by another schema version.
    """
    for name in (SUCCESS_FILE, CANDIDATES_MANIFEST_FILE):
        if not storage.exists(storage.join(url, name)):
            raise UserError(f"{url}: no finished candidates ({name} is missing); run `recgpt generate` first")
    return load_manifest(url)


def load_manifest(url: str) -> CandidatesManifest:
    """The manifest of a candidates folder, finished or not. Raises ``UserError`` if it cannot be read."""
    where = storage.join(url, CANDIDATES_MANIFEST_FILE)
    values = storage.read_json(where)
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != CANDIDATES_SCHEMA_VERSION:
        raise UserError(
            f"{url}: candidates of schema version {version}, this release reads version "
            f"{CANDIDATES_SCHEMA_VERSION}; {_AGAIN}"
        )
    manifest = validated(CandidatesManifest, values, where, _AGAIN)
    if contradiction := _contradiction(manifest):
        raise UserError(f"{where}: damaged, {contradiction}; {_AGAIN}")
    return manifest


def _contradiction(manifest: CandidatesManifest) -> str | None:
    """Where a manifest says two things that cannot both be."""
    files = manifest.files
    for name, said, found in (
        ("k", manifest.k, sum(manifest.quotas)),
        ("num_users", manifest.num_users, sum(file.rows for file in files)),
        ("num_candidates", manifest.num_candidates, sum(file.candidates for file in files)),
        ("num_by_popularity", manifest.num_by_popularity, sum(file.by_popularity for file in files)),
        ("files", len(files), len({file.path for file in files})),
    ):
        if said != found:
            return f"{name} is {said}, what it says further makes {found}"
    return None


def find_strangers(url: str, manifest: CandidatesManifest) -> list[str]:
    """The Parquet files that the manifest does not name: readers of the folder take them for candidates."""
    listed = {file.path for file in manifest.files}
    return [name for name in storage.list_names(url) if name.endswith(".parquet") and name not in listed]


def read_candidates(url: str) -> Iterator[pa.Table]:
    """The tables of all part files in order, one at a time, each checked against the manifest.

    Raises ``UserError`` if a file is missing, is not the one that was written, or is not in the manifest.
    """
    manifest = read_manifest(url)
    if strangers := find_strangers(url, manifest):
        raise UserError(f"{url}: {strangers[0]} is not in the manifest; remove it, or {_AGAIN}")
    for file in manifest.files:
        yield read_part(url, file)


def read_part(url: str, file: CandidateFile) -> pa.Table:
    """One part file. Raises ``UserError`` if it is missing or is not the one that was written."""
    where = storage.join_inside(url, file.path, storage.join(url, CANDIDATES_MANIFEST_FILE))
    try:
        data = storage.read_bytes(where)
    except FileNotFoundError:
        raise UserError(f"{where}: the manifest names this file but it is missing; {_AGAIN}") from None
    if storage.checksum_of(data) != file.sha256:
        raise UserError(f"{where}: not the file that was written (its SHA-256 differs); {_AGAIN}")
    with content_errors(damaged(where, _AGAIN)):
        table = pq.ParquetFile(pa.BufferReader(data)).read()
    if problem := column_problem(table, _COLUMNS) or _uneven(table):
        raise damaged(where, _AGAIN)(problem)
    found = _description(file.path, table, file.sha256)
    if found != file:
        raise UserError(f"{where}: holds {found.rows} users, the manifest says {file.rows}; {_AGAIN}")
    return table


def _uneven(table: pa.Table) -> str | None:
    lengths = [np.diff(list_arrays(table[name])[1]).tolist() for name in (ITEM_IDS, SCORES, STEPS)]
    return None if lengths[0] == lengths[1] == lengths[2] else "its lists differ in length"
