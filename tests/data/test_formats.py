"""The readers: what is written in a format comes back as the same interactions."""

import datetime
import gzip

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recgpt.data import formats
from recgpt.data.finding import find_sources
from recgpt.data.formats import read_batches
from recgpt.data.interactions import Wanted, clean
from recgpt.data.sources import ColumnNames, Source, UnreadableFile

STRINGS = Wanted(pa.string(), pa.string(), None)
INTEGERS = Wanted(pa.int64(), pa.int64(), None)

any_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
# Tokens without whitespace and delimiters, such as every text format can hold.
tokens = st.text(st.characters(categories=["L", "N", "S"], exclude_characters="|"), min_size=1, max_size=6)
instants = st.integers(-(2**53), 2**53)
logs = st.lists(st.tuples(tokens, tokens, instants), min_size=1, max_size=20)


def batches_of(path, format="auto", names=None):
    (source,), bad_files = find_sources([str(path)], format, names or ColumnNames(), "none")
    assert bad_files == []
    return source, list(read_batches(source))


def read(path, wanted=STRINGS, format="auto", names=None):
    """Complete rows of a file."""
    source, batches = batches_of(path, format, names)
    tables = [clean(batch, source, wanted).interactions for batch in batches]
    return [tuple(row.values()) for table in tables for row in table.to_pylist()]


def as_table(log):
    users, items, times = zip(*log, strict=True)
    return pa.table({"user_id": users, "item_id": items, "timestamp": pa.array(times, pa.int64())})


@any_folder
@given(logs)
def test_parquet_comes_back(tmp_path, log):
    pq.write_table(as_table(log), tmp_path / "log.parquet", row_group_size=3)
    assert read(tmp_path / "log.parquet") == log


@any_folder
@given(st.lists(st.tuples(st.text(), st.text(), instants), min_size=1), st.sampled_from(",\t;|"))
def test_csv_comes_back(tmp_path, log, delimiter):
    log = [
        (u.replace("\n", "").replace("\r", ""), i.replace("\n", "").replace("\r", ""), t) for u, i, t in log
    ]
    options = pyarrow.csv.WriteOptions(delimiter=delimiter, quoting_style="needed")
    pyarrow.csv.write_csv(as_table(log), tmp_path / "log.csv", options)
    assert read(tmp_path / "log.csv", format="csv") == [(u, i, t) for u, i, t in log if u and i]


@any_folder
@given(logs)
def test_recbole_comes_back(tmp_path, log):
    lines = ["user_id:token\titem_id:token\trating:float\ttimestamp:float"]
    lines += [f"{user}\t{item}\t5\t{time}" for user, item, time in log]
    (tmp_path / "log.inter").write_text("\n".join(lines), encoding="utf-8")
    assert read(tmp_path / "log.inter") == log


@any_folder
@given(
    st.dictionaries(tokens, st.lists(tokens, min_size=1, max_size=5), min_size=1, max_size=6),
    st.sampled_from(["\n", "\r\n", " \n", "\n\n"]),
    st.booleans(),
    st.integers(1, 40),
)
def test_sequences_come_back_whatever_the_size_of_a_read(tmp_path, histories, line_end, ends, read_size):
    text = line_end.join(" ".join([user, *items]) for user, items in histories.items())
    (tmp_path / "log.txt").write_bytes((text + line_end * ends).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_BYTES_AT_ONCE", read_size)
        interactions = read(tmp_path / "log.txt", format="sequences")
    assert interactions == [(u, i, place) for u, items in histories.items() for place, i in enumerate(items)]


def test_user_without_items_gives_one_row_without_an_item(tmp_path):
    (tmp_path / "log.txt").write_text("1 10 11\n2\n\n3 10\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formats, "_BYTES_AT_ONCE", 9)
        _, batches = batches_of(tmp_path / "log.txt")
    rows = [
        row
        for batch in batches
        for row in zip(
            batch.row, batch.user.to_pylist(), batch.item.to_pylist(), batch.time.to_pylist(), strict=True
        )
    ]
    assert rows == [(1, "1", "10", 0), (1, "1", "11", 1), (2, "2", None, 0), (4, "3", "10", 0)]


def test_integers_of_any_width_and_dictionaries(tmp_path):
    table = pa.table(
        {
            "user_id": pa.array([1, 2], pa.uint8()),
            "item_id": pa.array([5, 6], pa.int32()),
            "timestamp": pa.array([2.9, None]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", INTEGERS) == [(1, 5, 2)]
    table = table.set_column(0, "user_id", pa.array(["x", "y"]).dictionary_encode())
    pq.write_table(table, tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet") == [("x", "5", 2)]


@pytest.mark.parametrize(
    "instant",
    [
        pa.array([datetime.datetime(1970, 1, 2)], pa.timestamp("s")),
        pa.array([86_400_000_000_999], pa.int64()).cast(pa.timestamp("ns")),
        pa.array([86_400_000], pa.int64()).cast(pa.timestamp("ms", "Europe/Berlin")),
        pa.array([datetime.date(1970, 1, 2)], pa.date32()),
    ],
)
def test_instants_become_microseconds(tmp_path, instant):
    pq.write_table(pa.table({"user_id": ["a"], "item_id": ["b"], "timestamp": instant}), tmp_path / "p")
    assert read(tmp_path / "p") == [("a", "b", 86_400_000_000)]


@pytest.mark.parametrize(
    ("text", "microseconds"),
    [
        ("1970-01-02", 86_400_000_000),
        ("1970-01-01 00:00:01", 1_000_000),
        ("1970-01-01T00:00:01.5Z", 1_500_000),
        ("1970-01-01T01:00:00+01:00", 0),
        ("-3", -3),
        ("8.5e2", 850),
    ],
)
def test_times_written_as_text(tmp_path, text, microseconds):
    (tmp_path / "log.csv").write_text(f"timestamp,user_id,item_id\n{text},a,b\n")
    assert read(tmp_path / "log.csv") == [("a", "b", microseconds)]
    (tmp_path / "log.csv.gz").write_bytes(gzip.compress((tmp_path / "log.csv").read_bytes()))
    assert read(tmp_path / "log.csv.gz") == [("a", "b", microseconds)]


def test_header_alone_is_no_interaction(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n")
    assert read(tmp_path / "log.csv") == []


@pytest.mark.parametrize("block_size", [30, 1 << 20])
def test_rows_with_too_many_or_too_few_fields_are_numbered(tmp_path, monkeypatch, block_size):
    monkeypatch.setattr(formats, "_BYTES_AT_ONCE", block_size)
    lines = ["a,b,1", "c,d", "e,f,2", "g,h,3,4", "i,j,5", "k,l,6", "m"]
    (tmp_path / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines]))
    _, batches = batches_of(tmp_path / "log.csv")
    numbers = [
        row for batch in batches for row in zip(batch.row.tolist(), batch.user.to_pylist(), strict=True)
    ]
    assert numbers == [(1, b"a"), (3, b"e"), (5, b"i"), (6, b"k")]
    assert [row for batch in batches for row in batch.broken] == [
        (2, "3 fields expected, found 2", "c,d"),
        (4, "3 fields expected, found 4", "g,h,3,4"),
        (7, "3 fields expected, found 1", "m"),
    ]


def test_row_groups_of_parquet_keep_their_numbers(tmp_path):
    log = [("u", str(number), number) for number in range(10)]
    pq.write_table(as_table(log), tmp_path / "log.parquet", row_group_size=3)
    source, whole = batches_of(tmp_path / "log.parquet")
    assert source.row_groups == (3, 3, 3, 1)
    assert np.concatenate([batch.row for batch in whole]).tolist() == list(range(1, 11))
    (some,) = read_batches(source, row_groups=(1, 2))
    assert some.row.tolist() == [4, 5, 6, 7, 8, 9]
    assert some.item.to_pylist() == ["3", "4", "5", "6", "7", "8"]


def test_columns_of_the_path_stand_in_every_row(tmp_path):
    folder = tmp_path / "timestamp=1970-01-02"
    folder.mkdir()
    pq.write_table(as_table([("u", "a", 0), ("v", "b", 0)]).drop(["timestamp"]), folder / "x.parquet")
    assert read(folder / "x.parquet") == [("u", "a", 86_400_000_000), ("v", "b", 86_400_000_000)]


def test_histories_of_a_dataset_come_back_as_interactions(tmp_path):
    table = pa.table(
        {
            "user_id": ["u", "v", "w"],
            "user_hash": [1, 2, 3],
            "item_indices": pa.array([[1, 3], [], [3]], pa.list_(pa.int32())),
            "timestamps": pa.array([[5, 6], [], [7]], pa.list_(pa.int64())),
        }
    )
    pq.write_table(table, tmp_path / "part.parquet", row_group_size=2)
    source = Source(str(tmp_path / "part.parquet"), "dataset", 0, 3)
    batches = list(read_batches(source, item_ids=pa.array(["a", "b", "c"])))
    rows = [
        row
        for batch in batches
        for row in zip(batch.user.to_pylist(), batch.item.to_pylist(), batch.time.to_pylist(), strict=True)
    ]
    assert rows == [("u", "a", 5), ("u", "c", 6), ("w", "c", 7)]


def test_truncated_parquet_page_is_an_error(tmp_path):
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({c: list(range(1000)) for c in ("user_id", "item_id", "timestamp")}), path)
    content = bytearray(path.read_bytes())
    content[4:600] = bytes(596)
    path.write_bytes(content)
    with pytest.raises(UnreadableFile, match="cannot be read as parquet"):
        read(path, INTEGERS)
