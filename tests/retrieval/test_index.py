"""Exact search: known scores, ties, exclusions, filters, short lists, and agreement with a full sort."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recgpt.errors import UserError
from recgpt.model.row_ranges import RowRanges
from recgpt.retrieval.index import ExactIndex, Exclusions, rescore

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


def test_exclusions_for_branches():
    excluded = Exclusions(torch.tensor([0, 2]), torch.tensor([7, 9])).for_branches(2)
    assert excluded.token_P.tolist() == [0, 1, 4, 5]
    assert excluded.item_P.tolist() == [7, 7, 9, 9]


def sorted_lists(score_BR, k: int, excluded: list[list[int]], allowed: set[int]):
    """(score, item) lists of a full sort: what a search must find."""
    lists = []
    for scores, banned in zip(score_BR.tolist(), excluded, strict=True):
        left = [(-scores[item], item) for item in allowed - set(banned)]
        best = [(-negative, item) for negative, item in sorted(left)]
        lists.append((best + [(-INFINITY, 0)] * k)[:k])
    return lists


def found_lists(score_BK, item_BK):
    return [
        list(zip(scores, items, strict=True))
        for scores, items in zip(score_BK.tolist(), item_BK.tolist(), strict=True)
    ]


@st.composite
def searches(draw: st.DrawFn):
    """Few different scores, so that many are equal; enough items for several groups in a block."""
    num_items = draw(st.integers(1, 200))
    rows = draw(st.integers(1, 4))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    levels = draw(st.sampled_from([1, 3, 1000]))
    table = torch.randint(-levels, levels + 1, (num_items + 1, 2), generator=generator).double()
    if draw(st.booleans()):  # each block surpasses those before
        table = table.sort(dim=0).values
    interest = torch.randint(-2, 3, (rows, 2), generator=generator).double()
    excluded = [draw(st.lists(st.integers(0, num_items), max_size=8)) for _ in range(rows)]
    allowed = draw(st.none() | st.sets(st.integers(1, num_items)))
    return table, interest, excluded, allowed, draw(st.integers(1, 40)), draw(st.integers(1, 210))


@settings(deadline=None)
@given(searches())
def test_agrees_with_sorting_everything(search):
    table, interest, excluded, allowed, k, block_items = search
    offsets = torch.tensor([0, *torch.tensor([len(items) for items in excluded]).cumsum(0)])
    pairs = Exclusions.from_offsets(
        torch.tensor([item for items in excluded for item in items], dtype=torch.int64), offsets
    )
    allowed_A = None if allowed is None else torch.tensor(sorted(allowed), dtype=torch.int64)
    everything = set(range(1, len(table))) if allowed is None else allowed
    expected = sorted_lists(interest @ table.T, k, excluded, everything)
    pieces = RowRanges([table[: len(table) // 2], table[len(table) // 2 :]])
    for rows in (table, pieces):
        index = ExactIndex(rows, block_items, allowed_A)
        assert found_lists(*index.search(interest, k, pairs)) == expected


@pytest.mark.parametrize("share", [0.1, 0.95])
def test_a_filter_costs_no_place_of_a_list(share: float):
    """Blocks of several groups, lists shorter and longer than what is allowed; few are allowed, or most."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(3001, 8, generator=generator, dtype=torch.float64)
    interest = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    allowed = (torch.rand(3001, generator=generator) < share).nonzero().squeeze(1)
    allowed = allowed[allowed > 0]
    for block_items, k in [(1000, 50), (512, 5), (4000, 400)]:
        expected = sorted_lists(interest @ table.T, k, [[]] * 5, set(allowed.tolist()))
        score, item = ExactIndex(table, block_items, allowed).search(interest, k)
        assert item.tolist() == [[item for _, item in places] for places in expected]


def test_items_that_are_not_allowed_have_vectors():
    table = torch.randn(6, 2)
    index = ExactIndex(table, 3, torch.tensor([2]))
    assert torch.equal(index.vectors(torch.tensor([[5, 0], [1, 2]])), table[torch.tensor([[5, 0], [1, 2]])])


@pytest.mark.parametrize("block_items", [1, 40, 1000])
@pytest.mark.parametrize("score", [INFINITY, float("nan"), -INFINITY])
def test_scores_that_are_not_finite_are_told(block_items: int, score: float):
    """Whether as the score of one item in 100, or (as -inf can be an item's in a full list) of all."""
    others = score if score == -INFINITY else 0.0
    index = index_of_scores([*[others] * 50, score, *[others] * 49], block_items)
    with pytest.raises(UserError, match="scores that are not finite numbers: it is damaged, or its training"):
        index.search(torch.ones(2, 1), 5)


def test_products_that_overflow_are_told():
    index = ExactIndex(torch.full((50, 2), -1e30), 20)
    with pytest.raises(UserError, match="scores that are not finite"):
        index.search(torch.full((1, 2), 1e30), 5)


@pytest.mark.parametrize("allowed", [None, torch.tensor([1, 2]), torch.arange(1, 40)])
def test_a_short_list_is_no_sign_of_such_scores(allowed):
    index = ExactIndex(torch.randn(41, 2), 7, allowed)
    excluded = Exclusions.from_lists(torch.arange(1, 41).repeat(2)[None])
    assert index.search(torch.ones(1, 2), 5, excluded)[1].tolist() == [[0] * 5]


def test_rescoring_puts_candidates_in_the_order_of_a_search():
    item = torch.tensor([[3, 0, 5, 1], [2, 4, 0, 0]])
    table = torch.tensor([9.0, 2.0, 1.0, 2.0, 7.0, 8.0])[:, None]
    score, item = rescore(torch.ones(2, 1), table[item], item, 3)
    assert item.tolist() == [[5, 1, 3], [4, 2, 0]]
    assert score.tolist() == [[8.0, 2.0, 2.0], [7.0, 1.0, -INFINITY]]


def coarse_and_exact(device: str, allowed: torch.Tensor | None = None):
    """What a search with a first pass in bfloat16 and an exact one find for 64 rows among 30,000 items."""
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(30_001, 64, generator=generator).to(device)
    interest = torch.randn(64, 64, generator=generator).to(device)
    excluded = Exclusions.from_lists(torch.randint(1, 30_001, (64, 10), generator=generator).to(device))
    coarse = ExactIndex(table, 7000, allowed, torch.bfloat16).search(interest, 50, excluded)
    exact = ExactIndex(table, 7000, allowed).search(interest, 50, excluded)
    return coarse, exact


@pytest.mark.parametrize("allowed", [None, torch.arange(5, 2000, 3), torch.arange(3, 30_001)])
def test_a_first_pass_in_bfloat16_finds_the_same(allowed):
    (score, item), (exact_score, exact_item) = coarse_and_exact("cpu", allowed)
    assert (item == exact_item).double().mean() > 0.999
    torch.testing.assert_close(score, exact_score)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_first_pass_in_bfloat16_finds_the_same_on_cuda():
    (_, item), (_, exact_item) = coarse_and_exact("cuda")
    found = [len(set(a) & set(b)) for a, b in zip(item.tolist(), exact_item.tolist(), strict=True)]
    assert sum(found) >= 0.999 * exact_item.numel()


def test_a_first_pass_ends_short_lists_with_nothing():
    index = ExactIndex(torch.tensor([9.0, 1.0, 2.0])[:, None], 10, coarse=torch.bfloat16)
    score, item = index.search(torch.ones(1, 1), 3)
    assert item.tolist() == [[2, 1, 0]]
    assert score.tolist() == [[2.0, 1.0, -INFINITY]]
