"""Autoregressive recall against its slow twin and against what each promise means by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recgpt.config import RecallSettings
from recgpt.errors import UserError
from recgpt.retrieval.autoregressive import AutoregressiveRecall, Recalled, recommend_reference
from recgpt.retrieval.index import ExactIndex


def recall_of(model, recall: RecallSettings) -> AutoregressiveRecall:
    gpt, table = model
    return AutoregressiveRecall(gpt, ExactIndex(table, recall.block_items), table, recall)


def packed(histories: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Items, offsets and user hashes of histories."""
    lengths = torch.tensor([0] + [len(history) for history in histories])
    items = torch.tensor([item for history in histories for item in history])
    return items, lengths.cumsum(0), torch.arange(len(histories)) * 7919 - 3


def assert_same(actual: Recalled, expected: Recalled) -> None:
    assert actual.item_index_BK.tolist() == expected.item_index_BK.tolist()
    assert actual.step_BK.tolist() == expected.step_BK.tolist()
    torch.testing.assert_close(actual.score_BK, expected.score_BK, rtol=0, atol=1e-12)


HISTORIES = [
    [1, 2, 3],
    [4],
    [5, 5, 5, 2, 2],  # repeats
    [1, 2, 3, 4, 5, 6, 7],  # the window of two steps
    [9, 8, 7, 6, 5, 4, 3, 2],  # one more than that
    [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3],  # far longer
]


@pytest.mark.parametrize("quotas", [(6,), (4, 2), (3, 1, 2), (1, 1, 1, 1, 1, 1, 1, 1)])
@pytest.mark.parametrize("keep_seen", [False, True])
def test_equals_the_twin_that_encodes_everything_again(make_model, quotas, keep_seen):
    model = make_model(num_items=40)
    recall = RecallSettings(k=sum(quotas), quotas=quotas, batch_users=4, block_items=9, keep_seen=keep_seen)
    assert_same(
        recall_of(model, recall).recommend(*packed(HISTORIES)),
        recommend_reference(*model, recall, *packed(HISTORIES)),
    )


@settings(max_examples=25, deadline=None)
@given(
    histories=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=14), min_size=1, max_size=6),
    quotas=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    batch_users=st.integers(1, 4),
    block_items=st.integers(1, 10),
    keep_seen=st.booleans(),
    seed=st.integers(0, 100),
)
def test_equals_the_twin_on_any_input(
    make_model, histories, quotas, batch_users, block_items, keep_seen, seed
):
    model = make_model(num_items=9, seed=seed)
    recall = RecallSettings(sum(quotas), tuple(quotas), batch_users, block_items, keep_seen)
    recalled = recall_of(model, recall).recommend(*packed(histories))
    assert_same(recalled, recommend_reference(*model, recall, *packed(histories)))
    for history, items in zip(histories, recalled.item_index_BK.tolist(), strict=True):
        found = [item for item in items if item]
        assert len(found) == len(set(found)), "an item was found twice"
        assert keep_seen or not set(found) & set(history), "a seen item was found"
        assert len(found) == min(recall.k, 9 if keep_seen else 9 - len(set(history))), "the list is not full"


def test_the_best_item_of_a_step_is_the_next_input(make_model):
    """Step 2 on [1, 2] scores as one step on [1, 2, best of step 1], where segments are embedded alike."""
    gpt, table = make_model(num_items=20)
    segments = gpt.segment.weight.data.clone()
    gpt.segment.weight.data[1] = gpt.segment.weight.data[0]
    items, offsets, user_hash = packed([[1, 2]])
    two = recall_of((gpt, table), RecallSettings(5, (3, 2))).recommend(items, offsets, user_hash)
    best = two.item_index_BK[0, 0].item()
    longer = recall_of((gpt, table), RecallSettings(20, (20,), keep_seen=True)).recommend(
        *packed([[1, 2, best]])[:2], user_hash
    )
    by_item = dict(zip(longer.item_index_BK[0].tolist(), longer.score_BK[0].tolist(), strict=True))
    expected = [by_item[item] for item in two.item_index_BK[0, 3:].tolist()]
    assert two.score_BK[0, 3:].tolist() == pytest.approx(expected, abs=1e-12)

    gpt.segment.weight.data.copy_(segments)
    generated = recall_of((gpt, table), RecallSettings(5, (3, 2))).recommend(items, offsets, user_hash)
    assert generated.item_index_BK[0, 0] == best
    assert generated.score_BK[0, 3:].tolist() != pytest.approx(expected, abs=1e-6)


def test_steps_name_the_step_of_each_candidate(make_model):
    recalled = recall_of(make_model(20), RecallSettings(6, (3, 1, 2))).recommend(*packed([[1], [2, 3]]))
    assert recalled.step_BK.dtype == torch.int8
    assert recalled.step_BK.tolist() == [[1, 1, 1, 2, 3, 3]] * 2


def test_fewer_items_than_asked_for(make_model):
    recalled = recall_of(make_model(4), RecallSettings(5, (2, 3))).recommend(*packed([[1, 2, 3], [4, 1]]))
    assert recalled.item_index_BK[0].tolist() == [4, 0, 0, 0, 0]
    assert sorted(recalled.item_index_BK[1].tolist()) == [0, 0, 0, 2, 3]
    assert torch.isinf(recalled.score_BK[0, 1:]).all()


def test_users_differ_by_their_user_vector_alone(make_model):
    items, offsets, _ = packed([[1, 2], [1, 2], [1, 2]])
    recalled = recall_of(make_model(30), RecallSettings(5, (5,))).recommend(
        items, offsets, torch.tensor([0, 1, 5])
    )
    assert recalled.score_BK[0].tolist() != recalled.score_BK[1].tolist()
    assert recalled.item_index_BK[0].tolist() == recalled.item_index_BK[2].tolist()  # 5 buckets: the same row


def test_no_users(make_model):
    recalled = recall_of(make_model(9), RecallSettings(5, (3, 2))).recommend(
        torch.empty(0, dtype=torch.int64),
        torch.zeros(1, dtype=torch.int64),
        torch.empty(0, dtype=torch.int64),
    )
    assert recalled.item_index_BK.shape == recalled.score_BK.shape == recalled.step_BK.shape == (0, 5)


def test_more_steps_than_the_window_holds(make_model):
    with pytest.raises(UserError, match="9 recall steps do not fit a model with max_history=8"):
        recall_of(make_model(9), RecallSettings(9, (1,) * 9))
