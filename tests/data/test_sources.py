"""Finding the files of a log, recognising their formats, and the errors for what is wrong with them."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgpt.data.sources import ColumnNames, find_sources
from recgpt.errors import UserError

NAMES = ColumnNames()


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def find(*inputs, format="auto", names=NAMES):
    return find_sources([str(path) for path in inputs], format, names)


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
        ("7", "sequences", None),
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


def test_kind_of_time_is_seen_in_the_first_row_that_has_one(tmp_path):
    dates = write(tmp_path / "dates.csv", "user_id,item_id,timestamp\n1,2,\n1,3,2026-01-01 10:00:00\n")
    numbers = write(tmp_path / "numbers.csv", "user_id,item_id,timestamp\n1,2,8.8e8\n")
    assert [source.time_type for source in find(dates)] == ["instant"]
    assert [source.time_type for source in find(numbers)] == ["number"]
    with pytest.raises(
        UserError, match=r"differ in kind \(instant in .*dates.csv, number in .*numbers.csv\)"
    ):
        find(dates, numbers)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b"\n \n", "the file is empty"),
        (b"PAR1 cut short", "cannot be read"),
        (b"\xff\xfe\x00\x01", "cannot be read"),
        (b"user_id,item,timestamp\n1,2,3\n", "no column item_id; the columns are user_id, item, timestamp"),
        (b"196\t242\t3\n186\t302\t3\n22\t377\t1\n", "give --format csv and the names of the columns"),
    ],
)
def test_what_is_wrong_with_a_file_is_named(tmp_path, content, message):
    path = tmp_path / "log"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        find(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_column_types_that_cannot_be_ids_or_times(tmp_path):
    good = {"user_id": [1], "item_id": [1], "timestamp": [1]}
    for column, value in (("user_id", 1.5), ("item_id", b"x"), ("timestamp", "noon")):
        pq.write_table(pa.table({**good, column: [value]}), tmp_path / "log.parquet")
        with pytest.raises(UserError, match=f"column {column} is"):
            find(tmp_path / "log.parquet")


def test_inputs_that_are_not_there(tmp_path):
    (tmp_path / "empty").mkdir()
    for name, message in (("gone", "no such file"), ("*.csv", "no such file"), ("empty", "no files in it")):
        with pytest.raises(UserError, match=message):
            find(tmp_path / name)


def test_unknown_format(tmp_path):
    with pytest.raises(UserError, match="--format json: unknown format; known are auto, parquet"):
        find(tmp_path, format="json")
