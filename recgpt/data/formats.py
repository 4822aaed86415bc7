"""Readers: each turns one file of a log into batches of its columns, a bounded piece at a time.

Values are as the file holds them: of text files binary, of Parquet files whatever type the column has.
Nulls and broken values are left in; cleaning is another step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from recgpt.data.arrow import combine, list_arrays
from recgpt.data.dataset import history_columns, history_problem, open_histories
from recgpt.data.sources import Source, UnreadableFile, open_file, unreadable_if_broken
from recgpt.schema import ITEM_INDICES, TIMESTAMPS, USER_ID

_BYTES_AT_ONCE = 1 << 25  # of a text file
_ROWS_AT_ONCE = 1 << 20  # of a Parquet file
_LONGEST_LINE = 1 << 28  # bytes of `sequences`: some ten million items of one user
_MOST_BROKEN_ROWS = 1 << 18  # of a table, in one block: where there are more, it is another format


@dataclass
class RawBatch:
    """Some rows of a file."""

    user: pa.Array
    item: pa.Array
    time: pa.Array
    row: npt.NDArray[np.int64]
    """Place of each row in the file, from 1: lines without the header, or rows of Parquet."""
    event: pa.Array | None = None
    broken: list[tuple[int, str, str]] = field(default_factory=list)
    """Rows that could not be divided into columns: (row, reason, content)."""


def read_batches(
    source: Source, row_groups: Sequence[int] | None = None, item_ids: pa.Array | None = None
) -> Iterator[RawBatch]:
    """The rows of a file, or of some row groups of a Parquet file.

    In `sequences` the time is the position in the line; a line with a user alone gives one row without
    an item. A file of the format `dataset` is a part of a prepared dataset whose items ``item_ids`` are.
    Raises ``UnreadableFile`` if the file cannot be read to its end.
    """
    readers = {"csv": _read_text_table, "recbole": _read_text_table, "sequences": _read_sequences}
    problem = f"cannot be read as {source.format}"
    with unreadable_if_broken(problem), open_file(source.url, source.compressed) as file:
        if source.format == "parquet":
            yield from _read_parquet(file, source, row_groups)
        elif source.format == "dataset":
            assert item_ids is not None
            yield from _read_histories(file, source, row_groups, item_ids)
        else:
            yield from readers[source.format](file, source)


def _read_parquet(file: IO[bytes], source: Source, row_groups: Sequence[int] | None) -> Iterator[RawBatch]:
    parquet = pq.ParquetFile(file, coerce_int96_timestamp_unit="us")
    chosen = range(parquet.num_row_groups) if row_groups is None else row_groups
    first = 1 + sum(parquet.metadata.row_group(group).num_rows for group in range(min(chosen, default=0)))
    assert source.columns is not None
    columns = [name for name in source.columns.wanted() if name not in source.partitions]
    for batch in parquet.iter_batches(_ROWS_AT_ONCE, row_groups=list(chosen), columns=columns):
        yield _columns(batch, source, np.arange(first, first + len(batch)))
        first += len(batch)


def _read_text_table(file: IO[bytes], source: Source) -> Iterator[RawBatch]:
    assert source.columns is not None
    columns = [name for name in source.columns.wanted() if name not in source.partitions]
    broken: list[tuple[int, str, str]] = []

    def skip(row: pyarrow.csv.InvalidRow) -> str:
        reason = f"{row.expected_columns} fields expected, found {row.actual_columns}"
        broken.append((row.number - 1, reason, row.text))
        return "skip" if len(broken) <= _MOST_BROKEN_ROWS else "error"

    if not source.approximate_rows:
        return  # a header alone, which the reader refuses if no line end follows it
    batches = pyarrow.csv.open_csv(
        file,
        # Rows have numbers only if one thread reads.
        read_options=pyarrow.csv.ReadOptions(block_size=_BYTES_AT_ONCE, use_threads=False),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=source.delimiter,
            quote_char='"' if source.format == "csv" else False,
            newlines_in_values=source.format == "csv",
            invalid_row_handler=skip,
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            include_columns=columns,
            # A byte that is not UTF-8 spoils its row and not the file.
            column_types=dict.fromkeys(columns, pa.binary()),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    next_row, reported = 1, 0
    for batch in batches:
        # The reader may be ahead: some of the rows skipped so far stand behind this batch.
        skipped = np.array([row for row, _, _ in broken], np.int64)
        rows = np.setdiff1d(np.arange(next_row, next_row + len(batch) + len(skipped)), skipped)[: len(batch)]
        yield _columns(batch, source, rows, broken[reported:])
        next_row = int(rows[-1]) + 1 if len(rows) else next_row
        broken[:] = [row for row in broken if row[0] >= next_row]
        reported = len(broken)
    if reported < len(broken):
        nothing = pa.nulls(0, pa.string())
        yield RawBatch(nothing, nothing, nothing, np.empty(0, np.int64), None, broken[reported:])


def _columns(
    batch: pa.RecordBatch,
    source: Source,
    rows: npt.NDArray[np.int64],
    broken: list[tuple[int, str, str]] | None = None,
) -> RawBatch:
    def column(name: str) -> pa.Array:
        if name in source.partitions:
            return pa.repeat(pa.scalar(source.partitions[name], pa.string()), len(batch))
        values = batch[name]
        return values.dictionary_decode() if pa.types.is_dictionary(values.type) else values

    names = source.columns
    assert names is not None
    event = None if names.event is None else column(names.event)
    return RawBatch(column(names.user), column(names.item), column(names.time), rows, event, broken or [])


def _read_histories(
    file: IO[bytes], source: Source, row_groups: Sequence[int] | None, item_ids: pa.Array
) -> Iterator[RawBatch]:
    parquet = open_histories(file, source.footer_sha256)
    columns = history_columns(has_timestamps=True)
    for group in range(parquet.num_row_groups) if row_groups is None else row_groups:
        table = parquet.read_row_group(group, columns=columns)
        if problem := history_problem(table, columns, source.user_type, len(item_ids)):
            raise UnreadableFile(problem)
        items, offsets = list_arrays(table[ITEM_INDICES])
        times, _ = list_arrays(table[TIMESTAMPS])
        users = combine(table[USER_ID]).take(pa.array(np.repeat(np.arange(len(table)), np.diff(offsets))))
        yield RawBatch(
            users, item_ids.take(pa.array(items - 1)), pa.array(times), np.arange(1, len(items) + 1)
        )


def _read_sequences(file: IO[bytes], source: Source) -> Iterator[RawBatch]:
    rest, lines = b"\n", 0  # a newline takes the place of the one that ends the line before
    while block := file.read(_BYTES_AT_ONCE):
        complete, newline, tail = block.rpartition(b"\n")
        if newline:
            yield _parse_sequences(rest + complete, lines)
            lines += (rest + complete).count(b"\n")
            rest = b"\n" + tail
        else:
            rest += block
        if len(rest) > _LONGEST_LINE:
            raise UnreadableFile(f"line {lines + 1} is longer than {_LONGEST_LINE >> 20} MiB")
    yield _parse_sequences(rest, lines)


def _parse_sequences(block: bytes, lines_before: int) -> RawBatch:
    """Whole lines, each with its newline in front."""
    text = block[1:].decode("utf-8").removeprefix("\ufeff")
    lines = pc.ascii_trim_whitespace(pc.split_pattern(pa.array([text], pa.large_string()), "\n").values)
    filled = pc.not_equal(lines, "")
    line_number = np.flatnonzero(filled.to_numpy(zero_copy_only=False)) + lines_before + 1
    tokens = pc.ascii_split_whitespace(lines.filter(filled))
    offsets = tokens.offsets.to_numpy().astype(np.int64)
    items_per_line = np.diff(offsets) - 1
    rows_per_line = np.maximum(items_per_line, 1)
    first_row = np.cumsum(rows_per_line) - rows_per_line
    place = np.arange(rows_per_line.sum()) - np.repeat(first_row, rows_per_line)
    user_at = np.repeat(offsets[:-1], rows_per_line)
    alone = np.repeat(items_per_line == 0, rows_per_line)
    users = tokens.values.take(pa.array(user_at))
    items = tokens.values.take(pa.array(user_at + 1 + place, mask=alone))
    return RawBatch(users, items, pa.array(place), np.repeat(line_number, rows_per_line))
