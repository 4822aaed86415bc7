"""The files of an interaction log: what is known of each, and how it is opened."""

import contextlib
import gzip
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import IO, Literal, cast

from recgpt import storage
from recgpt.data.arrow import content_errors
from recgpt.data.dataset import HistoryDataset
from recgpt.data.times import UNITS, Unit
from recgpt.errors import UserError, presentable
from recgpt.schema import ITEM_ID, TIMESTAMP, USER_ID

Format = Literal["parquet", "csv", "recbole", "sequences", "dataset"]
FORMATS: tuple[Format, ...] = ("parquet", "csv", "recbole", "sequences")  # that a log may have

ColumnType = Literal["int64", "string", "text_of_integers", "text", "number", "instant", "position"]
"""Ids: "int64" and "string" as stored; "text" where a file has no types, "text_of_integers" if its first
lines hold integers only, in their usual form.
Times: "number" as in the log, "instant" for dates and Arrow timestamps, "position" in a line of items."""

# Inside gzip a log has a tenth of its size, or less; what unfolds to very much more was made to harm.
_MOST_TEXT_IN_GZIP = 100
_ALWAYS_ALLOWED = 1 << 26  # bytes of text

CANONICAL_INTEGER = r"^(0|-?[1-9][0-9]{0,18})$"


class UnreadableFile(Exception):
    """A file that cannot be read as a log; the message is the reason, without the file's name."""

    def __init__(self, reason: str):
        super().__init__(presentable(reason))


def unreadable_if_broken(problem: str) -> contextlib.AbstractContextManager[None]:
    """Turns errors about the content of a file into ``UnreadableFile``; ``problem`` begins its message."""
    return content_errors(lambda reason: UnreadableFile(f"{problem}: {reason}"))


@dataclass(frozen=True)
class ColumnNames:
    """What the log calls its columns; in a RecBole file without the type suffix."""

    user: str = USER_ID
    item: str = ITEM_ID
    time: str = TIMESTAMP
    event: str | None = None
    """Type of event; None if it is not asked for."""

    def wanted(self) -> list[str]:
        """The columns that are read."""
        return [self.user, self.item, self.time, *([self.event] if self.event else [])]


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
    """Names as they stand in the file; None for `sequences` and `dataset`."""
    delimiter: str | None = None
    """Between two fields of a line, for `csv` and `recbole`."""
    compressed: bool = False
    """A text file inside gzip."""
    partitions: dict[str, str | None] = field(default_factory=dict)
    """Columns that the path holds (`date=2026-01-01/`) and the file does not."""
    row_groups: tuple[int, ...] = ()
    """Rows of each row group of a Parquet file."""
    user_type: ColumnType = "text"
    item_type: ColumnType = "text"
    time_type: ColumnType = "position"
    time_unit: Unit | None = None
    """Of numbers and instants; None for numbers that are too small to be times since 1970."""
    has_times: bool = True
    """False if the first rows, from which kind and unit of the times are judged, hold none."""
    footer_sha256: str | None = None
    """What the checksum of the footer of a file of the format `dataset` must be; None for any."""


def check_kinds_of_time(sources: Sequence[Source]) -> None:
    """Raises ``UserError`` if some files have times since 1970, others plain numbers or positions only."""
    examples = {_kind_of_time(source): source.url for source in reversed(sources) if source.has_times}
    if len(examples) > 1:
        listed = ", ".join(f"{kind} in {url}" for kind, url in sorted(examples.items()))
        raise UserError(f"the times of the input files differ in kind ({listed}); prepare them separately")


def _kind_of_time(source: Source) -> str:
    if source.time_type == "position":
        return "positions"
    return "plain numbers" if source.time_unit is None else "times since 1970"


@contextlib.contextmanager
def open_file(url: str, compressed: bool) -> Iterator[IO[bytes]]:
    """A file to read, decompressed if it is inside gzip."""
    filesystem, path = storage.filesystem_and_path(url)
    with filesystem.open(path, "rb") as file:
        if not compressed:
            yield file
            return
        limit = max(_MOST_TEXT_IN_GZIP * filesystem.size(path), _ALWAYS_ALLOWED)
        with gzip.open(file) as text, _AtMost(text, limit) as bounded:
            yield cast(IO[bytes], bounded)


class _AtMost(io.RawIOBase):
    """A stream that ends in ``UnreadableFile`` where it gets longer than allowed: a small file must not fill
    memory or disk."""

    def __init__(self, stream: gzip.GzipFile, limit: int):
        self._stream = stream
        self._left = limit

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        data = self._stream.read(self._left + 1 if size < 0 else size)
        self._left -= len(data)
        if self._left < 0:
            raise UnreadableFile(
                f"its text is more than {_MOST_TEXT_IN_GZIP} times as long as its gzip file; "
                "if that is right, give the text itself"
            )
        return data


def sources_of(dataset: HistoryDataset) -> list[Source]:
    """The part files of a prepared dataset, to be read like files of a log; its times must be known."""
    manifest = dataset.manifest
    unit = manifest.time_unit if manifest.time_unit in UNITS else None
    return [
        Source(
            storage.join(dataset.url, file.path),
            "dataset",
            size=0,
            approximate_rows=file.interactions,
            row_groups=tuple(users * file.interactions // file.rows for users in file.row_groups),
            user_type=manifest.user_id_type,
            item_type=manifest.item_id_type,
            time_type="number",
            time_unit=unit,
            footer_sha256=file.footer_sha256,
        )
        for file in manifest.files
    ]
