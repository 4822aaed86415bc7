"""Lists of ids as users write them, and the items that they allow."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgpt.data.vocabulary import Vocabulary
from recgpt.errors import UserError
from recgpt.retrieval.id_files import allowed_items, read_ids

VOCABULARY = Vocabulary(pa.array(["a", "b", "c", "d"]), np.ones(4, np.int64))


def read_users(tmp_path, content):
    path = tmp_path / "users"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_ids(str(path), "user_id", pa.int64(), "--users")


def item_list(tmp_path, name, *items):
    path = tmp_path / name
    path.write_text("\n".join(items))
    return str(path)


def test_ids_come_once_in_the_order_of_the_list(tmp_path):
    assert read_users(tmp_path, "3\n 1 \n\n3\r\n2").to_pylist() == [3, 1, 2]
    table = pa.table({"item_id": ["b", "a", "b"], "other": [1, 2, 3]})
    pq.write_table(table, tmp_path / "items.parquet")
    items = read_ids(str(tmp_path / "items.parquet"), "item_id", pa.string(), "--only-items")
    assert items.to_pylist() == ["b", "a"]


@pytest.mark.parametrize(
    ("exclude", "only", "allowed"),
    [
        (None, None, [1, 2, 3, 4]),
        ("ac", None, [2, 4]),
        (None, "da", [1, 4]),
        ("a", "ab", [2]),
    ],
)
def test_items_that_are_allowed(tmp_path, exclude, only, allowed):
    paths = [
        text and item_list(tmp_path, name, *text) for name, text in (("exclude", exclude), ("only", only))
    ]
    indices, unknown = allowed_items(VOCABULARY, *paths)
    assert indices.tolist() == allowed
    assert indices.dtype == np.int64
    assert set(unknown.values()) <= {0}


def test_unknown_items_are_counted(tmp_path):
    path = item_list(tmp_path, "only", "x", "a", "y", "x")
    indices, unknown = allowed_items(VOCABULARY, None, path)
    assert (indices.tolist(), unknown) == ([1], {path: 2})


def test_lists_that_leave_nothing(tmp_path):
    unknown = item_list(tmp_path, "unknown", "x", "y")
    with pytest.raises(UserError, match="unknown: none of its 2 items is in the dataset; check --only-items"):
        allowed_items(VOCABULARY, None, unknown)
    with pytest.raises(UserError, match="leave no item"):
        allowed_items(VOCABULARY, item_list(tmp_path, "all", *"abcd"), None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no user"),
        ("\n  \n", "names no user"),
        ("12\nabc\n", "the dataset's user ids are int64: .*abc"),
        (b"\xff\xfe1\x00", "neither UTF-8 text nor Parquet"),
        (b"PAR1 but no more", "not a readable Parquet file"),
    ],
)
def test_lists_that_cannot_be_read(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        read_users(tmp_path, content)


def test_missing_lists_and_folders(tmp_path):
    with pytest.raises(UserError, match="no such file; --users takes"):
        read_ids(str(tmp_path / "absent"), "user_id", pa.int64(), "--users")
    with pytest.raises(UserError, match="is a folder"):
        read_ids(str(tmp_path), "user_id", pa.int64(), "--users")


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"user": [1]}, "no column user_id; it has user"),
        ({"user_id": [1, None]}, "1 rows have no user_id"),
        ({"user_id": [1.5]}, "the dataset's user ids are int64"),
        ({"user_id": pa.array([[1]])}, "column user_id is list<.*; ids must be integers or strings"),
        ({"user_id": [True]}, "column user_id is bool; ids must be integers or strings"),
        ({"user_id": pa.array([], pa.int64())}, "names no user"),
    ],
)
def test_parquet_lists_that_cannot_be_used(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "users.parquet")
    with pytest.raises(UserError, match=message):
        read_ids(str(tmp_path / "users.parquet"), "user_id", pa.int64(), "--users")
