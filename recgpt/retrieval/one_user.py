"""One user as people want to see it: the history, the candidates, and the titles of their items."""

import datetime
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from recgpt import storage
from recgpt.data.arrow import combine, content_errors
from recgpt.data.dataset import HistoryDataset
from recgpt.data.times import UNITS
from recgpt.errors import UserError
from recgpt.retrieval.candidates import CandidatesManifest, part_name, part_order, read_part
from recgpt.retrieval.user_selection import find_user, one_id
from recgpt.schema import ITEM_IDS, ITEM_INDICES, SCORES, STEPS, TIMESTAMPS, USER_ID

_PARQUET_MAGIC = b"PAR1"


class Interaction(NamedTuple):
    item_id: int | str
    time: str
    """Empty if the dataset has no times."""


class Candidate(NamedTuple):
    item_id: int | str
    step: int
    score: float


class OneUser(NamedTuple):
    history: list[Interaction]
    """In time order; empty for a user that the dataset does not know."""
    candidates: list[Candidate]


def read_user(url: str, manifest: CandidatesManifest, dataset: HistoryDataset, user_id: str) -> OneUser:
    """Find a user's history, and its candidates in the one part that belongs to the history's row group.

    Raises ``UserError`` if the user has no candidates in the folder.
    """
    found = find_user(dataset, user_id)
    if found is not None:
        parts = [part_name(found[0])]
    else:  # users that the dataset does not know come in parts of their own, after those of the row groups
        first = part_order(part_name(len(dataset.row_groups)))
        parts = [file.path for file in manifest.files if part_order(file.path) >= first]
    user = one_id(user_id, dataset)
    for file in manifest.files:
        if file.path not in parts:
            continue
        table = read_part(url, file)
        row = pc.index(combine(table[USER_ID]), user[0]).as_py()
        if row >= 0:
            lists = table.slice(row, 1).to_pylist()[0]
            candidates = zip(lists[ITEM_IDS], lists[STEPS], lists[SCORES], strict=True)
            history = [] if found is None else _history(dataset, *found)
            return OneUser(history, [Candidate(*some) for some in candidates])
    raise UserError(f"{url}: no candidates for user {user[0].as_py()!r}; were they asked for?")


def _history(dataset: HistoryDataset, part: int, row: int) -> list[Interaction]:
    columns = [name for name in dataset.columns if name in (ITEM_INDICES, TIMESTAMPS)]
    history = dataset.read_row_group(dataset.row_groups[part], columns).slice(row, 1).to_pylist()[0]
    items = dataset.vocabulary().decode(np.array(history[ITEM_INDICES], np.int64)).to_pylist()
    times = history.get(TIMESTAMPS)
    texts = (
        [""] * len(items) if times is None else [_text(time, dataset.manifest.time_unit) for time in times]
    )
    return [Interaction(*pair) for pair in zip(items, texts, strict=True)]


def _text(time: int, unit: str | None) -> str:
    """An instant to the second as ISO text in UTC, or the log's plain number."""
    ticks = {str(name): ticks for name, ticks in UNITS.items()}.get(unit or "")
    if ticks is None:
        return str(time)
    start = datetime.datetime(1970, 1, 1)
    try:
        return (start + datetime.timedelta(seconds=time // ticks)).isoformat(sep=" ")
    except OverflowError:  # beyond Python's calendar
        return str(time)


def read_titles(path: str, item_column: str, title_column: str, ids: pa.Array) -> dict[Any, str]:
    """The titles of some items, as far as a CSV or Parquet file has them.

    Raises ``UserError`` if the file cannot be read, or lacks one of the columns.
    """
    try:
        data = storage.read_bytes(path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; --items takes a CSV or Parquet file with titles") from None
    columns = [item_column, title_column]
    with content_errors(lambda reason: UserError(f"{path}: not a readable file of items ({reason})")):
        if data.startswith(_PARQUET_MAGIC):
            table = pq.read_table(pa.BufferReader(data), columns=columns)
        else:
            types = pa.csv.ConvertOptions(
                include_columns=columns, column_types={item_column: ids.type, title_column: pa.string()}
            )
            table = pa.csv.read_csv(pa.BufferReader(data), convert_options=types)
        for name in columns:
            if table.column_names.count(name) != 1:
                count = table.column_names.count(name) or "no"
                advice = "name it with --item-column or --title-column"
                raise UserError(f"{path}: {count} column {name}; {advice}")
        items = table[item_column].cast(ids.type)
        titles = pc.fill_null(table[title_column].cast(pa.string()), "")
        titles.validate(full=True)
    chosen = pc.is_in(items, value_set=ids)
    return dict(zip(items.filter(chosen).to_pylist(), titles.filter(chosen).to_pylist(), strict=True))
