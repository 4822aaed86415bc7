"""The GPT on packed histories: no history sees another, and the cache equals encoding again."""

import pytest
import torch

from recgpt.config import ModelSettings, UserSettings
from recgpt.model.attention import Layout
from recgpt.model.gpt import GPT

WIDTH = 8


@pytest.fixture(params=[("add", 1), ("gate", 1), ("add", 2), ("gate", 2)])
def gpt(request):
    torch.manual_seed(0)
    combine, members = request.param
    user = UserSettings(kind="hashed", buckets=10, combine=combine)
    width = WIDTH // members  # of each
    settings = ModelSettings(width=width, layers=2, heads=2, members=members, max_history=6, user=user)
    return GPT(settings).double().eval()


def layout_of(*lengths):
    return Layout.from_offsets(torch.tensor([0, *lengths]).cumsum(0))


def test_layout_by_hand():
    layout = layout_of(2, 3)
    assert layout.row.tolist() == [0, 0, 1, 1, 1]
    assert layout.position.tolist() == [0, 1, 0, 1, 2]
    assert layout.longest == 3
    packed = torch.arange(5.0)
    assert layout.pad(packed).tolist() == [[0, 1, 0], [2, 3, 4]]
    assert layout.unpad(layout.pad(packed)).tolist() == packed.tolist()


def test_packed_equals_each_history_alone(gpt):
    items, users = torch.randn(9, WIDTH).double(), torch.tensor([1, 4, 0])
    lengths = [3, 1, 5]
    packed = gpt(items, layout_of(*lengths), users)
    for row, (part, start) in enumerate(zip(items.split(lengths), (0, 3, 4), strict=True)):
        alone = gpt(part, layout_of(len(part)), users[row : row + 1])
        torch.testing.assert_close(packed[start : start + len(part)], alone)


def test_no_position_sees_a_later_one(gpt):
    items, users = torch.randn(5, WIDTH).double(), torch.tensor([2])
    before = gpt(items, layout_of(5), users)
    items[3] = torch.randn(WIDTH)
    after = gpt(items, layout_of(5), users)
    torch.testing.assert_close(before[:3], after[:3])
    assert not torch.allclose(before[3:], after[3:])


def test_cache_equals_encoding_again(gpt):
    """Histories of 2 and 4 items get two generated items each, of different segments."""
    users = torch.tensor([3, 0])
    histories = [torch.randn(2, WIDTH).double(), torch.randn(4, WIDTH).double()]
    added = torch.randn(2, 2, WIDTH).double()  # step, history
    vector, state = gpt.prefill(torch.cat(histories), layout_of(2, 4), users, extra=2)
    first = gpt.extend(added[0], 1, state)
    second = gpt.extend(added[1], 0, state)

    whole = torch.cat([histories[0], added[:, 0], histories[1], added[:, 1]])
    segment = torch.tensor([0, 0, 1, 0, 0, 0, 0, 0, 1, 0])
    expected = gpt(whole, layout_of(4, 6), users, segment_T=segment)
    torch.testing.assert_close(vector, expected[[1, 7]])
    torch.testing.assert_close(first, expected[[2, 8]])
    torch.testing.assert_close(second, expected[[3, 9]])


def test_selected_states_are_copies_that_go_on_apart(gpt):
    """Two branches of the second history and one of the first, each with an item of its own."""
    users = torch.tensor([3, 0])
    histories = [torch.randn(2, WIDTH).double(), torch.randn(4, WIDTH).double()]
    added = torch.randn(3, WIDTH).double()
    _, state = gpt.prefill(torch.cat(histories), layout_of(2, 4), users, extra=1)
    rows = torch.tensor([1, 0, 1])
    vector = gpt.extend(added, 1, state.select(rows))
    for place, row in enumerate(rows.tolist()):
        items = torch.cat([histories[row], added[place, None]])
        segments = torch.tensor([0] * len(histories[row]) + [1])
        again = gpt(items, layout_of(len(items)), users[row, None], segments)
        torch.testing.assert_close(vector[place], again[-1])
    assert state.next_position.tolist() == [2, 4], "the state that was selected from stays as it was"


def test_no_room_for_generated_items_is_refused(gpt):
    with pytest.raises(AssertionError, match="no room"):
        gpt.prefill(torch.randn(6, WIDTH).double(), layout_of(6), torch.tensor([0]), extra=1)


def test_a_batch_without_histories_reaches_every_parameter(gpt):
    """A rank without data must still take part in the reduction of every gradient."""
    gpt(torch.zeros(0, WIDTH).double(), layout_of(), torch.zeros(0, dtype=torch.int64)).sum().backward()
    assert all(parameter.grad is not None for parameter in gpt.parameters())


def test_a_gate_lets_through_what_it_is_open_for(gpt):
    if gpt.user_gate is None:
        pytest.skip("without a gate")
    items, users, layout = torch.randn(3, WIDTH).double(), torch.tensor([2]), layout_of(3)
    with torch.no_grad():
        gpt.user_gate.weight.zero_()
        gpt.user_gate.bias.fill_(-1e3)
        closed = gpt(items, layout, users)
        gpt.user.weight[2] += 1
        torch.testing.assert_close(gpt(items, layout, users), closed)
        gpt.user_gate.bias.fill_(1e3)
        opened = gpt(items, layout, users)
        gpt.user_gate = None  # the user's vector is added whole
        torch.testing.assert_close(gpt(items, layout, users), opened)


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_lengths_of_interest_vectors(similarity):
    settings = ModelSettings(width=WIDTH, members=1, similarity=similarity, temperature=0.25)
    gpt = GPT(settings).double().eval()
    interest = gpt(torch.randn(5, WIDTH).double(), layout_of(5), torch.tensor([0]))
    length = 1 / 0.25 if similarity == "cosine" else WIDTH**0.5  # a layer norm's
    torch.testing.assert_close(interest.norm(dim=1), torch.full((5,), length).double(), rtol=1e-3, atol=0)


def test_user_rows():
    hashed = GPT(ModelSettings(user=UserSettings(kind="hashed", buckets=10)))
    rows = hashed.user_rows(torch.tensor([0, 9, 10, -1, -(2**63)]))
    assert rows.tolist() == [1, 10, 1, 10, 3]
    impersonal = GPT(ModelSettings(user=UserSettings(kind="none")))
    assert impersonal.user_rows(torch.tensor([5, 6])).tolist() == [0, 0]
