"""Building, filtering and writing histories; quantiles of their times."""

import io
import itertools
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt.data import histories as module
from recgpt.data.hashing import stable_hash
from recgpt.data.histories import (
    build_histories,
    check_one_line_per_user,
    count_items,
    first_times,
    histories_file,
    renumber_items,
    summarise_times,
    time_quantile,
)
from recgpt.errors import UserError


def interactions(rows):
    users, items, times = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table(
        {
            "user_id": pa.array(users, pa.string()),
            "item_id": pa.array(items, pa.string()),
            "timestamp": pa.array(times, pa.int64()),
        }
    )


def with_ids(part):
    """{user: [(item, time), ...]} of built histories."""
    ids = part.item_ids.to_pylist()
    return {
        row["user_id"]: [(ids[i - 1], t) for i, t in zip(row["item_indices"], row["timestamps"], strict=True)]
        for row in part.histories.to_pylist()
    }


def histories(item_lists):
    return pa.table(
        {
            "user_id": pa.array(range(len(item_lists)), pa.int64()),
            "user_hash": pa.array(range(len(item_lists)), pa.int64()),
            "item_indices": pa.array(item_lists, pa.list_(pa.int32())),
            "timestamps": pa.array([[10 * i for i in items] for items in item_lists], pa.list_(pa.int64())),
        }
    )


def test_sorted_by_time_then_item_and_without_duplicates():
    part = build_histories(
        interactions(
            [("u", "b", 5), ("u", "a", 5), ("v", "c", 1), ("u", "c", 2), ("u", "b", 5), ("u", "b", 9)]
        )
    )
    assert with_ids(part) == {"u": [("c", 2), ("a", 5), ("b", 5), ("b", 9)], "v": [("c", 1)]}
    assert part.dropped == {"duplicates": 1}


rows_of_logs = st.lists(
    st.tuples(st.sampled_from("uvwxyz"), st.sampled_from("abcd"), st.integers(-2, 3)), max_size=40
)


@given(rows_of_logs, st.randoms())
def test_histories_follow_their_definition_whatever_the_order_of_rows(rows, random):
    part = build_histories(interactions(rows))
    expected = {
        user: [(item, time) for time, item in sorted({(t, i) for u, i, t in rows if u == user})]
        for user in {row[0] for row in rows}
    }
    assert with_ids(part) == expected
    assert part.dropped == {"duplicates": len(rows) - len(set(rows))}
    hashes = part.histories["user_hash"].to_pylist()
    assert hashes == sorted(stable_hash(pa.array(list(expected), pa.string())).tolist())
    shuffled = random.sample(rows, len(rows))
    assert build_histories(interactions(shuffled)).histories == part.histories


def test_repeats_and_the_newest_by_hand():
    rows = [("u", item, time) for time, item in enumerate("aabbbacc")] + [("v", "a", 0), ("v", "a", 0)]
    part = build_histories(interactions(rows), collapse_repeats=True, max_history=3)
    assert with_ids(part) == {"u": [("b", 2), ("a", 5), ("c", 6)], "v": [("a", 0)]}
    assert part.dropped == {"duplicates": 1, "repeats": 4, "over_max_history": 1}


@given(rows_of_logs, st.booleans(), st.none() | st.integers(1, 4))
def test_histories_follow_their_definition_with_all_settings(rows, collapse, max_history):
    part = build_histories(interactions(rows), collapse, max_history)
    expected = {}
    for user in {row[0] for row in rows}:
        history = [(i, t) for t, i in sorted({(t, i) for u, i, t in rows if u == user})]
        if collapse:
            history = [next(run) for _, run in itertools.groupby(history, key=lambda pair: pair[0])]
        expected[user] = history[-max_history:] if max_history else history
    assert with_ids(part) == expected
    assert sum(part.dropped.values()) == len(rows) - sum(map(len, expected.values()))


@given(rows_of_logs)
def test_keys_too_wide_for_one_number_give_the_same_order(rows):
    """The slow twin, and times that take all 64 bits."""
    narrow = build_histories(interactions(rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_KEY_BITS", -1)
        assert build_histories(interactions(rows)) == narrow
    wide = build_histories(interactions([(u, i, t * 2**61) for u, i, t in rows]))
    assert wide.histories["item_indices"] == narrow.histories["item_indices"]


def test_first_times_by_hand():
    table = histories([[3, 1], [1]])
    assert first_times(table, 3).tolist() == [10, np.iinfo(np.int64).max, 30]


def test_two_lines_of_one_user_are_refused():
    lines = [("u", "a", 0), ("u", "b", 1), ("v", "a", 0)]
    check_one_line_per_user(interactions(lines))
    with pytest.raises(UserError, match="user u stands on two lines"):
        check_one_line_per_user(interactions([*lines, ("u", "a", 0)]))


def test_renumber_by_hand():
    table = histories([[1, 2, 1], [2], [3, 2, 3]])
    result = renumber_items(table, np.array([0, 7, 0, 5], np.int32), min_user_interactions=1)
    assert result.to_pydict() == {
        "user_id": [0, 2],
        "user_hash": [0, 2],
        "item_indices": [[7, 7], [5, 5]],
        "timestamps": [[10, 10], [30, 30]],
    }
    assert result.schema == table.schema
    fewer = renumber_items(table, np.array([0, 1, 0, 3], np.int32), min_user_interactions=3)
    assert fewer.num_rows == 0


def test_count_items_counts_absent_ones_too():
    assert count_items(histories([[1, 3, 3], [3]]), 4).tolist() == [1, 0, 3, 0]


def test_quantiles_are_order_statistics_over_all_parts():
    parts = [histories([[1, 2], [3]]), histories([[4, 5, 6, 7, 8, 9, 10]]), histories([])]
    summaries = [summarise_times(part) for part in parts]
    assert time_quantile(summaries, 0.8) == 90  # 8 of the 10 times lie before it
    assert time_quantile(summaries, 0.9) == 100
    assert time_quantile(summaries, 0.0) == 10


@given(st.lists(st.lists(st.integers(1, 9), min_size=1), min_size=1), st.floats(0, 0.99))
def test_quantile_follows_its_definition(item_lists, share):
    times = sorted(10 * item for item in itertools.chain(*item_lists))
    summary = summarise_times(histories(item_lists))
    assert time_quantile([summary], share) == times[math.floor(share * len(times))]


def test_long_summaries_are_thinned_to_a_bounded_error(monkeypatch):
    monkeypatch.setattr(module, "_SUMMARY_VALUES", 100)
    summary = summarise_times(histories([list(range(1, 1001))]))
    assert len(summary.times) == 100
    assert summary.counts.sum() == 1000
    assert abs(time_quantile([summary], 0.8) - 8010) <= 100


def test_file_has_row_groups_and_equal_bytes_whatever_the_chunks():
    table = histories([[1, 2]] * 10_000)
    content = histories_file(table, ["user_id", "item_indices"])
    file = pq.ParquetFile(io.BytesIO(content))
    assert [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)] == [8192, 1808]
    assert file.schema_arrow.names == ["user_id", "item_indices"]
    chunked = pa.concat_tables([table.slice(0, 123), table.slice(123)])
    assert histories_file(chunked, ["user_id", "item_indices"]) == content
