"""Finding the files of a log, recognising their format, and checking their columns."""

import csv
import io
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from glob import has_magic
from typing import Literal
from urllib.parse import unquote

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from recgpt import storage
from recgpt.data.dataset import BadFile
from recgpt.data.sources import (
    CANONICAL_INTEGER,
    FORMATS,
    ColumnNames,
    ColumnType,
    Format,
    Source,
    UnreadableFile,
    check_kinds_of_time,
    open_file,
    unreadable_if_broken,
)
from recgpt.data.times import Unit, recognise_unit
from recgpt.errors import UserError

_SAMPLE_BYTES = 1 << 16
_SAMPLE_ROWS = 1000
_OPEN_AT_ONCE = 16
_PARQUET_MAGIC = b"PAR1"
_GZIP_MAGIC = b"\x1f\x8b"
_TEXT_IN_GZIP = 4  # bytes of a log for each byte of its gzip file, about
_RECBOLE_FIELD = re.compile(r"(.+):(token|token_seq|float|float_seq)")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", re.ASCII)
_PARTITION = re.compile(r"([^/=]+)=([^/]*)")
_NO_PARTITION = "__HIVE_DEFAULT_PARTITION__"
_DELIMITERS = ("\t", ",", ";", "|")
_FEWEST_LINES_OF_A_TABLE = 3


def find_sources(
    inputs: Sequence[str], format: str, names: ColumnNames, time_unit: Unit | Literal["auto", "none"] = "auto"
) -> tuple[list[Source], list[BadFile]]:
    """The files that files, folders and globs (paths or URLs) stand for, sorted, each described.

    Second, the files that cannot be used, with the reason. ``format`` is one of ``FORMATS`` or "auto", which
    recognises each file by its content; ``time_unit`` is that of plain numbers, or "auto" to recognise it.
    Raises ``UserError`` for an unknown format, an input that is not there, and times of different kinds.
    """
    if format not in ("auto", *FORMATS):
        raise UserError(f"--format {format}: unknown format; known are auto, {', '.join(FORMATS)}")
    urls = sorted({url for pattern in inputs for url in _find_files(pattern)})
    with ThreadPoolExecutor(_OPEN_AT_ONCE) as threads:  # object stores answer slowly, but many at once
        described = list(threads.map(lambda url: _describe(url, format, names, time_unit), urls))
    sources = [found for found in described if isinstance(found, Source)]
    check_kinds_of_time(sources)
    return sources, [found for found in described if isinstance(found, BadFile)]


def _find_files(pattern: str) -> list[str]:
    filesystem, path = storage.filesystem_and_path(storage.absolute(pattern))
    if filesystem.isfile(path):
        matches, files = [path], [path]
    elif filesystem.isdir(path):
        matches, files = [path], _visible_files(filesystem, path, path)
    else:
        folder = re.split(r"[*?[]", path, maxsplit=1)[0].rpartition("/")[0]
        matches = filesystem.glob(path) if has_magic(path) else []
        files = [file for match in matches for file in _visible_files(filesystem, match, folder)]
    if not files:
        problem = "no files in it" if matches else "no such file or folder"
        raise UserError(f"{pattern}: {problem}; give --input a file, a folder or a glob")
    return [file if storage.is_local(pattern) else filesystem.unstrip_protocol(file) for file in files]


def _visible_files(filesystem: AbstractFileSystem, path: str, folder: str) -> list[str]:
    """The files at or below ``path``, but for names below ``folder`` with a dot or an underscore in front.

    These are markers and leftovers, not data; so is an object whose name ends like a folder's.
    """
    files = filesystem.find(path)
    return [file for file in files if not re.search(r"/[._]|/$", file[len(folder) :])]


def partitions_of(url: str) -> dict[str, str | None]:
    """Columns and values that the folders of a path name, as Hive writes them."""
    folders, _, _ = url.rpartition("/")
    return {
        unquote(name): None if value == _NO_PARTITION else unquote(value)
        for name, value in _PARTITION.findall(folders)
    }


def _describe(
    url: str, format: str, names: ColumnNames, time_unit: Unit | Literal["auto", "none"]
) -> Source | BadFile:
    filesystem, path = storage.filesystem_and_path(url)
    size = filesystem.size(path)
    try:
        with unreadable_if_broken("cannot be read"):
            return _description(url, size, format, names, time_unit)
    except UnreadableFile as error:
        return BadFile(url, str(error), size)


def _description(
    url: str, size: int, format: str, names: ColumnNames, time_unit: Unit | Literal["auto", "none"]
) -> Source:
    with open_file(url, compressed=False) as file:
        start = file.read(len(_PARQUET_MAGIC))
        file.seek(0)
        if format == "parquet" or (format == "auto" and start == _PARQUET_MAGIC):
            return _describe_parquet(url, size, pq.ParquetFile(file), names, time_unit)
    compressed = start.startswith(_GZIP_MAGIC)
    with open_file(url, compressed) as file:
        sample = file.read(_SAMPLE_BYTES)
    text_size = size * _TEXT_IN_GZIP if compressed else size
    whole = len(sample) < _SAMPLE_BYTES
    text = sample.decode("utf-8-sig", errors="replace")  # a broken byte spoils its row alone
    if not text.strip():
        raise UnreadableFile("the file is empty")
    lines = text.lstrip("\r\n").splitlines()
    lines = lines if whole else lines[:-1] or lines
    recognised = recognise_text(lines, names) if format == "auto" else format
    if recognised == "sequences":
        tokens = [line.split() for line in lines]
        if "\r" in text and "\n" not in text:
            raise UnreadableFile("its lines end with a carriage return alone; end them with a line feed")
        num_items = sum(max(len(line) - 1, 0) for line in tokens)
        if not num_items:
            raise UnreadableFile("no line has a user and an item; a table needs a header with its columns")
        rows = num_items if whole else _scale_up(num_items, lines, text_size)
        users = _text_type([line[0] for line in tokens if line])
        items = _text_type([item for line in tokens for item in line[1:]])
        return Source(url, "sequences", size, rows, compressed=compressed, user_type=users, item_type=items)
    description = _describe_table(url, recognised, size, lines, names, time_unit, compressed)
    rows = len(lines) - 1 if whole else max(_scale_up(len(lines) - 1, lines, text_size), 1)
    return replace(description, approximate_rows=rows)


def recognise_text(lines: Sequence[str], names: ColumnNames) -> str:
    """`recbole`, `csv` or `sequences`, from the first lines of a text file.

    Raises ``UnreadableFile`` for a table without a header that names a known column: its lines could
    also be histories.
    """
    header = _split(lines[0], "\t")
    if header and all(_RECBOLE_FIELD.fullmatch(field) for field in header):
        return "recbole"
    delimiter = _delimiter(lines[0])
    if delimiter is None:
        return "sequences"
    if delimiter != "\t" or set(names.wanted()) & set(header):
        return "csv"
    if len(lines) >= _FEWEST_LINES_OF_A_TABLE and len({line.count("\t") for line in lines if line}) == 1:
        raise UnreadableFile(
            "may be a table or histories, the format cannot be recognised; give --format csv "
            "and the names of the columns, or --format sequences"
        )
    return "sequences"


def _describe_table(
    url: str,
    format: str,
    size: int,
    lines: Sequence[str],
    names: ColumnNames,
    time_unit: Unit | Literal["auto", "none"],
    compressed: bool,
) -> Source:
    delimiter = "\t" if format == "recbole" else _delimiter(lines[0]) or ","
    header = _split(lines[0], delimiter)
    typed = [_RECBOLE_FIELD.fullmatch(field) if format == "recbole" else None for field in header]
    plain = [match[1] if match else field for match, field in zip(typed, header, strict=True)]
    partitions = _missing_columns(plain, names, partitions_of(url))
    in_file = [name if name in partitions else header[plain.index(name)] for name in names.wanted()]
    parsed = csv.reader(io.StringIO("\n".join(lines[1:]), newline=""), delimiter=delimiter)
    rows = [row for row in parsed if len(row) == len(header)]

    def sample(name: str) -> list[str]:
        if name in partitions:
            return [partitions[name] or ""]
        place = header.index(name)
        return [value for row in rows if (value := row[place].strip())]

    columns = ColumnNames(*in_file)
    times = sample(columns.time)
    numbers = [time for time in times if _NUMBER.fullmatch(time)]
    is_number = len(numbers) * 2 >= len(times)
    chosen: Format = "recbole" if format == "recbole" else "csv"
    return Source(
        url,
        chosen,
        size,
        len(lines) - 1,
        columns,
        delimiter,
        compressed,
        partitions,
        user_type=_text_type(sample(columns.user)),
        item_type=_text_type(sample(columns.item)),
        time_type="number" if is_number else "instant",
        time_unit=_unit(np.array(numbers, np.float64), time_unit) if is_number else "microseconds",
        has_times=bool(times),
    )


def _scale_up(count: int, lines: Sequence[str], size: int) -> int:
    """What a count over the first lines would be over the whole file; never less than it is."""
    return max(count, count * size // max(sum(len(line) + 1 for line in lines), 1))


def _text_type(tokens: Sequence[str]) -> ColumnType:
    integers = all(re.match(CANONICAL_INTEGER, token) for token in tokens)
    return "text_of_integers" if integers else "text"


def _describe_parquet(
    url: str,
    size: int,
    file: pq.ParquetFile,
    names: ColumnNames,
    time_unit: Unit | Literal["auto", "none"],
) -> Source:
    schema = file.schema_arrow
    partitions = _missing_columns(schema.names, names, partitions_of(url))
    user, item = (
        _text_type([partitions[name] or ""]) if name in partitions else _id_type(schema.field(name))
        for name in (names.user, names.item)
    )
    if names.event and names.event not in partitions:
        _check_is_text(schema.field(names.event))
    has_times = True
    if names.time in partitions:
        value = partitions[names.time] or ""
        is_number = bool(_NUMBER.fullmatch(value))
        time: ColumnType = "number" if is_number else "instant"
        unit = _unit(np.array([float(value)]), time_unit) if is_number else "microseconds"
    else:
        time = _time_type(schema.field(names.time))
        times = _some_times(file, names.time) if time == "number" else np.empty(0)
        has_times = time == "instant" or bool(len(times))
        unit = _unit(times, time_unit) if time == "number" else "microseconds"
    metadata = file.metadata
    row_groups = tuple(metadata.row_group(index).num_rows for index in range(metadata.num_row_groups))
    return Source(
        url,
        "parquet",
        size,
        metadata.num_rows,
        names,
        partitions=partitions,
        row_groups=row_groups,
        user_type=user,
        item_type=item,
        time_type=time,
        time_unit=unit,
        has_times=has_times,
    )


def _unit(times: np.ndarray, time_unit: Unit | Literal["auto", "none"]) -> Unit | None:
    if time_unit == "auto":
        return recognise_unit(times)
    return None if time_unit == "none" else time_unit


def _some_times(file: pq.ParquetFile, name: str) -> np.ndarray:
    """Least and greatest time of each row group if the file states them, else the first times in it."""
    place = file.schema_arrow.names.index(name)
    groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
    columns = [group.column(place) for group in groups if group.num_rows]
    if columns and all(column.path_in_schema == name for column in columns):
        statistics = [column.statistics for column in columns]
        bounds = [bound for one in statistics if one and one.has_min_max for bound in (one.min, one.max)]
        if bounds and len({recognise_unit(np.array([bound])) for bound in bounds}) == 1:
            return np.array(bounds)
    batch = next(file.iter_batches(_SAMPLE_ROWS, columns=[name]), None)
    return np.empty(0) if batch is None else batch.column(0).drop_null().to_numpy(zero_copy_only=False)


def _missing_columns(
    present: Sequence[str], names: ColumnNames, partitions: dict[str, str | None]
) -> dict[str, str | None]:
    """The wanted columns that only the path holds, with their values.

    Raises ``UnreadableFile`` for a column that is nowhere.
    """
    kinds = {"user": names.user, "item": names.item, "time": names.time, "event": names.event}
    for kind, name in kinds.items():
        if name is not None and present.count(name) > 1:
            raise UnreadableFile(f"column {name} is there {present.count(name)} times")
        if name is not None and name not in present and name not in partitions:
            raise UnreadableFile(
                f"no column {name}; the columns are {', '.join(present)}; "
                f"name the right one with --{kind}-column"
            )
    return {name: partitions[name] for name in names.wanted() if name not in present}


def _id_type(field: pa.Field) -> ColumnType:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if pa.types.is_integer(kind):
        return "int64"
    if _is_text(kind):
        return "string"
    raise UnreadableFile(f"column {field.name} is {field.type}; ids must be integers or strings")


def _check_is_text(field: pa.Field) -> None:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if not _is_text(kind) and not pa.types.is_integer(kind):
        raise UnreadableFile(f"column {field.name} is {field.type}; events must be strings or integers")


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _time_type(field: pa.Field) -> ColumnType:
    if pa.types.is_integer(field.type) or field.type in (pa.float32(), pa.float64()):
        return "number"
    if pa.types.is_timestamp(field.type) or pa.types.is_date(field.type):
        return "instant"
    raise UnreadableFile(f"column {field.name} is {field.type}; times must be numbers, timestamps or dates")


def _delimiter(header: str) -> str | None:
    most = max(_DELIMITERS, key=header.count)
    return most if most in header else None


def _split(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [])
