"""The order of reading: every user once, the same for any number of ranks, resumable anywhere."""

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt.config import SplitSettings
from recgpt.data.hashing import stable_hash
from recgpt.data.plan import ReadUnit, epoch_units, read_unit

SPLIT = SplitSettings()

PLANS = st.fixed_dictionaries(
    {
        "row_counts": st.lists(st.integers(0, 7), max_size=6),
        "total_lanes": st.integers(1, 6),
        "window_users": st.integers(1, 20),
        "shuffle": st.tuples(st.integers(0, 5), st.integers(0, 5)),
    }
)


def plan(row_counts, total_lanes, window_users, shuffle, lanes=None, consumed=None):
    lanes = range(total_lanes) if lanes is None else lanes
    consumed = [0] * total_lanes if consumed is None else consumed
    return epoch_units(row_counts, list(lanes), total_lanes, window_users, shuffle, consumed)


def users_of(unit, row_counts):
    """The users of a unit in reading order; user = (row group, place in it)."""
    window = [(group, place) for group in unit.row_groups for place in range(row_counts[group])]
    order = np.random.default_rng(unit.shuffle_key).permutation(len(window))
    return [window[place] for place in order[unit.start : unit.end]]


def streams(units, row_counts, total_lanes):
    """The users of each lane, in reading order."""
    return [
        [user for unit in units if unit.lane == lane for user in users_of(unit, row_counts)]
        for lane in range(total_lanes)
    ]


@given(PLANS)
def test_every_user_is_read_exactly_once_in_lanes_of_equal_length(settings):
    lanes = streams(plan(**settings), settings["row_counts"], settings["total_lanes"])
    everyone = {(group, place) for group, rows in enumerate(settings["row_counts"]) for place in range(rows)}
    assert sorted(user for lane in lanes for user in lane) == sorted(everyone)
    lengths = [len(lane) for lane in lanes]
    assert max(lengths) - min(lengths) <= 1


@given(PLANS, st.integers(1, 4))
def test_the_units_of_all_ranks_do_not_depend_on_the_number_of_ranks(settings, world_size):
    lanes = range(settings["total_lanes"])
    together = [
        unit for rank in range(world_size) for unit in plan(**settings, lanes=lanes[rank::world_size])
    ]
    alone = plan(**settings)
    assert sorted(together, key=lambda unit: unit.lane) == sorted(alone, key=lambda unit: unit.lane)


@given(PLANS, st.data())
def test_a_cursor_skips_exactly_what_was_consumed(settings, data):
    row_counts, total_lanes = settings["row_counts"], settings["total_lanes"]
    whole = streams(plan(**settings), row_counts, total_lanes)
    consumed = [data.draw(st.integers(0, len(lane))) for lane in whole]
    rest = streams(plan(**settings, consumed=consumed), row_counts, total_lanes)
    assert rest == [lane[skipped:] for lane, skipped in zip(whole, consumed, strict=True)]


def test_lanes_take_turns():
    units = plan([2, 2, 2, 2], total_lanes=2, window_users=2, shuffle=(0, 0))
    assert [unit.lane for unit in units] == [0, 1, 0, 1]
    assert [(unit.start, unit.end) for unit in units] == [(0, 2)] * 4
    assert sorted(unit.row_groups for unit in units) == [(0,), (1,), (2,), (3,)]


def test_units_by_hand_where_a_window_is_cut_between_lanes():
    only_window = {"row_groups": (0,), "shuffle_key": (7, 3, 0)}
    assert plan([5], total_lanes=2, window_users=1, shuffle=(7, 3)) == [
        ReadUnit(lane=0, start=0, end=2, **only_window),
        ReadUnit(lane=1, start=2, end=5, **only_window),
    ]
    assert plan([5], total_lanes=2, window_users=1, shuffle=(7, 3), consumed=[2, 1]) == [
        ReadUnit(lane=1, start=3, end=5, **only_window)
    ]


def test_more_lanes_than_users_leaves_lanes_empty():
    units = plan([2], total_lanes=5, window_users=10, shuffle=(0, 0))
    assert len(units) == 2
    assert len({unit.lane for unit in units}) == 2


@pytest.mark.parametrize("row_counts", [[], [0], [0, 0]])
def test_without_users_there_are_no_units(row_counts):
    assert plan(row_counts, total_lanes=3, window_users=4, shuffle=(0, 0)) == []


def test_a_window_as_large_as_the_dataset_holds_all_row_groups():
    for window_users in (12, 1_000_000):
        (unit,) = plan([4, 4, 4], total_lanes=1, window_users=window_users, shuffle=(0, 0))
        assert sorted(unit.row_groups) == [0, 1, 2]
        assert (unit.start, unit.end) == (0, 12)


def test_a_small_window_holds_whole_row_groups_and_the_last_may_be_short():
    units = plan([4] * 5, total_lanes=1, window_users=5, shuffle=(0, 0))
    assert [len(unit.row_groups) for unit in units] == [2, 2, 1]
    assert [unit.end - unit.start for unit in units] == [8, 8, 4]


def test_each_epoch_and_seed_has_its_own_order_and_the_same_one_again():
    row_counts = [10] * 4

    def order(seed, epoch):
        units = plan(row_counts, total_lanes=1, window_users=20, shuffle=(seed, epoch))
        (lane,) = streams(units, row_counts, 1)
        return lane

    orders = [order(0, 0), order(0, 1), order(1, 0), order(1, 1)]
    assert all(a != b for number, a in enumerate(orders) for b in orders[:number])
    assert orders[0] != sorted(orders[0])
    assert order(1, 0) == orders[2]


def test_row_groups_come_in_another_order_each_epoch_and_each_window_has_its_own_shuffle():
    def windows(epoch):
        return plan([3] * 8, total_lanes=1, window_users=3, shuffle=(0, epoch))

    orders = [[unit.row_groups for unit in windows(epoch)] for epoch in range(3)]
    assert orders[0] != sorted(orders[0])
    assert orders[0] != orders[1] != orders[2] != orders[0]
    assert [unit.shuffle_key for unit in windows(2)] == [(0, 2, window) for window in range(8)]


HISTORIES = {
    "ann": ["a", "b", "c", "d"],
    "bob": ["c", "a", "b"],
    "cyd": ["d"],
    "dan": ["b", "d"],
    "eve": ["a", "c", "d", "b", "a"],
}
TRAINED_ON = {"ann": "ab", "bob": "c", "cyd": "d", "dan": "bd", "eve": "acd"}


@pytest.mark.parametrize("row_group_users", [1, 2, 100])
@pytest.mark.parametrize("lanes", [1, 2, 7])
def test_reading_gives_each_user_and_the_training_part(tmp_path, write_dataset, row_group_users, lanes):
    dataset = write_dataset(tmp_path, HISTORIES, row_group_users)
    row_counts = [group.rows for group in dataset.row_groups]
    units = plan(row_counts, total_lanes=lanes, window_users=3, shuffle=(0, 0))
    tables = [read_unit(dataset, unit, SPLIT, None) for unit in units]
    assert all(table.column_names == ["lane", "user_hash", "item_indices"] for table in tables)
    for unit, table in zip(units, tables, strict=True):
        assert table["lane"].to_pylist() == [unit.lane] * (unit.end - unit.start)
    rows = [row for table in tables for row in table.to_pylist()]
    assert len(rows) == len(HISTORIES)
    hashes = stable_hash(pa.array(list(TRAINED_ON))).tolist()
    items = [dataset.vocabulary().encode(pa.array(list(items))).tolist() for items in TRAINED_ON.values()]
    assert {row["user_hash"]: row["item_indices"] for row in rows} == dict(zip(hashes, items, strict=True))


def test_reading_a_part_of_a_unit_gives_the_same_rows(tmp_path, write_dataset):
    dataset = write_dataset(tmp_path, HISTORIES, 2)
    whole = ReadUnit(0, (2, 0, 1), (4, 5, 6), 0, 5)
    rest = ReadUnit(0, (2, 0, 1), (4, 5, 6), 3, 5)
    rows = read_unit(dataset, whole, SPLIT, None).to_pylist()
    assert read_unit(dataset, rest, SPLIT, None).to_pylist() == rows[3:]
    assert [row["user_hash"] for row in rows] != sorted(row["user_hash"] for row in rows)


def test_a_user_without_a_training_history_is_a_row_all_the_same(tmp_path):
    table = pa.table(
        {
            "user_id": ["x", "y"],
            "user_hash": pa.array([1, 2], pa.int64()),
            "item_indices": pa.array([[1, 2], [3]], pa.list_(pa.int32())),
            "timestamps": pa.array([[10, 20], [30]], pa.list_(pa.int64())),
        }
    )
    dataset = SimpleNamespace(row_groups=[None], read_row_group=lambda group, columns: table.select(columns))
    unit = ReadUnit(3, (0,), (0, 0, 0), 0, 2)
    read = read_unit(dataset, unit, SplitSettings(protocol="time"), time_bounds=(20, 40))
    assert sorted((row["user_hash"], row["item_indices"]) for row in read.to_pylist()) == [(1, [1]), (2, [])]
    assert read["lane"].to_pylist() == [3, 3]
