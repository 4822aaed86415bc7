"""Finding the files of a log, recognising their formats, and the errors for what is wrong with them."""

import errno
import gzip

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgpt.data.finding import find_sources, partitions_of
from recgpt.data.sources import ColumnNames
from recgpt.errors import UserError

NAMES = ColumnNames()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def find(*inputs, format="auto", names=NAMES, time_unit="auto"):
    sources, bad_files = find_sources([str(path) for path in inputs], format, names, time_unit)
    assert bad_files == []
    return sources


def reason(path):
    """Why the one file is not fit to be read."""
    sources, (bad_file,) = find_sources([str(path)], "auto", NAMES)
    assert sources == []
    assert (bad_file.path, bad_file.bytes) == (str(path), path.stat().st_size)
    assert "\n" not in bad_file.reason
    return bad_file.reason


@pytest.mark.parametrize(
    ("text", "format", "delimiter"),
    [
        ("user_id,item_id,timestamp\n1,2,3\n", "csv", ","),
        ("timestamp;item_id;user_id;price\n1;2;3;4\n", "csv", ";"),
        ("user_id\titem_id\ttimestamp\n1\t2\t3\n", "csv", "\t"),
        ("\ufeffuser_id,item_id,timestamp\n1,2,3\n", "csv", ","),
        ("user_id:token\titem_id:token\ttimestamp:float\n1\t2\t3\n", "recbole", "\t"),
        ("1 10 20\n2 30\n", "sequences", None),
        ("ann\tx\ty\nbob\tz\n", "sequences", None),
    ],
)
def test_text_formats_are_recognised_by_content(tmp_path, text, format, delimiter):
    (source,) = find(write(tmp_path / "log", text))
    assert (source.format, source.delimiter) == (format, delimiter)


def test_parquet_is_recognised_by_content(tmp_path):
    table = pa.table({"user_id": ["a"], "item_id": pa.array([1], pa.int32()), "timestamp": [1.5]})
    pq.write_table(table, tmp_path / "log.txt")
    (source,) = find(tmp_path / "log.txt")
    assert (source.format, source.user_type, source.item_type, source.time_type) == (
        "parquet",
        "string",
        "int64",
        "number",
    )
    assert source.approximate_rows == 1


def test_recbole_columns_are_named_without_their_types(tmp_path):
    path = write(
        tmp_path / "log.inter", "uid:token\titem_id:token\trating:float\ttimestamp:float\n1\t2\t3\t4\n"
    )
    (source,) = find(path, names=ColumnNames(user="uid"))
    assert source.columns == ColumnNames("uid:token", "item_id:token", "timestamp:float")


def test_folders_and_globs_stand_for_their_files_once_each(tmp_path):
    for name in ("a.csv", "day/b.csv", "_marker", ".hidden.csv", "_temporary/c.csv"):
        write(tmp_path / "log" / name, "user_id,item_id,timestamp\n1,2,3\n")
    files = [str(tmp_path / "log" / name) for name in ("a.csv", "day/b.csv")]
    assert [source.url for source in find(tmp_path / "log")] == files
    assert [source.url for source in find(tmp_path / "log" / "*.csv", *files)] == files
    assert [source.url for source in find(tmp_path / "log" / "d*")] == files[1:]


def test_kind_of_time_is_what_most_of_the_first_rows_have(tmp_path):
    dates = write(tmp_path / "dates.csv", "user_id,item_id,timestamp\n1,2,\n1,3,2026-01-01 10:00:00\n")
    order = write(tmp_path / "order.csv", "user_id,item_id,timestamp\n1,2,7\n1,2,noon\n1,3,9\n")
    seconds = write(tmp_path / "seconds.csv", "user_id,item_id,timestamp\n1,2,8.8e8\n")
    found = find(dates) + find(order) + find(seconds)
    assert [source.time_type for source in found] == ["instant", "number", "number"]
    assert [source.time_unit for source in found] == ["microseconds", None, "seconds"]
    assert [source.time_type for source in find(dates, seconds)] == ["instant", "number"]
    with pytest.raises(UserError, match=r"in kind \(plain numbers in .*order.csv, times since 1970 in .*sec"):
        find(order, seconds)


@pytest.mark.parametrize(
    ("times", "unit"),
    [
        ([1_700_000_000], "seconds"),
        ([1_700_000_000_000], "milliseconds"),
        ([1_700_000_000_000_000], "microseconds"),
        ([1_700_000_000_000_000_000], "nanoseconds"),
        ([1.7e9, 1.8e9, None], "seconds"),
        ([0, 1_700_000_000, 1_700_000_001], "seconds"),  # one broken time decides nothing
        ([1, 2, 3], None),
        ([None], None),
    ],
)
def test_unit_of_plain_numbers(tmp_path, times, unit):
    ids = ["a"] * len(times)
    pq.write_table(
        pa.table({"user_id": ids, "item_id": ids, "timestamp": times}), tmp_path / "log.parquet"
    ) if times != [None] else pq.write_table(
        pa.table({"user_id": ids, "item_id": ids, "timestamp": pa.array(times, pa.int64())}),
        tmp_path / "log.parquet",
    )
    assert [source.time_unit for source in find(tmp_path / "log.parquet")] == [unit]
    lines = ["user_id,item_id,timestamp", *(f"a,b,{'' if time is None else time}" for time in times)]
    assert [source.time_unit for source in find(write(tmp_path / "log.csv", "\n".join(lines)))] == [unit]
    given = find(tmp_path / "log.parquet", time_unit="milliseconds")
    assert [source.time_unit for source in given] == ["milliseconds"]


def test_folders_in_the_manner_of_hive_are_columns(tmp_path):
    path = write(tmp_path / "log" / "event=a%20b" / "date=2026-01-01" / "x.csv", "user_id,item_id\n1,2\n")
    names = ColumnNames(time="date", event="event")
    (source,) = find(tmp_path / "log", names=names)
    assert source.url == path
    assert source.partitions == {"date": "2026-01-01", "event": "a b"}
    assert source.time_type == "instant"
    assert partitions_of("s3://b/k=__HIVE_DEFAULT_PARTITION__/k2=/f=1.csv") == {"k": None, "k2": ""}


def test_a_column_in_the_file_is_preferred_to_one_in_the_path(tmp_path):
    write(tmp_path / "timestamp=5" / "x.csv", "user_id,item_id,timestamp\n1,2,1700000000\n")
    (source,) = find(tmp_path / "timestamp=5" / "x.csv")
    assert (source.partitions, source.time_unit) == ({}, "seconds")


def test_a_file_without_a_last_newline_or_without_times_misleads_nobody(tmp_path):
    """Its rows count, and its unit is taken from other files if it shows none."""
    log = write(tmp_path / "a.csv", "user_id,item_id,timestamp\n1,9,1700000000500")
    (source,) = find(log)
    assert (source.approximate_rows, source.time_unit) == (1, "milliseconds")
    timeless = write(tmp_path / "b.csv", "user_id,item_id,timestamp\n1,2,\n")
    assert [source.has_times for source in find(log, timeless)] == [True, False]
    blank = write(tmp_path / "c.txt", "\nu1 a\n\n\nu2 b\n\n")
    assert [(source.format, source.approximate_rows) for source in find(blank)] == [("sequences", 2)]


def test_a_time_in_the_path_may_be_a_number(tmp_path):
    folder = tmp_path / "timestamp=1700000000"
    write(folder / "a.csv", "user_id,item_id\n1,2\n")
    pq.write_table(pa.table({"user_id": [1], "item_id": [2]}), folder / "b.parquet")
    assert [(source.time_type, source.time_unit) for source in find(folder)] == [("number", "seconds")] * 2


def test_line_ends_inside_quotes_do_not_make_rows(tmp_path):
    log = write(tmp_path / "a.csv", 'user_id,item_id,timestamp,text\n1,2,1700000000,"a\nx,y,z,w\nb"\n')
    assert [source.user_type for source in find(log)] == ["text_of_integers"]


def test_gzip_is_recognised_by_content(tmp_path):
    (tmp_path / "log").write_bytes(gzip.compress(b"user_id,item_id,timestamp\n1,2,1700000000\n", mtime=0))
    (source,) = find(tmp_path / "log")
    assert (source.format, source.compressed, source.time_unit) == ("csv", True, "seconds")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (b"PAR1 cut short", "cannot be read"),
        (b"\x1f\x8b\x08cut short", "cannot be read"),
        (b"\xff\xfe\x00\x01", "no line has a user and an item"),
        (b"ok\n", "no line has a user and an item"),
        (b"u1 a b\ru2 c d\r", "end with a carriage return alone"),
        (gzip.compress(b"user_id,item_id,timestamp\n" * 99, mtime=0)[:40] + b"spoilt", "cannot be read"),
        (b"user_id,item_id,timestamp,timestamp\n1,2,3,4\n", "column timestamp is there 2 times"),
        (b"user_id,item,timestamp\n1,2,3\n", "no column item_id; the columns are user_id, item, timestamp"),
        (b"196\t242\t3\n186\t302\t3\n22\t377\t1\n", "give --format csv and the names of the columns"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, content, message):
    path = tmp_path / "log"
    path.write_bytes(content)
    assert message in reason(path)


def test_column_types_that_cannot_be_ids_or_times(tmp_path):
    good = {"user_id": [1], "item_id": [1], "timestamp": [1]}
    for column, value in (("user_id", 1.5), ("item_id", b"x"), ("timestamp", "noon")):
        pq.write_table(pa.table({**good, column: [value]}), tmp_path / "log.parquet")
        assert f"column {column} is" in reason(tmp_path / "log.parquet")


def test_a_column_of_an_extension_type_is_no_id_but_may_stand_beside(tmp_path):
    uuids = pa.ExtensionArray.from_storage(pa.uuid(), pa.array([b"0123456789abcdef"], pa.binary(16)))
    good = {"user_id": [1], "item_id": [1], "timestamp": [1]}
    pq.write_table(pa.table({**good, "session": uuids}), tmp_path / "good.parquet")
    assert len(find(tmp_path / "good.parquet")) == 1
    pq.write_table(pa.table({**good, "user_id": uuids}), tmp_path / "bad.parquet")
    assert "user_id is extension<arrow.uuid>; ids must be" in reason(tmp_path / "bad.parquet")


def test_a_truncated_parquet_file_is_no_source(tmp_path):
    path = tmp_path / "log.parquet"
    pq.write_table(pa.table({c: list(range(1000)) for c in ("user_id", "item_id", "timestamp")}), path)
    path.write_bytes(path.read_bytes()[:-100])
    assert "cannot be read" in reason(path)


def test_a_file_that_the_system_withholds_is_no_bad_file(tmp_path, monkeypatch):
    def withheld(url, compressed):
        raise PermissionError(errno.EACCES, "Permission denied", url)

    monkeypatch.setattr("recgpt.data.finding.open_file", withheld)
    with pytest.raises(PermissionError):
        find(write(tmp_path / "log.csv", "user_id,item_id,timestamp\n1,2,3\n"))


def test_inputs_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (("gone", "no such file"), ("*.csv", "no such file"), ("empty", "no files in it")):
        with pytest.raises(UserError, match=message):
            find(tmp_path / name)


def test_unknown_format(tmp_path):
    with pytest.raises(UserError, match="--format json: unknown format; known are auto, parquet"):
        find(tmp_path, format="json")
