"""Histories as arrays, and their division into training, validation and test."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt.config import SplitSettings
from recgpt.data.dataset import DatasetManifest
from recgpt.data.sequences import history_lists, resolve_time_bounds, split_histories
from recgpt.errors import UserError

LEAVE_ONE_OUT = SplitSettings()
TIME = SplitSettings(protocol="time")


def make_histories(items, times=None):
    columns = {
        "user_id": pa.array([f"u{i}" for i in range(len(items))], pa.string()),
        "user_hash": pa.array(range(len(items)), pa.int64()),
        "item_indices": pa.array(items, pa.list_(pa.int32())),
    }
    if times is not None:
        columns["timestamps"] = pa.array(times, pa.list_(pa.int64()))
    return pa.table(columns)


def manifest(time_quantiles):
    return DatasetManifest(
        1, 1, 1, 1, time_quantiles is not None, None, "int64", "int64", "", time_quantiles, [], {}, {}, []
    )


def rows(table):
    names = [name for name in ("user_id", "item_indices", "target") if name in table.column_names]
    return [tuple(row[name] for name in names) for row in table.to_pylist()]


HISTORIES = make_histories([[1, 2, 3, 4], [5, 6], [7, 8, 9], [3]])


def test_leave_one_out_by_hand():
    assert rows(split_histories(HISTORIES, LEAVE_ONE_OUT, "train")) == [
        ("u0", [1, 2]),
        ("u1", [5, 6]),
        ("u2", [7]),
        ("u3", [3]),
    ]
    assert rows(split_histories(HISTORIES, LEAVE_ONE_OUT, "valid")) == [("u0", [1, 2], 3), ("u2", [7], 8)]
    assert rows(split_histories(HISTORIES, LEAVE_ONE_OUT, "test")) == [
        ("u0", [1, 2, 3], 4),
        ("u2", [7, 8], 9),
    ]
    assert rows(split_histories(HISTORIES, LEAVE_ONE_OUT, "all")) == [
        ("u0", [1, 2, 3, 4]),
        ("u1", [5, 6]),
        ("u2", [7, 8, 9]),
        ("u3", [3]),
    ]


def test_columns_and_types():
    test = split_histories(HISTORIES, LEAVE_ONE_OUT, "test")
    assert test.schema.field("target").type == pa.int32()
    assert test.schema.field("item_indices").type == pa.list_(pa.int32())
    assert test.column_names == ["user_id", "user_hash", "item_indices", "target"]
    for part in ("train", "all"):
        names = split_histories(HISTORIES, LEAVE_ONE_OUT, part).column_names
        assert names == ["user_id", "user_hash", "item_indices"]


def test_time_split_by_hand():
    histories = make_histories(
        [[1, 2, 3, 4], [5, 6], [7, 8], [9]],
        [[10, 20, 30, 40], [25, 31], [5, 6], [20]],
    )
    bounds = (20, 30)
    # Interactions at the bound itself belong to the later part.
    assert rows(split_histories(histories, TIME, "train", bounds)) == [
        ("u0", [1]),
        ("u1", []),
        ("u2", [7, 8]),
        ("u3", []),
    ]
    assert rows(split_histories(histories, TIME, "valid", bounds)) == [("u0", [1], 2)]
    assert rows(split_histories(histories, TIME, "test", bounds)) == [("u0", [1, 2], 3), ("u1", [5], 6)]
    assert rows(split_histories(histories, TIME, "all", bounds))[3] == ("u3", [9])


def test_time_split_needs_timestamps():
    with pytest.raises(UserError, match="no timestamps"):
        split_histories(HISTORIES, TIME, "train", (1, 2))
    with pytest.raises(UserError, match="no timestamps"):
        resolve_time_bounds(TIME, manifest(None))


def test_time_bounds_come_from_the_settings_or_the_quantiles():
    quantiles = {"0.8": 80, "0.9": 90}
    assert resolve_time_bounds(LEAVE_ONE_OUT, manifest(quantiles)) is None
    assert resolve_time_bounds(TIME, manifest(quantiles)) == (80, 90)
    given_valid = SplitSettings(protocol="time", valid_from=0)
    assert resolve_time_bounds(given_valid, manifest(quantiles)) == (0, 90)
    with pytest.raises(UserError, match="valid_from=95 is not before test_from=90"):
        resolve_time_bounds(SplitSettings(protocol="time", valid_from=95), manifest(quantiles))


def test_users_need_no_id():
    table = split_histories(HISTORIES.drop_columns(["user_id"]), LEAVE_ONE_OUT, "test")
    assert table.column_names == ["user_hash", "item_indices", "target"]


def test_no_users():
    empty = HISTORIES.slice(0, 0)
    for part in ("train", "valid", "test", "all"):
        assert split_histories(empty, LEAVE_ONE_OUT, part).num_rows == 0


def test_history_lists_of_a_slice_is_a_view():
    values, offsets = history_lists(HISTORIES.slice(1, 2))
    assert values.tolist() == [5, 6, 7, 8, 9]
    assert offsets.tolist() == [0, 2, 5]
    assert values.dtype == np.int32
    assert offsets.dtype == np.int64
    assert not values.flags.owndata


lists_of_items = st.lists(st.lists(st.integers(1, 50), min_size=1, max_size=8), max_size=12)


@given(lists_of_items, st.integers(0, 12))
def test_history_lists_ignores_chunks(items, cut):
    whole = make_histories(items)
    chunked = pa.concat_tables([whole.slice(0, cut), whole.slice(cut)])
    for table in (whole, chunked):
        values, offsets = history_lists(table)
        assert [values[a:b].tolist() for a, b in zip(offsets[:-1], offsets[1:], strict=True)] == items


@given(lists_of_items)
def test_leave_one_out_follows_its_definition(items):
    table = make_histories(items)
    users = [(f"u{i}", history) for i, history in enumerate(items)]
    long = [(user, history) for user, history in users if len(history) >= 3]
    assert rows(split_histories(table, LEAVE_ONE_OUT, "train")) == [
        (user, history[:-2] if len(history) >= 3 else history) for user, history in users
    ]
    assert rows(split_histories(table, LEAVE_ONE_OUT, "valid")) == [(u, h[:-2], h[-2]) for u, h in long]
    assert rows(split_histories(table, LEAVE_ONE_OUT, "test")) == [(u, h[:-1], h[-1]) for u, h in long]


@given(
    st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=6).map(sorted), max_size=8),
    st.tuples(st.integers(0, 20), st.integers(0, 20)).filter(lambda bounds: bounds[0] < bounds[1]),
)
def test_time_split_follows_its_definition(times, bounds):
    items = [[10 * user + place + 1 for place in range(len(t))] for user, t in enumerate(times)]
    table = make_histories(items, times)

    def expected(known_before, target_from, target_before):
        for user, (history, instants) in enumerate(zip(items, times, strict=True)):
            pairs = list(zip(history, instants, strict=True))
            known = [item for item, t in pairs if t < known_before]
            targets = [item for item, t in pairs if target_from <= t < target_before]
            if known and targets:
                yield f"u{user}", known, targets[0]

    assert rows(split_histories(table, TIME, "valid", bounds)) == list(expected(bounds[0], *bounds))
    assert rows(split_histories(table, TIME, "test", bounds)) == list(expected(bounds[1], bounds[1], 99))
