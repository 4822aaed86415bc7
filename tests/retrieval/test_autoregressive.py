"""Autoregressive recall against its slow twin and against what each promise means by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from recgpt.config import RecallSettings
from recgpt.errors import UserError
from recgpt.retrieval.autoregressive import AutoregressiveRecall, Recalled, recommend_reference
from recgpt.retrieval.continuations import best_of_branches, sampled_places
from recgpt.retrieval.index import ExactIndex


def recall_of(
    model, recall: RecallSettings, popularity: Tensor | None = None, allowed: Tensor | None = None
) -> AutoregressiveRecall:
    gpt, table = model
    return AutoregressiveRecall(
        gpt, ExactIndex(table, recall.block_items, allowed), recall, popularity, allowed
    )


def packed(histories: list[list[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """Items, offsets and user hashes of histories."""
    lengths = torch.tensor([0] + [len(history) for history in histories])
    items = torch.tensor([item for history in histories for item in history], dtype=torch.int64)
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


CONTINUATIONS = [
    {"continuation": "mean"},
    {"continuation": "mean", "temperature": 1e9},
    {"continuation": "best"},
    {"continuation": "sampled", "temperature": 0.5},
    {"continuation": "sampled", "temperature": 1e-9},
    {"continuation": "sampled", "temperature": 1e9},
    {"continuation": "beam", "beam_width": 1},
    {"continuation": "beam", "beam_width": 3},
    {"continuation": "beam", "beam_width": 50},
]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("continuation", CONTINUATIONS, ids=lambda c: "-".join(map(str, c.values())))
def test_on_cuda_lists_are_those_of_the_cpu(make_model, continuation):
    gpt, table = make_model(num_items=40, similarity="cosine", members=2)
    recall = RecallSettings(k=6, quotas=(3, 1, 2), batch_users=4, block_items=9, **continuation)
    expected = recall_of((gpt, table), recall).recommend(*packed(HISTORIES))
    found = recall_of((gpt.cuda(), table.cuda()), recall).recommend(*packed(HISTORIES))
    assert_same(found, expected)


@pytest.mark.parametrize("continuation", CONTINUATIONS, ids=lambda c: "-".join(map(str, c.values())))
@pytest.mark.parametrize("quotas", [(4, 2), (1, 1, 1, 1), (3, 1, 2)])
@pytest.mark.parametrize(("similarity", "members"), [("dot", 1), ("cosine", 1), ("cosine", 2)])
def test_continuations_equal_the_twin(make_model, quotas, continuation, similarity, members):
    model = make_model(num_items=40, similarity=similarity, members=members)
    recall = RecallSettings(sum(quotas), quotas, 4, 9, **continuation)
    assert_same(
        recall_of(model, recall).recommend(*packed(HISTORIES)),
        recommend_reference(*model, recall, *packed(HISTORIES)),
    )


@settings(max_examples=60, deadline=None)
@given(
    histories=st.lists(st.lists(st.integers(1, 9), max_size=14), min_size=1, max_size=6),
    quotas=st.lists(st.integers(1, 4), min_size=1, max_size=4),
    batch_users=st.integers(1, 4),
    block_items=st.integers(1, 10),
    keep_seen=st.booleans(),
    allowed=st.none() | st.sets(st.integers(1, 9)),
    popularity=st.lists(st.integers(0, 3), min_size=10, max_size=10),
    continuation=st.sampled_from(CONTINUATIONS),
    seed=st.integers(0, 100),
)
def test_equals_the_twin_on_any_input(
    make_model,
    histories,
    quotas,
    batch_users,
    block_items,
    keep_seen,
    allowed,
    popularity,
    continuation,
    seed,
):
    model = make_model(num_items=9, seed=seed)
    recall = RecallSettings(sum(quotas), tuple(quotas), batch_users, block_items, keep_seen, **continuation)
    allowed_A = None if allowed is None else torch.tensor(sorted(allowed), dtype=torch.int64)
    others = torch.tensor(popularity), allowed_A
    recalled = recall_of(model, recall, *others).recommend(*packed(histories))
    assert_same(recalled, recommend_reference(*model, recall, *packed(histories), *others))
    for history, items in zip(histories, recalled.item_index_BK.tolist(), strict=True):
        found = [item for item in items if item]
        left = (set(range(1, 10)) if allowed is None else allowed) - (set() if keep_seen else set(history))
        assert len(found) == len(set(found)), "an item was found twice"
        assert set(found) <= left, "a seen item was found, or one that is not allowed"
        assert len(found) == min(recall.k, len(left)), "the list is not full"


@pytest.mark.parametrize(
    "narrow", [{"continuation": "beam", "beam_width": 1}, {"continuation": "mean", "temperature": 1e-9}]
)
def test_a_beam_of_one_and_a_mean_of_one_are_the_best(make_model, narrow):
    model = make_model(num_items=40)
    best = recall_of(model, RecallSettings(6, (3, 2, 1), continuation="best"))
    other = recall_of(model, RecallSettings(6, (3, 2, 1), **narrow))
    assert_same(other.recommend(*packed(HISTORIES)), best.recommend(*packed(HISTORIES)))


def test_a_beam_finds_what_one_branch_does_not(make_model):
    model = make_model(num_items=200)
    best, beam = (
        recall_of(model, RecallSettings(8, (4, 4), continuation=continuation)).recommend(*packed(HISTORIES))
        for continuation in ("best", "beam")
    )
    assert beam.item_index_BK[:, :4].tolist() == best.item_index_BK[:, :4].tolist()
    assert beam.item_index_BK[:, 4:].tolist() != best.item_index_BK[:, 4:].tolist()
    higher = beam.score_BK[:, 4:] - best.score_BK[:, 4:]
    assert higher.min() > -1e-12, "the best branch is one of the beam: no place can have a lower score"


def test_draws_do_not_depend_on_batches_or_order(make_model):
    model = make_model(num_items=60)
    items, offsets, user_hash = packed([[1, 2]] * 30)
    one, many = (
        recall_of(model, RecallSettings(8, (5, 2, 1), batch_users=size, continuation="sampled"))
        for size in (1, 16)
    )
    expected = one.recommend(items, offsets, user_hash)
    assert_same(many.recommend(items, offsets, user_hash), expected)
    backwards = many.recommend(items, offsets, user_hash.flip(0))
    assert backwards.item_index_BK.flip(0).tolist() == expected.item_index_BK.tolist()


def test_draws_follow_the_scores():
    """Of weights 1 : 2 : 5, over 20,000 users; nothing is drawn where there is nothing."""
    score = torch.tensor([5.0, 2.0, 1.0, 0.0]).log().expand(20_000, -1)
    users = torch.arange(20_000)
    place = sampled_places(score * 3, 3.0, users, 1)
    assert place.bincount(minlength=4).div(20_000).tolist() == pytest.approx(
        [5 / 8, 2 / 8, 1 / 8, 0], abs=0.02
    )
    assert place.tolist() != sampled_places(score, 1.0, users, 2).tolist(), "each step draws anew"
    assert sampled_places(torch.full((2, 3), -torch.inf), 1.0, users[:2], 1).tolist() == [0, 0]


def test_branches_share_what_they_find():
    score = torch.tensor([[3.0, 1.0, 2.0, 3.0, 0.5, -torch.inf]])
    item = torch.tensor([[7, 4, 7, 5, 9, 0]])
    best_score, best_item = best_of_branches(score, item, 5)
    assert best_item.tolist() == [[5, 7, 4, 9, 0]]
    assert best_score.tolist() == [[3.0, 3.0, 1.0, 0.5, -torch.inf]]


def test_users_without_a_history_get_the_most_popular_items(make_model):
    popularity = torch.tensor([99, 3, 8, 8, 0, 8])
    recall = RecallSettings(4, (3, 1))
    recalled = recall_of(make_model(5), recall, popularity).recommend(*packed([[], [1, 2], []]))
    assert recalled.item_index_BK[[0, 2]].tolist() == [[2, 3, 5, 1]] * 2
    assert recalled.score_BK[[0, 2]].tolist() == [[8.0, 8.0, 8.0, 3.0]] * 2
    assert recalled.step_BK.tolist() == [[0] * 4, [1, 1, 1, 2], [0] * 4]
    few = recall_of(make_model(5), recall, popularity, torch.tensor([1, 3, 4])).recommend(*packed([[]]))
    assert few.item_index_BK.tolist() == [[3, 1, 4, 0]]
    assert few.score_BK.tolist() == [[8.0, 3.0, 0.0, -torch.inf]]


def test_an_empty_history_needs_the_popularity_of_items(make_model):
    with pytest.raises(AssertionError, match="needs the popularity of items"):
        recall_of(make_model(5), RecallSettings(4, (3, 1))).recommend(*packed([[], [1]]))


def test_the_best_item_of_a_step_is_the_next_input(make_model):
    """Step 2 on [1, 2] scores as one step on [1, 2, best of step 1], where segments are embedded alike."""
    gpt, table = make_model(num_items=20)
    segments = gpt.segment.weight.data.clone()
    gpt.segment.weight.data[1] = gpt.segment.weight.data[0]
    items, offsets, user_hash = packed([[1, 2]])
    two_steps = RecallSettings(5, (3, 2), continuation="best")
    two = recall_of((gpt, table), two_steps).recommend(items, offsets, user_hash)
    best = two.item_index_BK[0, 0].item()
    longer = recall_of((gpt, table), RecallSettings(20, (20,), keep_seen=True)).recommend(
        *packed([[1, 2, best]])[:2], user_hash
    )
    by_item = dict(zip(longer.item_index_BK[0].tolist(), longer.score_BK[0].tolist(), strict=True))
    expected = [by_item[item] for item in two.item_index_BK[0, 3:].tolist()]
    assert two.score_BK[0, 3:].tolist() == pytest.approx(expected, abs=1e-12)

    gpt.segment.weight.data.copy_(segments)
    generated = recall_of((gpt, table), two_steps).recommend(items, offsets, user_hash)
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


@pytest.mark.parametrize("weight", [float("nan"), 1e200])
def test_a_model_whose_scores_are_no_numbers_is_told_instead_of_short_lists(make_model, weight):
    gpt, table = make_model(9)
    recall = recall_of((gpt, table * 1e200), RecallSettings(5, (3, 2)))
    gpt.user.weight.data.fill_(weight)
    with pytest.raises(UserError, match="scores that are not finite numbers"):
        recall.recommend(*packed(HISTORIES))
