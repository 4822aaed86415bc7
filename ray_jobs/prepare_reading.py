"""Reading a log for `recgpt prepare`: one Ray task per piece cleans its rows and divides them by user."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa
import ray

from recgpt import storage
from recgpt.data import preparation
from recgpt.data.dataset import BadFile
from recgpt.data.interactions import BAD_VALUES, MISSING_VALUES, OtherTokens, Wanted
from recgpt.data.preparation import BatchCounts, Piece
from recgpt.data.sources import Source
from recgpt.data.summary import BadRow
from recgpt.errors import UserError
from recgpt.progress import progress_bar
from recgpt.schema import QUARANTINE_FOLDER, USER_ID

BAD_ROWS_SHOWN = 20
BAD_FILES_FILE = "files.json"


@dataclass
class DividedLog:
    """The interactions of a log as pieces in Ray's object store."""

    buckets: list[list[Any]]
    """References to tables of interactions; those of a bucket hold all that its users did."""
    num_rows: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    bad_files: list[BadFile] = field(default_factory=list)
    bad_rows: list[BadRow] = field(default_factory=list)
    """The first ones."""


class LogReader:
    """Reads the sources into ``num_buckets`` buckets; what is bad is kept in the folder's quarantine."""

    def __init__(
        self,
        sources: Sequence[Source],
        bad_files: Sequence[BadFile],
        folder: str,
        num_buckets: int,
        item_ids: pa.Array | None,
    ):
        self.sources = sources
        self.bad_files = list(bad_files)
        self.folder = folder
        self.num_buckets = num_buckets
        self.item_ids = None if item_ids is None else ray.put(item_ids)

    def read(self, wanted: Wanted, max_bad_fraction: float) -> tuple[DividedLog, Wanted]:
        """The log, and what it was read as: strings where ids that looked like integers are not.

        Raises ``UserError`` if too much of the log is bad.
        """
        self._check_files(self.bad_files, max_bad_fraction)
        while True:
            try:
                log = self._read(wanted)
            except OtherTokens as error:
                storage.remove(storage.join(self.folder, QUARANTINE_FOLDER))  # what is bad is seen anew
                column = "user_type" if str(error) == USER_ID else "item_type"
                wanted = replace(wanted, **{column: pa.string()})
                continue
            self._check_files(log.bad_files, max_bad_fraction)
            self._check_rows(log, max_bad_fraction)
            return log, wanted

    def _read(self, wanted: Wanted) -> DividedLog:
        pieces = preparation.cut_in_pieces(self.sources)
        task = ray.remote(preparation.divide).options(num_returns="streaming")
        streams = [
            task.remote(piece, wanted, self.num_buckets, self.folder, self.item_ids) for piece in pieces
        ]
        batches: list[tuple[Piece, BatchCounts, list[Any]]] = []
        bad_files = {file.path: file for file in self.bad_files}
        expected = sum(source.approximate_rows for source in self.sources)
        with progress_bar("prepare: read", expected, "interaction") as bar:
            for piece, stream in zip(pieces, streams, strict=True):
                for first, tables in self._batches(piece, stream):
                    if isinstance(first, OtherTokens):
                        for other in streams:
                            ray.cancel(other)
                        raise first
                    if isinstance(first, BadFile):
                        bad_files[first.path] = first
                        continue
                    batches.append((piece, first, tables))
                    bar.update(first.rows)
        return self._whole_files(batches, bad_files)

    def _batches(self, piece: Piece, stream: Iterator[Any]) -> Iterator[tuple[Any, list[Any]]]:
        """What ``preparation.divide`` yields, in groups: something small, and references to its tables.

        Raises ``UserError`` if a file, damaged or made to harm, was the end of the process that read it.
        """
        try:
            for reference in stream:
                first = ray.get(reference)
                count = self.num_buckets if isinstance(first, BatchCounts) else 0
                tables = [table for _, table in zip(range(count), stream, strict=False)]
                if len(tables) < count:
                    ray.get(reference)  # the task has failed: this says why
                    ray.get(tables)
                yield first, tables
        except (ray.exceptions.OutOfMemoryError, ray.exceptions.WorkerCrashedError):
            others = f" or one of the {len(piece.sources) - 1} after it" if len(piece.sources) > 1 else ""
            raise UserError(
                f"{piece.sources[0].url}{others}: whoever reads it runs out of memory or crashes; "
                "leave it out, or split it in smaller files"
            ) from None

    def _whole_files(
        self, batches: list[tuple[Piece, BatchCounts, list[Any]]], bad_files: dict[str, BadFile]
    ) -> DividedLog:
        """The log without batches of files that turned out unreadable further on."""
        log = DividedLog([[] for _ in range(self.num_buckets)])
        log.bad_files = [file for _, file in sorted(bad_files.items())]
        for piece, counts, tables in batches:
            if len(piece.sources) == 1 and piece.sources[0].url in bad_files:
                continue
            log.num_rows += counts.rows
            log.dropped.update(counts.dropped)
            if len(log.bad_rows) < BAD_ROWS_SHOWN:
                log.bad_rows += counts.bad_rows
            for bucket, table in zip(log.buckets, tables, strict=True):
                bucket.append(table)
        del log.bad_rows[BAD_ROWS_SHOWN:]
        if log.bad_files:
            reasons = [{"file": file.path, "reason": file.reason} for file in log.bad_files]
            storage.write_json(storage.join(self.folder, QUARANTINE_FOLDER, BAD_FILES_FILE), reasons)
        return log

    def _check_files(self, bad_files: Sequence[BadFile], max_bad_fraction: float) -> None:
        if not bad_files:
            return
        known = {source.url: source for source in self.sources}
        first = bad_files[0]
        for file in bad_files:
            if file.path in known and known[file.path].format == "dataset":
                raise UserError(f"{file.path}: damaged ({file.reason}); prepare the older dataset again")
        bad_bytes = sum(file.bytes for file in bad_files)
        all_bytes = sum(
            source.size for source in self.sources if source.url not in {f.path for f in bad_files}
        )
        share = bad_bytes / max(bad_bytes + all_bytes, 1)
        if share > max_bad_fraction or not all_bytes:
            others = len(bad_files) - 1
            more = f" (and {others} more unreadable file{'s' * (others > 1)})" if others else ""
            limit = (
                f"; {share:.1%} of the log's bytes, above --max-bad-fraction {max_bad_fraction:g}"
                if all_bytes
                else ""
            )
            raise UserError(f"{first.path}: {first.reason}{more}{limit}")

    def _check_rows(self, log: DividedLog, max_bad_fraction: float) -> None:
        older = sum(source.approximate_rows for source in self.sources if source.format == "dataset")
        num_rows = log.num_rows - older
        bad = log.dropped[MISSING_VALUES] + log.dropped[BAD_VALUES]
        if bad <= max_bad_fraction * num_rows:
            return
        first = log.bad_rows[0]
        raise UserError(
            f"{first.path}: row {first.row}: {first.reason}; {bad:,} of {num_rows:,} rows are bad, above "
            f"--max-bad-fraction {max_bad_fraction:g}; mend them or raise it (all are listed in "
            f"{storage.join(self.folder, QUARANTINE_FOLDER)})"
        )
