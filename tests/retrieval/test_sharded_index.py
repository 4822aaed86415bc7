"""The divided index finds what the undivided one finds, to the last bit; what travels is bounded."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recgpt.model.row_ranges import RowRanges
from recgpt.retrieval.index import ExactIndex, Exclusions
from recgpt.retrieval.sharded_index import IndexShard, ShardedIndex, shard_bounds

WIDTH = 16


def divided(table_RD, block_items, shards, allowed=None, sent=None):
    """A sharded index in this process; ``sent`` collects what each request carries."""
    num_items = len(table_RD) - 1
    bounds = shard_bounds(num_items, block_items, shards, allowed)
    held = [
        IndexShard(table_RD[first - 1 : end], first, num_items, block_items, allowed) for first, end in bounds
    ]

    def ask(method, arguments):
        if sent is not None:
            sent.append((method, arguments))
        return {shard: getattr(held[shard], method)(*values) for shard, values in arguments.items()}

    return ShardedIndex(bounds, ask)


def made_up(num_items, users, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(num_items + 1, WIDTH, generator=generator),
        torch.randn(users, WIDTH, generator=generator),
    )


def assert_same(found, expected):
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


@pytest.mark.parametrize(
    ("num_items", "block_items", "shards", "bounds"),
    [
        (10, 2, 1, [(1, 11)]),
        (10, 2, 2, [(1, 5), (5, 11)]),
        (10, 3, 3, [(1, 4), (4, 7), (7, 11)]),
        (10, 4, 5, [(1, 5), (5, 11)]),
        (10, 100, 4, [(1, 11)]),
    ],
)
def test_shards_hold_whole_blocks(num_items, block_items, shards, bounds):
    assert shard_bounds(num_items, block_items, shards) == bounds


def test_shards_of_few_allowed_items_hold_whole_blocks_of_these():
    allowed = torch.tensor([3, 4, 11, 12, 29])
    assert shard_bounds(30, 2, 2, allowed) == [(1, 11), (11, 31)]
    assert shard_bounds(30, 1, 9, allowed) == [(1, 4), (4, 11), (11, 12), (12, 29), (29, 31)]


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 50])
@pytest.mark.parametrize("users", [1, 2, 37])
@pytest.mark.parametrize("num_items", [1000, 1001])
def test_lists_are_those_of_the_undivided_index(num_items, users, shards):
    table_RD, interest_BD = made_up(num_items, users)
    excluded = Exclusions(
        torch.arange(users).repeat_interleave(9), torch.randint(0, num_items + 1, (9 * users,))
    )
    whole, parts = ExactIndex(table_RD, 100), divided(table_RD, 100, shards)
    for k in (1, 20, 400):
        assert_same(parts.search(interest_BD, k, excluded), whole.search(interest_BD, k, excluded))
    assert_same(parts.search(interest_BD, 5), whole.search(interest_BD, 5))


@pytest.mark.parametrize("share", [0.05, 0.4, 0.7])
@pytest.mark.parametrize("shards", [2, 3, 5])
def test_allowed_items(shards, share):
    """Also where a shard has few of them and the others many, or none."""
    table_RD, interest_BD = made_up(1000, 3)
    chance_V = torch.rand(1000, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.5, 1.5, 1000)
    allowed = (chance_V < share / 2).nonzero().squeeze(1) + 1
    allowed = allowed[(allowed < 300) | (allowed > 420)]
    whole, parts = ExactIndex(table_RD, 16, allowed), divided(table_RD, 16, shards, allowed)
    excluded = Exclusions.from_lists(allowed[torch.randint(0, len(allowed), (3, 8))])
    expected = whole.search(interest_BD, 30, excluded)
    assert set(expected[1].unique().tolist()) <= {0, *allowed.tolist()}
    assert_same(parts.search(interest_BD, 30, excluded), expected)
    item_X = torch.arange(1001)
    assert torch.equal(parts.vectors(item_X), table_RD)


def test_exclusions_go_to_the_shard_that_owns_them():
    table_RD, interest_BD = made_up(100, 4)
    sent = []
    parts = divided(table_RD, 10, 3, sent=sent)
    excluded = Exclusions.from_lists(torch.arange(41, 61).expand(4, -1))
    found = parts.search(interest_BD, 60, excluded)
    assert_same(found, ExactIndex(table_RD, 10).search(interest_BD, 60, excluded))
    ((method, requests),) = sent
    assert method == "search"
    bounds = shard_bounds(100, 10, 3)
    assert [len(requests[shard][3]) for shard in range(3)] == [
        4 * sum(first <= item < end for item in range(41, 61)) for first, end in bounds
    ]


def test_an_item_is_looked_up_once_and_where_it_is():
    table_RD, _ = made_up(100, 1)
    sent = []
    parts = divided(table_RD, 10, 5, sent=sent)
    item_X = torch.tensor([7, 0, 100, 7, 99, 7])
    assert torch.equal(parts.vectors(item_X), table_RD[item_X])
    ((method, requests),) = sent
    assert method == "vectors"
    assert {shard: items.tolist() for shard, (items,) in requests.items()} == {0: [0, 7], 4: [99, 100]}
    assert torch.equal(parts.vectors(item_X.view(2, 3)), table_RD[item_X.view(2, 3)])
    assert parts.vectors(item_X.view(2, 3)[:0]).shape == (0, 3, WIDTH)


@pytest.mark.parametrize("shards", [1, 2, 3, 5])
def test_of_equal_scores_the_lower_index_comes_first(shards):
    parts = divided(torch.ones(101, WIDTH), 7, shards)
    _, item_BK = parts.search(
        torch.ones(2, WIDTH), 60, Exclusions.from_lists(torch.tensor([[1, 8], [50, 2]]))
    )
    expected = [[item for item in range(1, 101) if item not in seen][:60] for seen in ((1, 8), (50, 2))]
    assert item_BK.tolist() == expected


def test_lists_end_with_nothing_where_items_run_out():
    table_RD, interest_BD = made_up(9, 2)
    excluded = Exclusions.from_lists(torch.tensor([[1, 9], [5, 5]]))
    found = divided(table_RD, 2, 3).search(interest_BD, 12, excluded)
    assert_same(found, ExactIndex(table_RD, 2).search(interest_BD, 12, excluded))
    assert (found[1] == 0).sum(1).tolist() == [5, 4]


def test_no_interest_vectors():
    score_BK, item_BK = divided(made_up(9, 1)[0], 2, 3).search(torch.empty(0, WIDTH), 4)
    assert score_BK.shape == item_BK.shape == (0, 4)


@given(
    st.lists(st.integers(-2, 2), min_size=1, max_size=40),
    st.integers(1, 9),
    st.integers(1, 6),
    st.integers(1, 45),
    st.sets(st.integers(1, 40)),
)
def test_any_division_agrees_with_the_undivided_index(scores, block_items, shards, k, seen):
    table_RD = torch.tensor([9, *scores], dtype=torch.float32)[:, None].repeat(1, WIDTH)
    excluded = Exclusions.from_lists(
        torch.tensor([item for item in seen if item <= len(scores)]).long()[None]
    )
    expected = ExactIndex(table_RD, block_items).search(torch.ones(1, WIDTH), k, excluded)
    pieces = RowRanges(table_RD.split(3))
    for rows in (table_RD, pieces):
        assert_same(divided(rows, block_items, shards).search(torch.ones(1, WIDTH), k, excluded), expected)
