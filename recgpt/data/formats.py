"""Readers: each turns one file of a log into interactions, a bounded piece at a time.

An interaction table has the columns user_id and item_id (int64 or string), and timestamp (int64).
Nulls are left in; cleaning is another step.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from recgpt import storage
from recgpt.data.sources import Source
from recgpt.errors import UserError
from recgpt.schema import ITEM_ID, TIMESTAMP, USER_ID

_BYTES_AT_ONCE = 1 << 25  # of a text file
_ROWS_AT_ONCE = 1 << 20  # of a Parquet file


def interaction_schema(user_type: pa.DataType, item_type: pa.DataType) -> pa.Schema:
    return pa.schema([(USER_ID, user_type), (ITEM_ID, item_type), (TIMESTAMP, pa.int64())])


def read_source(source: Source, schema: pa.Schema) -> Iterator[pa.Table]:
    """The interactions of a file in the given ``interaction_schema``, at least one table, if empty.

    Times that are instants become microseconds since 1970 (UTC where no zone is given); fractions
    of plain numbers are cut off downward. In `sequences` the time is the position in the line.
    Raises ``UserError`` if the file cannot be read.
    """
    readers = {"parquet": _read_parquet, "csv": _read_text_table, "recbole": _read_text_table}
    filesystem, path = storage.filesystem_and_path(source.url)
    try:
        with filesystem.open(path, "rb") as file:
            for table in readers.get(source.format, _read_sequences)(file, source):
                yield table.cast(schema)
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        message = " ".join(str(error).split())
        raise UserError(f"{source.url}: cannot be read as {source.format}: {message}") from None
    yield schema.empty_table()


def _read_parquet(file: Any, source: Source) -> Iterator[pa.Table]:
    names = source.columns
    assert names is not None
    parquet = pq.ParquetFile(file)
    for batch in parquet.iter_batches(_ROWS_AT_ONCE, columns=[names.user, names.item, names.time]):
        yield _interactions(batch, source)


def _read_text_table(file: Any, source: Source) -> Iterator[pa.Table]:
    names = source.columns
    assert names is not None
    columns = [names.user, names.item, names.time]
    batches = pyarrow.csv.open_csv(
        file,
        read_options=pyarrow.csv.ReadOptions(block_size=_BYTES_AT_ONCE),
        parse_options=pyarrow.csv.ParseOptions(
            delimiter=source.delimiter, quote_char='"' if source.format == "csv" else False
        ),
        convert_options=pyarrow.csv.ConvertOptions(
            include_columns=columns,
            column_types=dict.fromkeys(columns, pa.string()),
            null_values=[""],
            strings_can_be_null=True,
        ),
    )
    for batch in batches:
        yield _interactions(batch, source)


def _interactions(batch: pa.RecordBatch, source: Source) -> pa.Table:
    names = source.columns
    assert names is not None
    user, item = (_plain_ids(batch[name]) for name in (names.user, names.item))
    times = batch[names.time]
    return pa.table({USER_ID: user, ITEM_ID: item, TIMESTAMP: _integer_times(times, source.time_type)})


def _plain_ids(ids: pa.Array) -> pa.Array:
    return ids.dictionary_decode() if pa.types.is_dictionary(ids.type) else ids


def _integer_times(times: pa.Array, kind: str) -> pa.Array:
    """int64 [n], from integers, floats, timestamps, dates, or text that holds one of these."""
    if kind == "instant":
        if pa.types.is_string(times.type):
            times = times.cast(pa.timestamp("us", _zone_of(times)))
        # Coarser units are exact in microseconds; of nanoseconds the last three digits are cut off.
        return pc.cast(times, pa.timestamp("us"), safe=False).cast(pa.int64())
    if pa.types.is_integer(times.type):
        return times.cast(pa.int64())
    if pa.types.is_string(times.type):
        try:
            return times.cast(pa.int64())
        except pa.ArrowInvalid:
            times = times.cast(pa.float64())
    return pc.floor(pc.if_else(pc.is_nan(times), None, times)).cast(pa.int64())


def _zone_of(times: pa.Array) -> str | None:
    """UTC if the first instant names a zone (``Z`` or ``+01:00``): Arrow wants all of them to, or none."""
    zoned = pc.match_substring_regex(times.drop_null()[:1], r"(Z|[+-]\d\d(:?\d\d)?)$")
    with_time = pc.match_substring(times.drop_null()[:1], ":")
    return "UTC" if pc.any(pc.and_(zoned, with_time)).as_py() else None


def _read_sequences(file: Any, source: Source) -> Iterator[pa.Table]:
    rest = b"\n"  # takes the place of the newline that ends the line before
    while block := file.read(_BYTES_AT_ONCE):
        complete, newline, tail = block.rpartition(b"\n")
        if newline:
            yield _parse_sequences((rest + complete).decode("utf-8").lstrip("\ufeff\n"))
            rest = tail
        else:
            rest += block
    yield _parse_sequences(rest.decode("utf-8").lstrip("\ufeff\n"))


def _parse_sequences(text: str) -> pa.Table:
    """Interactions of whole lines. A line with a user alone gives one interaction without an item."""
    lines = pc.ascii_trim_whitespace(pc.split_pattern(pa.array([text], pa.large_string()), "\n").values)
    tokens = pc.ascii_split_whitespace(lines.filter(pc.not_equal(lines, "")))
    offsets = tokens.offsets.to_numpy().astype(np.int64)
    items_per_line = np.diff(offsets) - 1
    rows_per_line = np.maximum(items_per_line, 1)
    first_row = np.cumsum(rows_per_line) - rows_per_line
    place = np.arange(rows_per_line.sum()) - np.repeat(first_row, rows_per_line)
    user_at = np.repeat(offsets[:-1], rows_per_line)
    alone = np.repeat(items_per_line == 0, rows_per_line)
    users = tokens.values.take(pa.array(user_at))
    items = tokens.values.take(pa.array(user_at + 1 + place, mask=alone))
    return pa.table({USER_ID: users, ITEM_ID: items, TIMESTAMP: place})
