"""Types of ids over all files, cleaning, and dividing by user."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt.data.formats import RawBatch
from recgpt.data.interactions import OtherTokens, Wanted, are_integers, clean, divide_by_user, id_type
from recgpt.data.sources import Source

STRINGS = Wanted(pa.string(), pa.string(), None)
INTEGERS = Wanted(pa.int64(), pa.int64(), None)
TEXT = Source("log.csv", "csv", 1, 1, user_type="text", item_type="text", time_type="number")


def batch(users, items, times, **others):
    columns = [
        values if isinstance(values, pa.Array) else pa.array(values) for values in (users, items, times)
    ]
    return RawBatch(*columns, np.arange(1, len(users) + 1), **others)


def rows(cleaned):
    return [tuple(row.values()) for row in cleaned.interactions.to_pylist()]


def bad_rows(cleaned):
    return [(row["row"], row["reason"], row["content"]) for row in cleaned.bad_rows.to_pylist()]


@pytest.mark.parametrize(
    ("kinds", "type"),
    [
        ({"int64"}, "int64"),
        ({"string"}, "string"),
        ({"text_of_integers"}, "int64"),
        ({"int64", "text_of_integers"}, "int64"),
        ({"int64", "text"}, "string"),
        ({"int64", "string"}, "string"),
        ({"string", "text_of_integers"}, "string"),
    ],
)
def test_type_over_all_files(kinds, type):
    assert id_type(kinds) == type


@pytest.mark.parametrize("token", ["007", "+1", "-0", "1.0", "a1", " 1", "", "9223372036854775808", "١"])
def test_tokens_that_would_not_come_back_as_they_are(token):
    assert not are_integers(pa.array(["1", token]))


@given(st.lists(st.none() | st.integers(-(2**63), 2**63 - 1)))
def test_printed_integers_are_integers(ids):
    texts = pa.array([None if i is None else str(i) for i in ids], pa.string())
    assert are_integers(texts)
    assert texts.cast(pa.int64()).to_pylist() == ids


def test_rows_that_lack_a_value_are_told_from_rows_with_a_broken_one():
    raw = batch(
        [b"u", None, b"v", b"\xff", b"w", b"x"],
        [b"a", b"b", None, b"c", b"d", b"e"],
        [b"1", b"2", b"3", b"4", b"noon", b"1e400"],
        broken=[(9, "3 fields expected, found 2", "q,r")],
    )
    cleaned = clean(raw, TEXT, STRINGS)
    assert rows(cleaned) == [("u", "a", 1)]
    assert cleaned.interactions.schema == STRINGS.schema
    assert cleaned.dropped == {"missing_values": 2, "bad_values": 4}
    assert bad_rows(cleaned) == [
        (9, "3 fields expected, found 2", "q,r"),
        (2, "user_id is missing", "item_id=b, timestamp=2"),
        (3, "item_id is missing", "user_id=v, timestamp=3"),
        (4, "user_id cannot be read as string", "user_id=\ufffd, item_id=c, timestamp=4"),
        (5, "timestamp cannot be read as int64", "user_id=w, item_id=d, timestamp=noon"),
        (6, "timestamp cannot be read as int64", "user_id=x, item_id=e, timestamp=1e400"),
    ]
    assert set(cleaned.bad_rows["file"].to_pylist()) == {"log.csv"}


@given(st.lists(st.sampled_from(["1", "-5", "2.5", "x", "", "nan", "99999999999999999999"]), max_size=30))
def test_each_time_is_read_by_itself(texts):
    """However many broken ones stand beside it."""
    expected = {"1": 1, "-5": -5, "2.5": 2}
    cleaned = clean(
        batch(["u"] * len(texts), ["a"] * len(texts), pa.array(texts, pa.string())), TEXT, STRINGS
    )
    assert [time for _, _, time in rows(cleaned)] == [expected[text] for text in texts if text in expected]
    assert len(cleaned.bad_rows) == sum(text not in expected for text in texts)


def test_integers_beyond_64_bits_are_broken_values():
    source = Source("log", "parquet", 1, 1, user_type="int64", item_type="int64", time_type="number")
    users = pa.array([1, 2**63], pa.uint64())
    cleaned = clean(batch(users, [5, 6], [7, 8]), source, INTEGERS)
    assert rows(cleaned) == [(1, 5, 7)]
    assert bad_rows(cleaned) == [
        (2, "user_id cannot be read as int64", f"user_id={2**63}, item_id=6, timestamp=8")
    ]


def test_text_that_promised_integers_and_breaks_its_promise():
    source = Source("log", "csv", 1, 1, user_type="text_of_integers", item_type="text", time_type="number")
    wanted = Wanted(pa.int64(), pa.string(), None)
    assert rows(clean(batch([b"1", None], [b"a", b"b"], [1, 2]), source, wanted)) == [(1, "a", 1)]
    with pytest.raises(OtherTokens, match="user_id"):
        clean(batch([b"1", b"07"], [b"a", b"b"], [1, 2]), source, wanted)


def test_the_type_of_ids_does_not_depend_on_which_events_count():
    source = Source("log", "csv", 1, 1, user_type="text_of_integers", item_type="text", time_type="number")
    raw = batch([b"1", b"guest"], [b"a", b"b"], [1, 2], event=pa.array(["buy", "view"]))
    with pytest.raises(OtherTokens, match="user_id"):
        clean(raw, source, Wanted(pa.int64(), pa.string(), None, events=("buy",)))


def test_instants_that_do_not_fit_are_broken_and_fractions_go_downward():
    source = Source("log", "parquet", 1, 1, time_type="instant", time_unit="microseconds")
    wanted = Wanted(pa.string(), pa.string(), "microseconds")
    far = pa.array([2**63 - 1000, 5], pa.int64()).cast(pa.timestamp("ms"))
    assert rows(clean(batch(["u", "v"], ["a", "b"], far), source, wanted)) == [("v", "b", 5000)]
    nanoseconds = pa.array([-1, 1999], pa.int64()).cast(pa.timestamp("ns"))
    times = [time for _, _, time in rows(clean(batch(["u", "v"], ["a", "b"], nanoseconds), source, wanted))]
    assert times == [-1, 1]


def test_the_time_window_leaves_an_older_dataset_alone():
    source = Source("part", "dataset", 0, 1, user_type="string", item_type="string", time_type="number")
    wanted = Wanted(pa.string(), pa.string(), None, since=10)
    assert rows(clean(batch(["u"], ["a"], [5]), source, wanted)) == [("u", "a", 5)]


@pytest.mark.parametrize(
    ("kind", "unit", "times", "wanted", "expected"),
    [
        ("number", "seconds", [1, -2], "seconds", [1, -2]),
        ("number", "seconds", [1, -2], "milliseconds", [1000, -2000]),
        ("number", "seconds", [1.5, -0.25], "milliseconds", [1500, -250]),
        ("number", "seconds", ["1.5", "2"], "nanoseconds", [1_500_000_000, 2_000_000_000]),
        ("number", "milliseconds", [2**62, 3], "microseconds", [3000]),  # the first is out of range
        ("instant", "microseconds", ["1970-01-01T00:00:01.5"], "nanoseconds", [1_500_000_000]),
        ("instant", "microseconds", [" 1970-01-01 00:00:01.123456789 "], "microseconds", [1_123_456]),
        ("number", None, [3, 4], None, [3, 4]),
    ],
)
def test_times_in_the_finest_unit_of_all_files(kind, unit, times, wanted, expected):
    source = Source("log", "csv", 1, 1, time_type=kind, time_unit=unit)
    users = ["u"] * len(times)
    cleaned = clean(batch(users, users, times), source, Wanted(pa.string(), pa.string(), wanted))
    assert [time for _, _, time in rows(cleaned)] == expected


def test_events_and_time_window():
    raw = batch(
        ["u"] * 6,
        ["a", "b", "c", None, "e", "f"],
        [10, 20, 30, 40, 25, None],
        event=pa.array(["buy", "click", "view", "view", None, "buy"]),
    )
    wanted = Wanted(pa.string(), pa.string(), None, events=("buy", "click"), since=10, until=20)
    cleaned = clean(raw, TEXT, wanted)
    assert rows(cleaned) == [("u", "a", 10)]
    assert cleaned.dropped == {
        "other_events": 3,  # the row without an event among them, and broken rows of other events are not bad
        "missing_values": 1,
        "bad_values": 0,
        "outside_time_window": 1,
    }
    assert bad_rows(cleaned) == [(6, "timestamp is missing", "user_id=u, item_id=f")]


@given(st.lists(st.integers(0, 30), max_size=60), st.integers(1, 5))
def test_users_are_whole_in_one_part_and_nothing_is_lost(users, num_parts):
    log = pa.table(
        {"user_id": pa.array(users, pa.int64()), "item_id": pa.array(range(len(users)), pa.int64())}
    )
    parts = divide_by_user(log, num_parts)
    assert len(parts) == num_parts
    of_parts = [set(part["user_id"].to_pylist()) for part in parts]
    assert sum(map(len, of_parts)) == len(set(users))
    assert sorted(item for part in parts for item in part["item_id"].to_pylist()) == list(range(len(users)))
