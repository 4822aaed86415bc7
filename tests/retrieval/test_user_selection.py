"""Which users candidates are wanted for: lists as users write them, and their place in the dataset."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgpt.errors import UserError
from recgpt.retrieval.user_selection import all_users, read_user_list, selected_users


@pytest.fixture
def dataset(write_dataset, tmp_path):
    """Fifty users, 100 to 149, in row groups of eight."""
    return write_dataset(tmp_path, {user: ["a", "b", "c"] for user in range(100, 150)}, row_group_users=8)


def ids_of(dataset, units) -> list[int]:
    ids: list[int] = []
    for unit in units:
        users = dataset.read_row_group(unit.row_group, ["user_id"])["user_id"].to_pylist()
        ids += users if unit.rows is None else [users[row] for row in unit.rows]
    return ids


def user_list(tmp_path, content: str | bytes) -> str:
    path = tmp_path / "users"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_all_users_are_every_row_group(dataset):
    units = all_users(dataset)
    assert [(unit.part, unit.num_users) for unit in units] == [
        (0, 8),
        (1, 8),
        (2, 8),
        (3, 8),
        (4, 8),
        (5, 8),
        (6, 2),
    ]
    assert sorted(ids_of(dataset, units)) == list(range(100, 150))


def test_listed_users_are_found_once_each(dataset, tmp_path):
    units = selected_users(dataset, user_list(tmp_path, "149\n100\n 117 \r\n\n100\n"))
    assert sorted(ids_of(dataset, units)) == [100, 117, 149]
    assert sum(unit.num_users for unit in units) == 3


def test_units_keep_the_part_of_their_row_group(dataset, tmp_path):
    wanted = dataset.read_row_group(dataset.row_groups[5], ["user_id"])["user_id"][3].as_py()
    (unit,) = selected_users(dataset, user_list(tmp_path, str(wanted)))
    assert (unit.part, unit.row_group, unit.rows.tolist()) == (5, dataset.row_groups[5], [3])


def test_every_user_may_be_listed(dataset, tmp_path):
    path = tmp_path / "users.parquet"
    pq.write_table(pa.table({"user_id": pa.array(range(149, 99, -1), pa.int32()), "other": [0] * 50}), path)
    assert sorted(ids_of(dataset, selected_users(dataset, str(path)))) == list(range(100, 150))


def test_unknown_users_are_counted_and_the_first_is_named(dataset, tmp_path):
    with pytest.raises(UserError, match="2 of 4 users are not in .*, the first is 7;"):
        selected_users(dataset, user_list(tmp_path, "100\n7\n101\n5\n"))


def test_string_ids(write_dataset, tmp_path):
    (tmp_path / "dataset").mkdir()
    dataset = write_dataset(tmp_path / "dataset", {"Zoë": [1], "x y": [2], "007": [1]})
    units = selected_users(dataset, user_list(tmp_path, "\ufeff007\nx y\nZoë"))
    assert sorted(ids_of(dataset, units)) == ["007", "Zoë", "x y"]
    with pytest.raises(UserError, match="1 of 1 users are not in .*, the first is '7'"):
        selected_users(dataset, user_list(tmp_path, "7"))


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
        read_user_list(user_list(tmp_path, content), pa.int64())


def test_missing_lists_and_folders(tmp_path):
    with pytest.raises(UserError, match="no such file; --users takes"):
        read_user_list(str(tmp_path / "absent"), pa.int64())
    with pytest.raises(UserError, match="is a folder"):
        read_user_list(str(tmp_path), pa.int64())


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"user": [1]}, "no column user_id; it has user"),
        ({"user_id": [1, None]}, "1 rows have no user_id"),
        ({"user_id": [1.5]}, "the dataset's user ids are int64"),
        ({"user_id": pa.array([[1]])}, "the dataset's user ids are int64"),
        ({"user_id": pa.array([], pa.int64())}, "names no user"),
    ],
)
def test_parquet_lists_that_cannot_be_used(tmp_path, table, message):
    pq.write_table(pa.table(table), tmp_path / "users.parquet")
    with pytest.raises(UserError, match=message):
        read_user_list(str(tmp_path / "users.parquet"), pa.int64())
