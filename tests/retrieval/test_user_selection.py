"""Which users candidates are wanted for: lists as users write them, and their place in the dataset."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgpt.errors import UserError
from recgpt.retrieval import user_selection
from recgpt.retrieval.user_selection import (
    all_users,
    checksum_of_units,
    find_user,
    hash_bounds,
    select_users,
)


def selected_users(dataset, path):
    return select_users(dataset, path, None)


@pytest.fixture
def dataset(write_dataset, tmp_path):
    """Fifty users, 100 to 149, in row groups of eight."""
    return write_dataset(tmp_path, {user: ["a", "b", "c"] for user in range(100, 150)}, row_group_users=8)


def ids_of(dataset, units) -> list[int]:
    return [user for unit in units for user in unit.histories(dataset)["user_id"].to_pylist()]


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


def test_unknown_users_come_last_in_units_of_their_own(dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(user_selection, "UNKNOWN_USERS_PER_PART", 2)
    units = selected_users(dataset, user_list(tmp_path, "7\n100\n5\n7\n1\n101\n"))
    *known, first, second = units
    assert sorted(ids_of(dataset, known)) == [100, 101]
    assert [(unit.part, unit.num_users) for unit in (first, second)] == [(7, 2), (8, 1)]
    assert ids_of(dataset, [first, second]) == [7, 5, 1]
    assert first.histories(dataset)["item_indices"].to_pylist() == [[], []]
    assert first.histories(dataset).schema.equals(known[0].histories(dataset).schema)


def test_only_row_groups_that_can_hold_a_listed_user_are_read(dataset, tmp_path, monkeypatch):
    read = []
    original = type(dataset).read_row_group

    def counted(self, row_group, columns=None):
        read.append(row_group.index)
        return original(self, row_group, columns)

    monkeypatch.setattr(type(dataset), "read_row_group", counted)
    selected_users(dataset, user_list(tmp_path, "117"))
    assert len(read) <= 1


def test_another_filter_goes_with_a_list(dataset, tmp_path):
    wanted = user_list(tmp_path, "100\n7\n101\n102\n")
    everyone = select_users(dataset, wanted, lambda part: np.ones(dataset.row_groups[part].rows, bool))
    assert sorted(ids_of(dataset, everyone)) == [100, 101, 102]  # the unknown one cannot have changed
    assert select_users(dataset, wanted, lambda part: np.zeros(dataset.row_groups[part].rows, bool)) == []


def test_bounds_are_those_of_the_hashes(dataset):
    for row_group, bounds in zip(dataset.row_groups, hash_bounds(dataset), strict=True):
        hashes = dataset.read_row_group(row_group)["user_hash"].to_pylist()
        assert bounds.tolist() == [min(hashes), max(hashes)]


def test_one_user_is_found(dataset):
    for part, row_group in enumerate(dataset.row_groups):
        for row, user in enumerate(dataset.read_row_group(row_group)["user_id"].to_pylist()):
            assert find_user(dataset, str(user)) == (part, row)
    assert find_user(dataset, "7") is None
    with pytest.raises(UserError, match="--user u7: the user ids of .* are integers"):
        find_user(dataset, "u7")


def test_the_checksum_tells_selections_apart(dataset, tmp_path):
    lists = ["100\n101", "101\n100\n100", "100", "100\n102", "100\n101\n7", "100\n101\n8", "100\n101\n7\n8"]
    sums = [checksum_of_units(selected_users(dataset, user_list(tmp_path, text))) for text in lists]
    assert sums[0] == sums[1]
    assert len({*sums, checksum_of_units(all_users(dataset))}) == len(lists)


def test_string_ids(write_dataset, tmp_path):
    (tmp_path / "dataset").mkdir()
    dataset = write_dataset(tmp_path / "dataset", {"Zoë": [1], "x y": [2], "007": [1]})
    units = selected_users(dataset, user_list(tmp_path, "\ufeff007\nx y\nZoë"))
    assert sorted(ids_of(dataset, units)) == ["007", "Zoë", "x y"]
    (unknown,) = selected_users(dataset, user_list(tmp_path, "7"))
    assert unknown.unknown_users.to_pylist() == ["7"]
