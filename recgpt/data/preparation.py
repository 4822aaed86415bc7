"""The steps of preparing a dataset that work on one file of a log or on the users of one part.

Each returns first what is small and counts, then what is large and stays where it was made.
"""

import hashlib
import io
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from recgpt import storage
from recgpt.data.dataset import BadFile, HistoryFile, parquet_footer
from recgpt.data.formats import RawBatch, read_batches
from recgpt.data.hashing import part_of_hash
from recgpt.data.histories import (
    USERS_PER_ROW_GROUP,
    TimeSummary,
    build_histories,
    check_one_line_per_user,
    count_items,
    first_times,
    histories_file,
    num_interactions,
    renumber_items,
    summarise_times,
)
from recgpt.data.interactions import Cleaned, OtherTokens, Wanted, clean, divide_by_user
from recgpt.data.prepare_settings import PrepareSettings
from recgpt.data.sources import Source, UnreadableFile
from recgpt.data.summary import BadRow, PartSummary, summarise_part
from recgpt.data.times import Unit
from recgpt.schema import HISTORIES_FOLDER, QUARANTINE_FOLDER, USER_HASH

ROWS_PER_PIECE = 500_000
EXAMPLES = 3  # of bad rows of a batch that are kept for the report


@dataclass(frozen=True)
class Piece:
    """What one task reads: whole files, or some consecutive row groups of one file."""

    sources: tuple[Source, ...]
    number: int
    """Of all pieces; names its files in the quarantine."""
    row_groups: tuple[int, ...] | None = None
    """None for whole files."""


@dataclass
class BatchCounts:
    """What became of some rows."""

    rows: int = 0
    """Read, bad ones included."""
    dropped: Counter[str] = field(default_factory=Counter)
    """Rows left out, by reason."""
    bad_rows: list[BadRow] = field(default_factory=list)
    """The first of them."""


def cut_in_pieces(sources: Sequence[Source]) -> list[Piece]:
    """Pieces of about ``ROWS_PER_PIECE`` rows or more, in order.

    Small files are read together; large Parquet files are cut between row groups, other files are not.
    """
    cut: list[tuple[tuple[Source, ...], tuple[int, ...] | None]] = []
    together: list[Source] = []
    for source in sources:
        if len(source.row_groups) > 1 and source.approximate_rows > ROWS_PER_PIECE:
            cut += [((source,), groups) for groups in _runs(source.row_groups)]
            continue
        if source.approximate_rows >= ROWS_PER_PIECE:
            cut.append(((source,), None))  # alone it is handed on batch by batch, together it would be whole
            continue
        together.append(source)
        if sum(small.approximate_rows for small in together) >= ROWS_PER_PIECE:
            cut.append((tuple(together), None))
            together = []
    if together:
        cut.append((tuple(together), None))
    return [Piece(some, number, groups) for number, (some, groups) in enumerate(cut)]


def _runs(row_groups: Sequence[int]) -> Iterator[tuple[int, ...]]:
    """Consecutive row groups with ``ROWS_PER_PIECE`` rows together, or more."""
    first, rows = 0, 0
    for group, rows_of_group in enumerate(row_groups):
        rows += rows_of_group
        if rows >= ROWS_PER_PIECE or group == len(row_groups) - 1:
            yield tuple(range(first, group + 1))
            first, rows = group + 1, 0


def divide(
    piece: Piece, wanted: Wanted, num_buckets: int, folder: str, item_ids: pa.Array | None = None
) -> Iterator[BatchCounts | BadFile | OtherTokens | pa.Table]:
    """The interactions of a piece of a log, by hash of the user; bad rows go to the folder's quarantine.

    Yields counts and then a table per bucket, for each of several batches if the piece is of one file. A file
    that cannot be read gives a ``BadFile``; if it is the only one of the piece, what came before is void.
    Ids that are not of the wanted type give ``OtherTokens``, after which nothing comes.
    """
    numbers = itertools.count()

    def divided(rows: CleanRows) -> Iterator[BatchCounts | pa.Table]:
        bad_rows = pa.concat_tables(rows.bad_rows)
        if len(bad_rows):
            name = f"rows-{piece.number:05d}-{next(numbers):05d}.parquet"
            _write_parquet(bad_rows, storage.join(folder, QUARANTINE_FOLDER, name))
        examples = bad_rows[:EXAMPLES].to_pylist()
        rows.counts.bad_rows = [BadRow(row["file"], row["row"], row["reason"]) for row in examples]
        yield rows.counts
        # A generator: Ray drives what it yields from by send(), which a list has not.
        yield from (table for table in divide_by_user(pa.concat_tables(rows.interactions), num_buckets))

    collected = CleanRows()
    try:
        for source in piece.sources:
            of_file = CleanRows()
            try:
                for batch in read_batches(source, piece.row_groups, item_ids):
                    of_file.add(batch, clean(batch, source, wanted))
                    if len(piece.sources) == 1:
                        yield from divided(of_file)
                        of_file = CleanRows()
            except (UnreadableFile, MemoryError) as error:
                yield BadFile(source.url, str(error) or "there is not enough memory for it", source.size)
                continue
            collected.extend(of_file)
    except OtherTokens as error:
        yield error
        return
    if collected.interactions:
        yield from divided(collected)


@dataclass
class CleanRows:
    """Rows of one file or several, cleaned."""

    counts: BatchCounts = field(default_factory=BatchCounts)
    interactions: list[pa.Table] = field(default_factory=list)
    bad_rows: list[pa.Table] = field(default_factory=list)

    def add(self, batch: RawBatch, cleaned: Cleaned) -> None:
        self.counts.rows += len(batch.row) + len(batch.broken)
        self.counts.dropped.update(cleaned.dropped)
        self.interactions.append(cleaned.interactions)
        self.bad_rows.append(cleaned.bad_rows)

    def extend(self, other: "CleanRows") -> None:
        self.counts.rows += other.counts.rows
        self.counts.dropped.update(other.counts.dropped)
        self.interactions += other.interactions
        self.bad_rows += other.bad_rows


@dataclass
class BuiltPart:
    """What is to be known of the histories of a bucket beside themselves."""

    dropped: dict[str, int]
    item_ids: pa.Array
    """The items that occur: item index i is the one at position i - 1."""
    counts: npt.NDArray[np.int64]
    """Interactions of each of them after filtering users, [items]."""
    first_times: npt.NDArray[np.int64]
    """The time of the first interaction with each of them, [items]."""
    times: TimeSummary


def build(settings: PrepareSettings, has_timestamps: bool, *pieces: pa.Table) -> tuple[BuiltPart, pa.Table]:
    """The histories of one bucket, from its pieces, without users that have too few interactions.

    Raises ``UserError`` if a user stands on two lines of a log without timestamps.
    """
    interactions = pa.concat_tables(pieces)
    if not has_timestamps:
        check_one_line_per_user(interactions)
    built = build_histories(interactions, settings.repeats == "collapse", settings.max_history)
    num_items = len(built.item_ids)
    times = summarise_times(built.histories)
    first = first_times(built.histories, num_items)
    counts, histories = remove_items(
        built.histories, np.zeros(num_items, np.bool_), settings.min_user_interactions
    )
    return BuiltPart(built.dropped, built.item_ids, counts, first, times), histories


def remove_items(
    histories: pa.Table, removed: npt.NDArray[np.bool_], min_user_interactions: int
) -> tuple[npt.NDArray[np.int64], pa.Table]:
    """Remove the items at these places, bool [items], and users who have too few interactions then.

    Returns the interactions left of each item, [items], and the histories left; numbers stay.
    """
    numbers = np.arange(1, len(removed) + 1, dtype=np.int32)
    new_index = np.concatenate([np.zeros(1, np.int32), np.where(removed, np.int32(0), numbers)])
    left = renumber_items(histories, new_index, min_user_interactions)
    return count_items(left, len(removed)), left


@dataclass(frozen=True)
class PartFiles:
    """The part files of a bucket: ``count`` of the dataset's ``total``, from number ``first`` on."""

    folder: str
    columns: list[str]
    first: int
    count: int
    total: int


@dataclass(frozen=True)
class WrittenFile:
    """A part file and the times in it; a part without users has no file."""

    file: HistoryFile
    times: TimeSummary


def write_parts(
    histories: pa.Table,
    new_index: npt.NDArray[np.int32],
    files: PartFiles,
    time_unit: Unit | None,
    late_from: int,
    is_new: npt.NDArray[np.bool_],
) -> tuple[list[WrittenFile], PartSummary]:
    """Write the histories of a bucket with the items' final indices.

    ``new_index`` is int32 [items of the bucket + 1]; for the other arguments see ``summarise_part``.
    """
    final = renumber_items(histories, new_index, min_user_interactions=1)
    part = part_of_hash(final[USER_HASH].to_numpy(), files.total)
    bounds = np.searchsorted(part, np.arange(files.first, files.first + files.count + 1)).tolist()
    written = [
        _write_part(final.slice(start, end - start), files, files.first + number)
        for number, (start, end) in enumerate(itertools.pairwise(bounds))
        if start < end
    ]
    return written, summarise_part(final, time_unit, late_from, is_new)


def _write_part(histories: pa.Table, files: PartFiles, number: int) -> WrittenFile:
    content = histories_file(histories, files.columns)
    path = f"{HISTORIES_FOLDER}/part-{number:05d}.parquet"
    storage.write_bytes(storage.join(files.folder, path), content)
    rows = len(histories)
    file = HistoryFile(
        path=path,
        rows=rows,
        interactions=num_interactions(histories),
        sha256=hashlib.sha256(content).hexdigest(),
        row_groups=[min(USERS_PER_ROW_GROUP, rows - start) for start in range(0, rows, USERS_PER_ROW_GROUP)],
        footer_sha256=storage.checksum_of(parquet_footer(io.BytesIO(content))),
    )
    return WrittenFile(file, summarise_times(histories))


def _write_parquet(table: pa.Table, url: str) -> None:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    storage.write_bytes(url, sink.getvalue().to_pybytes())
