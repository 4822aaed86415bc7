"""Packed batches: by hand, against a plain loop, and the same however the tables are cut."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt.data.packing import Histories, LaneBatches, empty_step, lane_steps, pack

HISTORY = st.lists(st.integers(1, 9), max_size=8)


def histories_of(lists, first_user=0):
    lengths = [len(items) for items in lists]
    return Histories(
        np.array([item for items in lists for item in items], np.int32),
        np.cumsum([0, *lengths]),
        np.arange(first_user, first_user + len(lists)),
    )


def lists_of(histories):
    return [part.tolist() for part in np.split(histories.values, histories.offsets[1:-1])][: len(histories)]


def plain_pack(lists, max_history):
    """(inputs, targets, lengths, users), one history after the other."""
    inputs, targets, lengths, users = [], [], [], []
    for user, items in enumerate(lists):
        newest = items[-(max_history + 1) :]
        if len(newest) < 2:
            continue
        inputs += newest[:-1]
        targets += newest[1:]
        lengths.append(len(newest) - 1)
        users.append(user)
    return inputs, targets, lengths, users


def packed_as_lists(batch):
    return (
        batch.item_index_T.tolist(),
        batch.target_T.tolist(),
        batch.offsets.diff().tolist(),
        batch.user_hash_B.tolist(),
    )


def test_pack_by_hand():
    batch = pack(histories_of([[5], [1, 2, 3], [], [4, 5], [6, 7, 8, 9, 1]], first_user=10), max_history=3)
    assert batch.item_index_T.tolist() == [1, 2, 4, 7, 8, 9]
    assert batch.target_T.tolist() == [2, 3, 5, 8, 9, 1]
    assert batch.offsets.tolist() == [0, 2, 3, 6]
    assert batch.user_hash_B.tolist() == [11, 13, 14]


@pytest.mark.parametrize("lists", [[], [[]], [[1]], [[], [3], []]])
def test_histories_without_a_target_give_nothing(lists):
    batch = pack(histories_of(lists), max_history=4)
    assert packed_as_lists(batch) == ([], [], [], [])
    assert batch.offsets.tolist() == [0]
    for tensor in (batch.item_index_T, batch.target_T, batch.offsets, batch.user_hash_B):
        assert str(tensor.dtype) == "torch.int64"


@given(st.lists(HISTORY, max_size=6), st.integers(1, 9))
def test_pack_equals_a_plain_loop(lists, max_history):
    assert packed_as_lists(pack(histories_of(lists), max_history)) == plain_pack(lists, max_history)


@given(st.lists(HISTORY, max_size=6), st.integers(1, 9))
def test_no_target_crosses_two_users(lists, max_history):
    """Items are made to tell their user: a pair of input and target must agree."""
    marked = [[100 * user + item for item in items] for user, items in enumerate(lists, 1)]
    batch = pack(histories_of(marked), max_history)
    assert (batch.item_index_T // 100).equal(batch.target_T // 100)
    rows = batch.user_hash_B.repeat_interleave(batch.offsets.diff())
    assert (batch.item_index_T // 100 - 1).equal(rows)


@given(st.lists(HISTORY, max_size=6), st.data())
def test_slice_select_and_concatenate(lists, data):
    histories = histories_of(lists)
    cut = data.draw(st.integers(0, len(lists)))
    parts = [histories.slice(0, cut), Histories.empty(), histories.slice(cut, len(lists))]
    assert [lists_of(part) for part in parts] == [lists[:cut], [], lists[cut:]]
    joined = Histories.concatenate(parts)
    assert lists_of(joined) == lists
    assert joined.user_hash.tolist() == list(range(len(lists)))
    users = data.draw(st.lists(st.sampled_from(range(len(lists))))) if lists else []
    selected = histories.select(np.array(users, np.int64))
    assert lists_of(selected) == [lists[user] for user in users]
    assert selected.user_hash.tolist() == users


def test_nothing_concatenated_is_empty():
    assert len(Histories.concatenate([])) == 0


def test_from_table_reads_slices_and_chunks():
    table = table_of([(0, 7, [1, 2]), (0, 8, []), (0, 9, [3])])
    assert lists_of(Histories.from_table(table.slice(1, 2))) == [[], [3]]
    chunked = Histories.from_table(pa.concat_tables([table, table.slice(2, 1)]))
    assert lists_of(chunked) == [[1, 2], [], [3], [3]]
    assert chunked.user_hash.tolist() == [7, 8, 9, 9]
    assert len(Histories.from_table(table.slice(0, 0))) == 0


def test_batches_by_hand():
    batches = LaneBatches(budget=4, max_history=3)
    lists = [[1, 2], [1, 2, 3], [1], [1, 2, 3], [1, 2, 3, 4, 5, 6], [1], [1, 2]]  # tokens 1 2 0 2 3 0 1
    batches.add(histories_of(lists[:3]))
    assert not batches.has_full_batch()
    batches.add(histories_of(lists[3:]))
    assert batches.has_full_batch()
    taken = []
    while batch := lists_of(batches.next_batch()):
        taken.append(batch)
    assert taken == [lists[:3], lists[3:4], lists[4:]]


def test_a_history_beyond_the_budget_is_a_batch_of_its_own():
    batches = LaneBatches(budget=2, max_history=50)
    batches.add(histories_of([[1] * 9, [1, 2]]))
    assert [len(batches.next_batch()) for _ in range(3)] == [1, 1, 0]


def test_a_batch_that_just_fills_the_budget_waits_for_what_follows():
    """A history without tokens may still belong to it, so it must not be cut off too early."""
    batches = LaneBatches(budget=2, max_history=50)
    batches.add(histories_of([[1, 2, 3]]))
    assert not batches.has_full_batch()
    batches.add(histories_of([[1]]))
    batches.add(histories_of([[1, 2]]))
    assert batches.has_full_batch()
    assert lists_of(batches.next_batch()) == [[1, 2, 3], [1]]


@given(st.lists(HISTORY, max_size=12), st.integers(1, 12), st.integers(1, 6))
def test_batches_keep_order_and_budget_and_lose_nothing(lists, budget, max_history):
    batches = LaneBatches(budget, max_history)
    batches.add(histories_of(lists))
    taken = []
    while len(batch := batches.next_batch()):
        taken.append(batch)
    assert [items for batch in taken for items in lists_of(batch)] == lists
    for batch in taken:
        assert len(batch) == 1 or batch.num_tokens(max_history).sum() <= budget
    for batch, following in zip(taken, taken[1:], strict=False):  # none could have been longer
        both = batch.num_tokens(max_history).sum() + following.num_tokens(max_history)[0]
        assert both > budget


def table_of(rows):
    """Rows of (lane, user hash, item indices)."""
    lane, user, items = zip(*rows, strict=True) if rows else ((), (), ())
    return pa.table(
        {
            "lane": pa.array(lane, pa.int32()),
            "user_hash": pa.array(user, pa.int64()),
            "item_indices": pa.array(items, pa.list_(pa.int32())),
        }
    )


def steps_of(tables, lanes, budget, max_history=50):
    return [
        (packed_as_lists(step.batch), step.users) for step in lane_steps(tables, lanes, budget, max_history)
    ]


def test_lanes_are_interleaved_and_one_ends_early():
    tables = [
        table_of([(0, 10, [1, 2, 3]), (0, 11, [4, 5])]),
        table_of([(2, 20, [6, 7])]),
        table_of([(0, 12, [8, 9, 1])]),
    ]
    assert steps_of(tables, lanes=[0, 2], budget=2) == [
        (([1, 2, 6], [2, 3, 7], [2, 1], [10, 20]), {0: 1, 2: 1}),
        (([4], [5], [1], [11]), {0: 1, 2: 0}),
        (([8, 9], [9, 1], [2], [12]), {0: 1, 2: 0}),
    ]


def test_users_without_targets_are_consumed_all_the_same():
    assert steps_of([table_of([(0, 10, [1]), (0, 11, [])])], [0], budget=4) == [(([], [], [], []), {0: 2})]


@pytest.mark.parametrize("tables", [[], [table_of([])]])
def test_without_histories_there_are_no_steps(tables):
    assert steps_of(tables, lanes=[0, 1], budget=4) == []


def test_an_empty_step_has_the_shape_of_a_step():
    step = empty_step([1, 3])
    assert packed_as_lists(step.batch) == ([], [], [], [])
    assert step.users == {1: 0, 3: 0}


def test_steps_read_no_further_than_they_need():
    """A stream is read ahead of the step by its own buffer, not by this one."""
    read = []

    def tables():
        for user in range(100):
            read.append(user)
            yield table_of([(0, user, [1, 2, 3])])

    next(lane_steps(tables(), [0], budget=4, max_history=50))
    assert read == [0, 1, 2]


@given(st.data())
def test_steps_do_not_depend_on_how_the_tables_are_cut(data):
    lanes = [1, 4]
    rows = [
        (lane, number, data.draw(HISTORY))
        for number, lane in enumerate(data.draw(st.lists(st.sampled_from(lanes), max_size=14)))
    ]
    budget, max_history = data.draw(st.integers(1, 10)), data.draw(st.integers(1, 6))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(rows)), max_size=5)))
    pieces = [table_of(rows[start:end]) for start, end in zip([0, *cuts], [*cuts, len(rows)], strict=True)]
    steps = steps_of(pieces, lanes, budget, max_history)
    assert steps == steps_of([table_of(rows)], lanes, budget, max_history)
    by_lane = {lane: [row for row in rows if row[0] == lane] for lane in lanes}
    one_after_the_other = [table_of(by_lane[lane]) for lane in reversed(lanes)]
    assert steps == steps_of(one_after_the_other, lanes, budget, max_history)
    assert sum(count for _, users in steps for count in users.values()) == len(rows)
