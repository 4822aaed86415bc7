"""Logs, read as `recgpt prepare` reads them but for Ray: found, cleaned, grouped, written."""

import gzip
import random
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from benchmarks.fuzzing import goods
from benchmarks.fuzzing.mutators import spoiled_bytes
from benchmarks.fuzzing.readers import Input, Place, Reader, problem_of_message, spoiled_folder
from recgpt.data import preparation
from recgpt.data.dataset import BadFile, history_columns
from recgpt.data.finding import find_sources
from recgpt.data.interactions import OtherTokens, Wanted
from recgpt.data.preparation import BatchCounts, PartFiles
from recgpt.data.prepare_settings import PrepareSettings, what_is_wanted
from recgpt.data.sources import ColumnNames, Source

FORMATS = {
    "log.parquet": "parquet",
    "log.csv": "csv",
    "quoted.csv": "csv",
    "log.csv.gz": "csv",
    "log.inter": "recbole",
    "log.txt": "sequences",
}
INT64 = np.iinfo(np.int64)


@dataclass
class LogReader(Reader):
    """One log file of one format."""

    file: str = ""

    def make_good(self, place: Place) -> None:
        place.folder.mkdir()
        (place.folder / self.file).write_bytes(goods.log_files()[self.file])

    def spoil(self, chance: random.Random, place: Place) -> Input:
        given = spoiled_folder(self.good, chance, place)
        if self.file.endswith(".gz") and chance.random() < 0.5:  # else gzip's own checksum sees all
            text = gzip.decompress(self.good[self.file])
            given = Input({self.file: gzip.compress(spoiled_bytes(text, chance))}, "bytes of the text inside")
        given.more = chance.choice(("auto", FORMATS[self.file]))
        return given

    def read(self, place: Place, given: Input) -> dict[str, Any]:
        return read_log(place, given.more or "auto")

    def is_quarantined(self, value: dict[str, Any]) -> bool:
        return bool(value["bad files"] or value["bad rows"])

    def objection(self, value: dict[str, Any], truth: Any, given: Input) -> str | None:
        if problems := list(filter(None, map(problem_of_message, value["bad files"] + value["bad rows"]))):
            return problems[0]
        counted = len(value["rows"]) + sum(value["dropped"].values())
        if counted != value["num_rows"]:
            return f"{value['num_rows']} rows were read, {counted} are accounted for"
        if value["bad files"]:
            return None if not value["rows"] else "rows of an unreadable file were taken"
        if any(None in row for row in value["rows"]):
            return "a row without a value"
        if "gzip of" in given.how:  # too long to be looked at twice
            return None
        data = given.files.get(self.file, b"")
        text = gzip.decompress(data) if value["compressed"] else data
        if value["format"] == "sequences":
            return _compare(value["rows"], *_rows_of_sequences(text))
        if value["format"] in ("csv", "recbole") and b'"' not in text and b"\r" not in text:
            return _compare(value["rows"], *_rows_of_table(text, value))
        return None


def read_log(place: Place, format: str) -> dict[str, Any]:
    """What `recgpt prepare` makes of the files of a folder: interactions, and what it leaves out."""
    sources, bad_files = find_sources([str(place.folder)], format, ColumnNames())
    result: dict[str, Any] = {
        "bad files": [file.reason for file in bad_files], "bad rows": [], "rows": [], "dropped": Counter(),
        "num_rows": 0, "format": None, "compressed": False, "unit": None, "columns": None, "delimiter": None,
    }  # fmt: skip
    if not sources:
        return result
    settings = PrepareSettings(format=format)
    wanted = what_is_wanted(sources, settings)
    while True:
        counts, bad, tables, other = _divided(sources, wanted, str(place.root))
        if other is None:
            break
        wanted = replace(wanted, **{"user_type" if other == "user_id" else "item_type": pa.string()})
    result["bad files"] += [file.reason for file in bad]
    source = sources[0]
    result |= {"format": source.format, "compressed": source.compressed, "delimiter": source.delimiter}
    result["columns"] = source.columns and source.columns.wanted()
    result["bad rows"] = [row.reason for one in counts for row in one.bad_rows]
    result["num_rows"] = sum(one.rows for one in counts)
    for one in counts:
        result["dropped"].update(one.dropped)
    interactions = pa.concat_tables(tables)
    result["rows"] = list(zip(*(column.to_pylist() for column in interactions.columns), strict=True))
    if len(interactions):
        _write(interactions, settings, source, wanted, place)
    return result


def _divided(
    sources: list[Source], wanted: Wanted, folder: str
) -> tuple[list[BatchCounts], list[BadFile], list[pa.Table], str | None]:
    counts: list[BatchCounts] = []
    bad: list[BadFile] = []
    tables: list[pa.Table] = []
    for piece in preparation.cut_in_pieces(sources):
        found = list(preparation.divide(piece, wanted, 1, folder))
        if found and isinstance(found[-1], OtherTokens):
            return [], [], [], str(found[-1])
        unreadable = [one for one in found if isinstance(one, BadFile)]
        bad += unreadable
        if unreadable and len(piece.sources) == 1:
            continue  # as `prepare` does: what came before is void
        counts += [one for one in found if isinstance(one, BatchCounts)]
        tables += [one for one in found if isinstance(one, pa.Table)]
    return counts, bad, tables or [wanted.schema.empty_table()], None


def _write(
    interactions: pa.Table, settings: PrepareSettings, source: Source, wanted: Wanted, place: Place
) -> None:
    """The steps of `prepare` that come after reading, with their own checks."""
    has_times = source.time_type != "position"
    built, histories = preparation.build(settings, has_times, interactions)
    new_index = np.arange(len(built.item_ids) + 1, dtype=np.int32)
    files = PartFiles(str(place.root / "output"), history_columns(has_times), 0, 1, 1)
    is_new = np.zeros(len(built.item_ids) + 1, np.bool_)
    preparation.write_parts(histories, new_index, files, wanted.time_unit, 0, is_new)


def _compare(rows: list[tuple], certain: list[tuple], possible: list[tuple]) -> str | None:
    """Rows, as text, against those that must be among them, and those that may."""
    found = Counter(tuple(map(str, row)) for row in rows)
    certain_rows, possible_rows = Counter(certain), Counter(pair[:2] for pair in [*certain, *possible])
    if missing := certain_rows - found:
        return f"rows are missing: {list(missing)[:2]}"
    if further := Counter(tuple(map(str, row[:2])) for row in rows) - possible_rows:
        return f"rows that are not in the file: {list(further)[:2]}"
    return None


def _rows_of_sequences(text: bytes) -> tuple[list[tuple], list[tuple]]:
    whitespace = " \t\n\v\f\r"
    rows = []
    for line in text.decode("utf-8-sig").split("\n"):
        user, *items = _split_at(line, whitespace) or [""]
        rows += [(user, item, str(place)) for place, item in enumerate(items)]
    return rows, []


def _split_at(line: str, characters: str) -> list[str]:
    for character in characters:
        line = line.replace(character, " ")
    return [token for token in line.split(" ") if token]


def _rows_of_table(text: bytes, value: dict[str, Any]) -> tuple[list[tuple], list[tuple]]:
    """Rows whose time is a plain number, and rows with another time, which may be one or not."""
    delimiter = value["delimiter"].encode()
    header, *lines = [line for line in text.removeprefix(b"\xef\xbb\xbf").split(b"\n") if line]
    places = [header.split(delimiter).index(name.encode()) for name in value["columns"]]
    certain, possible = [], []
    for line in lines:
        fields = line.split(delimiter)
        if len(fields) != len(header.split(delimiter)):
            continue
        try:
            user, item, time = (fields[place].decode() for place in places)
        except UnicodeDecodeError:
            continue
        if not (user and item and time):
            continue
        plain = time.isascii() and time.isdigit() and str(int(time)) == time and int(time) <= INT64.max
        (certain if plain and len(time) <= 15 else possible).append((user, item, time))
    return certain, possible


class LogBesideGoodOne(LogReader):
    """A bad file beside a good one, of which nothing may be lost."""

    def make_good(self, place: Place) -> None:
        place.folder.mkdir()
        (place.folder / self.file).write_bytes(goods.log_files()[self.file])
        (place.folder / "good.csv").write_bytes(goods.log_files()["log.csv"])

    def spoil(self, chance: random.Random, place: Place) -> Input:
        file = chance.choice(sorted(FORMATS))
        given = spoiled_folder({file: goods.log_files()[file]}, chance, place)
        given.files["good.csv"] = self.good["good.csv"]
        return given

    def objection(self, value: dict[str, Any], truth: Any, given: Input) -> str | None:
        rows = {(str(user), item) for user, item, _ in value["rows"]}
        if lost := {(str(user), item) for user, item, _ in goods.LOG} - rows:
            return f"rows of the good file are lost: {sorted(lost)[:3]}"
        return None


def log_readers() -> list[LogReader]:
    single = [LogReader(f"log: {name}", file=name) for name in FORMATS]
    return [*single, LogBesideGoodOne("log: beside a good one", file="log.inter")]
