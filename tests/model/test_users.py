"""A table with a row for each user: who is known, and a GPT that takes its user vectors from outside."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from recgpt.config import ModelSettings, UserSettings
from recgpt.distributed import collectives
from recgpt.distributed.sharded_table import ShardedTable
from recgpt.model.attention import Layout
from recgpt.model.gpt import GPT
from recgpt.model.item_table import initial_rows
from recgpt.model.users import KnownUsers, UserVectors

WIDTH, NUM_USERS = 4, 6
INT64 = st.integers(-(2**63), 2**63 - 1)


def known(*hashes):
    return KnownUsers(torch.tensor(hashes, dtype=torch.int64))


def make_gpt(kind="table", rows_RD=None):
    """In float64; without dropout, so that training mode gives the same vectors."""
    torch.manual_seed(0)
    user = UserSettings(kind=kind, buckets=NUM_USERS)
    gpt = GPT(
        ModelSettings(width=WIDTH, members=1, layers=1, heads=2, max_history=5, dropout=0.0, user=user)
    ).double()
    if kind == "table" and rows_RD is not None:
        gpt.user = UserVectors(rows_RD)
    return gpt


def packed(*lengths):
    generator = torch.Generator().manual_seed(7)
    items_TD = torch.randn(sum(lengths), WIDTH, generator=generator, dtype=torch.float64)
    return items_TD, Layout.from_offsets(torch.tensor([0, *lengths]).cumsum(0))


# Who is known


def test_known_users_have_rows_in_the_order_of_their_hashes():
    users = known(-(2**63), -5, 0, 2**63 - 1)
    assert users.num_rows == 5
    assert users.rows(torch.tensor([0, -5, 2**63 - 1, -(2**63)])).tolist() == [3, 2, 4, 1]
    assert users.rows(torch.tensor([-6, -4, 1, 2**63 - 2])).tolist() == [0, 0, 0, 0]


def test_no_users_are_known_and_none_are_asked_for():
    assert known().num_rows == 1
    assert known().rows(torch.tensor([3, 0])).tolist() == [0, 0]
    empty = torch.empty(0, dtype=torch.int64)
    assert known(1, 2).rows(empty).dtype == torch.int64
    assert known(1, 2).rows(empty).tolist() == known().rows(empty).tolist() == []


@given(st.sets(INT64, max_size=20), st.lists(INT64, max_size=10))
def test_rows_equal_a_dictionary(hashes: set[int], others: list[int]):
    row_of = {user: row for row, user in enumerate(sorted(hashes), start=1)}
    asked = [*hashes, *others]
    rows = known(*sorted(hashes)).rows(torch.tensor(asked, dtype=torch.int64))
    assert rows.tolist() == [row_of.get(user, 0) for user in asked]


@pytest.mark.parametrize("hashes", [[2, 1], [1, 1]])
def test_hashes_that_are_not_ascending_are_refused(hashes):
    with pytest.raises(AssertionError, match="ascending"):
        known(*hashes)


def test_copies_of_a_model_share_the_known_users():
    gpt = make_gpt(rows_RD=torch.zeros(7, WIDTH))
    gpt.known_users = known(1, 2)
    assert copy.deepcopy(gpt).known_users is gpt.known_users


# In the GPT


def test_user_rows_come_from_the_known_users():
    gpt = make_gpt()
    gpt.known_users = known(-9, 4)
    assert gpt.user_rows(torch.tensor([4, 5, -9])).tolist() == [2, 0, 1]


def test_a_table_equals_hashed_users_with_the_same_rows():
    """Forward, and step by step with the cache."""
    hashed = make_gpt("hashed")
    table = make_gpt("table", hashed.user.weight.detach())
    missing = table.load_state_dict(hashed.state_dict(), strict=False)
    assert missing.unexpected_keys == ["user.weight"]
    items_TD, layout = packed(2, 3)
    rows, more_BD = torch.tensor([5, 0]), packed(2)[0]
    torch.testing.assert_close(table(items_TD, layout, rows), hashed(items_TD, layout, rows))
    steps = []
    for gpt in (table, hashed):
        first_BD, state = gpt.prefill(items_TD, layout, rows, extra=1)
        steps.append(torch.stack([first_BD, gpt.extend(more_BD, 1, state)]))
    torch.testing.assert_close(*steps)


def test_the_state_dict_holds_no_user_rows():
    without, within = make_gpt(), make_gpt(rows_RD=torch.zeros(7, WIDTH))
    assert without.state_dict().keys() == within.state_dict().keys()
    assert not any("user" in key for key in within.state_dict())
    assert within.float().user(torch.tensor([1])).dtype == torch.float32, "the rows do not move with it"


def test_a_table_that_was_not_set_is_not_left_out_in_silence():
    items_TD, layout = packed(2)
    with pytest.raises(AssertionError, match="needs gpt.user"):
        make_gpt()(items_TD, layout, torch.tensor([0]))
    with pytest.raises(AssertionError, match="needs gpt.known_users"):
        make_gpt().user_rows(torch.tensor([1]))


@pytest.mark.parametrize("lengths", [(2, 3), ()])
def test_every_call_looks_users_up_once_whatever_the_batch(lengths):
    """Lookups in a sharded table are collective: ranks must not differ in their number."""
    gpt = make_gpt()
    asked = []

    def look_up(row_B):
        asked.append(row_B.tolist())
        return torch.zeros(len(row_B), WIDTH, dtype=torch.float64)

    gpt.user = look_up
    items_TD, layout = packed(*lengths)
    rows = torch.arange(len(lengths)) + 1
    gpt(items_TD, layout, rows)
    assert asked == [rows.tolist()]
    _, state = gpt.prefill(items_TD, layout, rows, extra=1)
    assert asked == [rows.tolist()] * 2
    gpt.extend(packed(*[1] * len(lengths))[0], 1, state)
    assert asked == [rows.tolist()] * 2


def train_on_each_rank():
    """Rank 1 has no history; user 2 is on two ranks, users 1, 4 and 6 on none."""
    lengths_of_rank = [(2, 3), (), (4,)]
    rows_of_rank = [[2, 0], [], [2]]
    everything_TD, whole_layout = packed(*sum(lengths_of_rank, ()))
    rank, world_size = collectives.rank(), collectives.world_size()

    gpt = make_gpt()
    gpt.user = ShardedTable(NUM_USERS + 1, WIDTH, 3, torch.device("cpu"), torch.float64)
    first = sum(sum(lengths) for lengths in lengths_of_rank[:rank])
    layout = packed(*lengths_of_rank[rank])[1]
    items_TD = everything_TD[first : first + len(layout.row)]
    rows = torch.tensor(rows_of_rank[rank], dtype=torch.int64)
    interest_TD = gpt(items_TD, layout, rows)
    interest_TD.pow(3).sum().backward()
    used, gradient_UD = gpt.user.take_gradient()

    twin_rows_RD = initial_rows(3, 0, NUM_USERS + 1, WIDTH, torch.float64).requires_grad_()
    twin = make_gpt(rows_RD=twin_rows_RD)
    expected_TD = twin(everything_TD, whole_layout, torch.tensor(sum(rows_of_rank, [])))
    expected_TD.pow(3).sum().backward()
    expected_RD = twin_rows_RD.grad[gpt.user.first : gpt.user.end] / world_size
    torch.testing.assert_close(interest_TD, expected_TD[first : first + len(items_TD)], rtol=0, atol=1e-12)
    mine = [row - gpt.user.first for row in (0, 2) if gpt.user.first <= row < gpt.user.end]
    assert used.tolist() == mine
    torch.testing.assert_close(gradient_UD, expected_RD[used], rtol=0, atol=1e-12)
    assert rank == 2 or gradient_UD.abs().max() > 1e-3, "the users of ranks 0 and 1 have learnt nothing"


@pytest.mark.distributed
def test_a_sharded_table_of_users_equals_a_whole_one(run_ranks):
    run_ranks(train_on_each_rank, 3)
