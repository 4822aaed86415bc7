"""The readers: what is written in a format comes back as the same interactions."""

import datetime

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recgpt.data import formats
from recgpt.data.formats import interaction_schema, read_source
from recgpt.data.sources import ColumnNames, find_sources
from recgpt.errors import UserError

STRINGS = interaction_schema(pa.string(), pa.string())
INTEGERS = interaction_schema(pa.int64(), pa.int64())

any_folder = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
# Tokens without whitespace and delimiters, such as every text format can hold.
tokens = st.text(st.characters(categories=["L", "N", "S"], exclude_characters="|"), min_size=1, max_size=6)
instants = st.integers(-(2**53), 2**53)
logs = st.lists(st.tuples(tokens, tokens, instants), min_size=1, max_size=20)


def read(path, schema=STRINGS, format="auto", names=None):
    (source,) = find_sources([str(path)], format, names or ColumnNames())
    table = pa.concat_tables(read_source(source, schema))
    assert table.schema == schema
    return [tuple(row.values()) for row in table.to_pylist()]


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
    assert read(tmp_path / "log.csv", format="csv") == [(u or None, i or None, t) for u, i, t in log]


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
    assert read(tmp_path / "log.txt") == [("1", "10", 0), ("1", "11", 1), ("2", None, 0), ("3", "10", 0)]


def test_integers_of_any_width_and_dictionaries(tmp_path):
    table = pa.table(
        {
            "user_id": pa.array([1, 2], pa.uint8()),
            "item_id": pa.array([5, 6], pa.int32()),
            "timestamp": pa.array([2.9, None]),
        }
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet", INTEGERS) == [(1, 5, 2), (2, 6, None)]
    table = table.set_column(0, "user_id", pa.array(["x", "y"]).dictionary_encode())
    pq.write_table(table, tmp_path / "b.parquet")
    assert read(tmp_path / "b.parquet") == [("x", "5", 2), ("y", "6", None)]


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


def test_header_alone_is_no_interaction(tmp_path):
    (tmp_path / "log.csv").write_text("user_id,item_id,timestamp\n")
    assert read(tmp_path / "log.csv") == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("user_id,item_id,timestamp\n1,2,3\n4,5\n", "cannot be read as csv: .*Expected 3 columns, got 2"),
        ("user_id,item_id,timestamp\n1,2,3\n4,5,noon\n", "cannot be read as csv: .*'noon'"),
    ],
)
def test_broken_rows_are_named(tmp_path, text, message):
    (tmp_path / "log.csv").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path / "log.csv")
    assert "\n" not in str(error.value)


def test_truncated_parquet_page_is_an_error(tmp_path):
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({c: list(range(1000)) for c in ("user_id", "item_id", "timestamp")}), path)
    content = bytearray(path.read_bytes())
    content[4:600] = bytes(596)
    path.write_bytes(content)
    with pytest.raises(UserError, match="cannot be read as parquet"):
        read(path, INTEGERS)
