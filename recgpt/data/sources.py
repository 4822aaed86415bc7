"""The files of an interaction log: finding them, recognising their format, checking their columns."""

import csv
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import has_magic
from typing import Literal

import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from recgpt import storage
from recgpt.errors import UserError
from recgpt.schema import ITEM_ID, TIMESTAMP, USER_ID

Format = Literal["parquet", "csv", "recbole", "sequences"]
FORMATS: tuple[Format, ...] = ("parquet", "csv", "recbole", "sequences")

ColumnType = Literal["int64", "string", "text", "number", "instant", "position"]
"""Ids: "int64" and "string" as stored, "text" if only the tokens of all files together decide between them.
Times: "number" as in the log, "instant" for dates and Arrow timestamps, "position" in a line of items."""

_SAMPLE_BYTES = 1 << 16
_OPEN_AT_ONCE = 16
_PARQUET_MAGIC = b"PAR1"
_RECBOLE_FIELD = re.compile(r"(.+):(token|token_seq|float|float_seq)")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?")
_DELIMITERS = ("\t", ",", ";", "|")
_FEWEST_LINES_OF_A_TABLE = 3


@dataclass(frozen=True)
class ColumnNames:
    """What the log calls its columns; in a RecBole file without the type suffix."""

    user: str = USER_ID
    item: str = ITEM_ID
    time: str = TIMESTAMP


@dataclass(frozen=True)
class Source:
    """One input file, and how to read it."""

    url: str
    format: Format
    size: int
    """Bytes."""
    approximate_rows: int
    """Interactions, exact for Parquet, else judged by the first lines."""
    columns: ColumnNames | None = None
    """Names as they stand in the file; None for `sequences`."""
    delimiter: str | None = None
    """Between two fields of a line, for `csv` and `recbole`."""
    user_type: ColumnType = "text"
    item_type: ColumnType = "text"
    time_type: ColumnType = "position"


def find_sources(inputs: Sequence[str], format: str, names: ColumnNames) -> list[Source]:
    """The files that files, folders and globs (paths or URLs) stand for, sorted, each described.

    ``format`` is one of ``FORMATS`` or "auto", which recognises each file by its content.
    Raises ``UserError`` for an unknown format, an input that is not there, a file that cannot be
    read or recognised, a missing column, and times of different kinds.
    """
    if format not in ("auto", *FORMATS):
        raise UserError(f"--format {format}: unknown format; known are auto, {', '.join(FORMATS)}")
    urls = sorted({url for pattern in inputs for url in _find_files(pattern)})
    with ThreadPoolExecutor(_OPEN_AT_ONCE) as threads:  # object stores answer slowly, but many at once
        sources = list(threads.map(lambda url: _describe(url, format, names), urls))
    first_of_kind = {source.time_type: source for source in reversed(sources)}
    if len(first_of_kind) > 1:
        examples = ", ".join(f"{kind} in {source.url}" for kind, source in sorted(first_of_kind.items()))
        raise UserError(f"the times of the input files differ in kind ({examples}); prepare them separately")
    return sources


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

    These are markers and leftovers, not data.
    """
    files = filesystem.find(path)
    return [file for file in files if not re.search(r"/[._]", file[len(folder) :])]


def _describe(url: str, format: str, names: ColumnNames) -> Source:
    filesystem, path = storage.filesystem_and_path(url)
    try:
        size = filesystem.size(path)
        with filesystem.open(path, "rb") as file:
            sample = file.read(_SAMPLE_BYTES)
            if format == "parquet" or (format == "auto" and sample.startswith(_PARQUET_MAGIC)):
                file.seek(0)
                return _describe_parquet(url, size, pq.ParquetFile(file), names)
        text = sample.decode("utf-8-sig", errors="strict" if size <= len(sample) else "ignore")
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{url}: cannot be read: {' '.join(str(error).split())}") from None
    lines = text.splitlines()[: None if size <= len(sample) else -1] or [text]
    if not text.strip():
        raise UserError(f"{url}: the file is empty")
    recognised = recognise_text(lines, names, url) if format == "auto" else format
    if recognised == "sequences":
        return Source(
            url, "sequences", size, _scale_up(sum(len(line.split()) - 1 for line in lines), lines, size)
        )
    return _describe_table(url, recognised, size, lines, names)


def recognise_text(lines: Sequence[str], names: ColumnNames, url: str) -> str:
    """`recbole`, `csv` or `sequences`, from the first lines of a text file.

    Raises ``UserError`` for a table without a header that names a known column: its lines could
    also be histories.
    """
    header = _split(lines[0], "\t")
    if all(_RECBOLE_FIELD.fullmatch(field) for field in header):
        return "recbole"
    delimiter = _delimiter(lines[0])
    if delimiter is None:
        return "sequences"
    if delimiter != "\t" or {names.user, names.item, names.time} & set(header):
        return "csv"
    if len(lines) >= _FEWEST_LINES_OF_A_TABLE and len({line.count("\t") for line in lines if line}) == 1:
        raise UserError(
            f"{url}: may be a table or histories, the format cannot be recognised; give --format csv "
            "and the names of the columns, or --format sequences"
        )
    return "sequences"


def _describe_table(url: str, format: str, size: int, lines: Sequence[str], names: ColumnNames) -> Source:
    delimiter = "\t" if format == "recbole" else _delimiter(lines[0]) or ","
    header = _split(lines[0], delimiter)
    plain = [_RECBOLE_FIELD.sub(r"\1", field) for field in header] if format == "recbole" else header
    _check_columns(url, plain, names)
    in_file = ColumnNames(*(header[plain.index(name)] for name in (names.user, names.item, names.time)))
    place = header.index(in_file.time)
    rows = (_split(line, delimiter) for line in lines[1:] if line)
    time = next((row[place].strip() for row in rows if len(row) > place and row[place].strip()), "0")
    time_type: ColumnType = "number" if _NUMBER.fullmatch(time) else "instant"
    chosen: Format = "recbole" if format == "recbole" else "csv"
    num_rows = _scale_up(len(lines) - 1, lines, size)
    return Source(url, chosen, size, num_rows, in_file, delimiter, "text", "text", time_type)


def _scale_up(count: int, lines: Sequence[str], size: int) -> int:
    """What a count over the first lines would be over the whole file."""
    return count * size // max(sum(len(line) + 1 for line in lines), 1)


def _describe_parquet(url: str, size: int, file: pq.ParquetFile, names: ColumnNames) -> Source:
    schema = file.schema_arrow
    _check_columns(url, schema.names, names)
    user, item = (_id_type(url, schema.field(name)) for name in (names.user, names.item))
    time = _time_type(url, schema.field(names.time))
    return Source(url, "parquet", size, file.metadata.num_rows, names, None, user, item, time)


def _check_columns(url: str, present: Sequence[str], names: ColumnNames) -> None:
    for kind, name in (("user", names.user), ("item", names.item), ("time", names.time)):
        if name not in present:
            raise UserError(
                f"{url}: no column {name}; the columns are {', '.join(present)}; "
                f"name the right one with --{kind}-column"
            )


def _id_type(url: str, field: pa.Field) -> ColumnType:
    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if pa.types.is_integer(kind):
        return "int64"
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return "string"
    raise UserError(f"{url}: column {field.name} is {field.type}; ids must be integers or strings")


def _time_type(url: str, field: pa.Field) -> ColumnType:
    if pa.types.is_integer(field.type) or pa.types.is_floating(field.type):
        return "number"
    if pa.types.is_timestamp(field.type) or pa.types.is_date(field.type):
        return "instant"
    raise UserError(f"{url}: column {field.name} is {field.type}; times must be numbers, timestamps or dates")


def _delimiter(header: str) -> str | None:
    most = max(_DELIMITERS, key=header.count)
    return most if most in header else None


def _split(line: str, delimiter: str) -> list[str]:
    return next(csv.reader([line], delimiter=delimiter), [])
