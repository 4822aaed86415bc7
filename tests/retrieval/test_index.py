"""Exact search: known scores, ties, exclusions, short lists, and agreement with a full sort."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recgpt.retrieval.index import ExactIndex, Exclusions

INFINITY = float("inf")


def index_of_scores(scores: list[float], block_items: int = 100) -> ExactIndex:
    """An index whose item i scores ``scores[i - 1]`` against the interest vector [1.0]; padding would win."""
    return ExactIndex(torch.tensor([999.0, *scores])[:, None], block_items)


def test_best_items_come_first_and_padding_never():
    score, item = index_of_scores([0.5, 3.0, -1.0, 2.0]).search(torch.ones(1, 1), 3)
    assert item.tolist() == [[2, 4, 1]]
    assert score.tolist() == [[3.0, 2.0, 0.5]]


def test_each_row_has_its_own_list():
    _, item = index_of_scores([0.5, 3.0, -1.0]).search(torch.tensor([[1.0], [-1.0]]), 3)
    assert item.tolist() == [[2, 1, 3], [3, 1, 2]]


@pytest.mark.parametrize("block_items", [1, 2, 3, 5, 100])
def test_of_equal_scores_the_lower_index_comes_first(block_items: int):
    index = index_of_scores([1.0, 2.0, 1.0, 2.0, 1.0, 0.0], block_items)
    _, item = index.search(torch.ones(1, 1), 4)
    assert item.tolist() == [[2, 4, 1, 3]]


@pytest.mark.parametrize("block_items", [7, 1000])
def test_a_catalogue_of_equal_scores(block_items: int):
    _, item = index_of_scores([0.0] * 500, block_items).search(torch.ones(2, 1), 20)
    assert item.tolist() == [list(range(1, 21))] * 2


@pytest.mark.parametrize("block_items", [1, 2, 100])
def test_excluded_items_leave_room_for_the_next_best(block_items: int):
    excluded = Exclusions(torch.tensor([0, 0, 0, 1]), torch.tensor([2, 4, 2, 1]))
    score, item = index_of_scores([0.5, 3.0, -1.0, 2.0], block_items).search(torch.ones(2, 1), 2, excluded)
    assert item.tolist() == [[1, 3], [2, 4]]
    assert score.tolist() == [[0.5, -1.0], [3.0, 2.0]]


@pytest.mark.parametrize("block_items", [1, 2, 100])
def test_too_few_items_end_the_list_with_nothing(block_items: int):
    excluded = Exclusions.from_lists(torch.tensor([[2], [0]]))
    score, item = index_of_scores([5.0, 6.0], block_items).search(torch.ones(2, 1), 4, excluded)
    assert item.tolist() == [[1, 0, 0, 0], [2, 1, 0, 0]]
    assert score.tolist() == [[5.0, -INFINITY, -INFINITY, -INFINITY], [6.0, 5.0, -INFINITY, -INFINITY]]


def test_no_rows():
    score, item = index_of_scores([5.0, 6.0]).search(torch.ones(0, 1), 4)
    assert score.shape == item.shape == (0, 4)


def test_exclusions_from_offsets():
    excluded = Exclusions.from_offsets(torch.tensor([4, 5, 6]), torch.tensor([0, 2, 2, 3]))
    assert excluded.token_P.tolist() == [0, 0, 2]
    assert excluded.item_P.tolist() == [4, 5, 6]


@st.composite
def searches(draw: st.DrawFn):
    scores = draw(st.lists(st.integers(-3, 3), min_size=1, max_size=30))
    excluded = draw(st.lists(st.lists(st.integers(0, len(scores)), max_size=8), min_size=1, max_size=4))
    return scores, excluded, draw(st.integers(1, 12)), draw(st.integers(1, 35))


@given(searches())
def test_agrees_with_sorting_everything(search: tuple[list[int], list[list[int]], int, int]):
    scores, excluded, k, block_items = search
    offsets = torch.tensor([0, *torch.tensor([len(items) for items in excluded]).cumsum(0)])
    flat = torch.tensor([item for items in excluded for item in items], dtype=torch.int64)
    score, item = index_of_scores([float(s) for s in scores], block_items).search(
        torch.ones(len(excluded), 1), k, Exclusions.from_offsets(flat, offsets)
    )
    for row, banned in enumerate(excluded):
        left = [(-s, i) for i, s in enumerate(scores, start=1) if i not in banned]
        expected = (sorted(left) + [(INFINITY, 0)] * k)[:k]
        assert [(-s, i) for s, i in zip(score[row].tolist(), item[row].tolist(), strict=True)] == expected
