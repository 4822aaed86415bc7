"""Prompt-tuning batches: by hand, and against a slow twin that runs the model once per generated item."""

import numpy as np
import pytest
import torch
from torch import nn

from recgpt.config import LossSettings, ModelSettings, PromptSettings, TrainSettings, UserSettings
from recgpt.data.packing import PackedBatch
from recgpt.model.attention import Layout
from recgpt.model.gpt import GPT
from recgpt.model.item_table import ItemTable
from recgpt.model.scoring import no_pairs
from recgpt.training.model import NextItemModel, TrainingBatch
from recgpt.training.prompts import plain_batch, prefix_pairs, prompted_batch

NUM_ITEMS = 40
MAX_HISTORY = 8
CPU = torch.device("cpu")

PLAIN = PromptSettings(interleaved_share=0.0, last_share=0.0)
INTERLEAVED = PromptSettings(interleaved_share=1.0, last_share=0.0, train_from_rank=None)
LAST = PromptSettings(interleaved_share=0.0, last_share=1.0)
LAST_TWO = PromptSettings(interleaved_share=0.0, last_share=1.0, last_items=2)
MIXED = PromptSettings(interleaved_share=0.4, last_share=0.4, train_from_rank=None)


class CountingTable(ItemTable):
    """Generates 90 + the number of items that the token may not get: after x_1..x_t that is 90 + t."""

    def best_item(self, interest_TD, excluded, pool_items=None, temperature=0.0):
        return 90 + torch.bincount(excluded.token_P, minlength=len(interest_TD))


def table_of(kind, num_items, width):
    loss = LossSettings(kind="full", block_items=7)
    return kind(num_items, width, 0, loss, torch.arange(num_items + 1))


def settings_of(kind="hashed", dropout=0.0):
    user = UserSettings(kind=kind, buckets=5, dropout=dropout)
    return ModelSettings(
        width=8, members=1, layers=2, heads=2, max_history=MAX_HISTORY, dropout=0.3, user=user
    )


def model_of(settings, table=None):
    """float64 and in evaluation mode, with weights large enough that every part of the input matters."""
    torch.manual_seed(1)
    table = table_of(ItemTable, NUM_ITEMS, settings.width) if table is None else table
    model = NextItemModel(GPT(settings), table).double().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:  # not those of the norms
            nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture(scope="module")
def counting_model():
    return model_of(settings_of(), table_of(CountingTable, 99, 8))


def packed_of(lists, user_hashes=None):
    """Each list is x_1 .. x_n with x_{n+1} at its end."""
    return PackedBatch(
        torch.tensor([item for items in lists for item in items[:-1]], dtype=torch.int64),
        torch.tensor([item for items in lists for item in items[1:]], dtype=torch.int64),
        torch.from_numpy(np.cumsum([0, *(len(items) - 1 for items in lists)])),
        torch.tensor(range(len(lists)) if user_hashes is None else user_hashes, dtype=torch.int64),
    )


def prompted(model, lists, prompts, user_hashes=None, key=(0, 0)):
    packed = packed_of(lists, user_hashes)
    plain = plain_batch(model, packed, TrainSettings(model=model.gpt.settings), key[1], CPU)
    return prompted_batch(model, plain, packed.user_hash_B, prompts, key)


def by_user(batch):
    """(items, targets, segments, positions, user row) of each history."""
    sizes = batch.offsets.diff().tolist()
    parts = [
        [part.tolist() for part in values.split(sizes)]
        for values in (batch.item_index_T, batch.target_T, batch.segment_T, batch.position_T)
    ]
    return list(zip(*parts, batch.user_row_B.tolist(), strict=True))


def random_lists(seed, count=30):
    """Histories of 2 to MAX_HISTORY + 1 items; some items come again."""
    generator = np.random.default_rng(seed)
    return [
        generator.integers(1, NUM_ITEMS + 1, generator.integers(2, MAX_HISTORY + 2)).tolist()
        for _ in range(count)
    ]


# By hand


def test_interleaved_by_hand(counting_model):
    batch = prompted(counting_model, [[1, 2, 3, 4], [5, 6], [7, 8, 9]], INTERLEAVED)
    assert [history[:4] for history in by_user(batch)] == [
        ([1, 91, 2, 92, 3], [2, 0, 3, 0, 4], [0, 1, 0, 1, 0], [0, 1, 1, 2, 2]),
        ([5], [6], [0], [0]),
        ([7, 91, 8], [8, 0, 9], [0, 1, 0], [0, 1, 1]),
    ]
    assert batch.offsets.tolist() == [0, 5, 6, 9]
    assert batch.target_T.count_nonzero() == 6


def test_generated_items_that_missed_are_trained_for_what_was_chosen(counting_model):
    prompts = PromptSettings(interleaved_share=1.0, last_share=0.0, train_from_rank=1)
    lists = [[1, 2, 92, 4], [5, 6], list(range(1, MAX_HISTORY + 2))]
    short, shortest, longest = by_user(prompted(counting_model, lists, prompts))
    # The second guess is what was chosen, and has nothing left to learn.
    assert short[:4] == ([1, 91, 2, 92, 92, 93], [2, 2, 92, 0, 4, 4], [0, 1] * 3, [0, 1, 1, 2, 2, 3])
    assert shortest[:4] == ([5, 91], [6, 6], [0, 1], [0, 1])
    assert longest[3][-2:] == [MAX_HISTORY - 1, MAX_HISTORY - 1], "no position is left for a last guess"
    assert longest[1][-1] == MAX_HISTORY + 1


def test_generated_items_are_trained_for_what_the_model_ranks_low():
    model = model_of(settings_of())
    lists = random_lists(seed=9)
    prompts = PromptSettings(interleaved_share=1.0, last_share=0.0, train_from_rank=5)
    trained = 0
    for number, (items, targets, segments, positions, row) in enumerate(
        by_user(prompted(model, lists, prompts))
    ):
        for item, target, segment, position in zip(items, targets, segments, positions, strict=True):
            if segment:
                prefix, chosen = lists[number][:position], lists[number][position]
                better = rank_slowly(model, prefix, chosen, row)
                assert target == (chosen if better >= 4 and item != chosen else 0)
                trained += target > 0
    assert trained > 20


def test_last_by_hand(counting_model):
    batch = prompted(counting_model, [[1, 2, 3, 4], [5, 6], [7, 8, 9]], LAST)
    assert [history[:4] for history in by_user(batch)] == [
        ([1, 2, 92], [2, 3, 4], [0, 0, 1], [0, 1, 2]),
        ([5], [6], [0], [0]),  # without its one input nothing real would be left
        ([7, 91], [8, 9], [0, 1], [0, 1]),
    ]
    assert batch.offsets.tolist() == [0, 3, 4, 6]


def test_the_last_two_by_hand(counting_model):
    batch = prompted(counting_model, [[1, 2, 3, 4], [5, 6], [7, 8, 9]], LAST_TWO)
    assert [history[:4] for history in by_user(batch)] == [
        ([1, 91, 92], [2, 3, 4], [0, 1, 1], [0, 1, 2]),
        ([5], [6], [0], [0]),
        ([7, 8], [8, 9], [0, 0], [0, 1]),
    ]


def test_shares_of_nothing_leave_the_batch_plain(counting_model):
    lists = [[1, 2, 3, 4], [5, 6]]
    batch = prompted(counting_model, lists, PLAIN)
    assert [history[:4] for history in by_user(batch)] == [
        ([1, 2, 3], [2, 3, 4], [0, 0, 0], [0, 1, 2]),
        ([5], [6], [0], [0]),
    ]


@pytest.mark.parametrize("prompts", [INTERLEAVED, LAST, LAST_TWO, MIXED])
def test_an_empty_batch_stays_empty(prompts):
    batch = prompted(model_of(settings_of()), [], prompts)
    assert by_user(batch) == []
    assert batch.offsets.tolist() == [0]
    assert len(batch.target_T) == 0


@pytest.mark.parametrize("prompts", [LAST, LAST_TWO])
def test_a_batch_of_which_no_history_is_long_enough_stays_plain(prompts):
    batch = prompted(model_of(settings_of()), [[1, 2], [3, 4]], prompts)
    assert [history[:3] for history in by_user(batch)] == [([1], [2], [0]), ([3], [4], [0])]


def test_prefix_pairs_by_hand():
    pairs = prefix_pairs(torch.tensor([4, 5, 6, 7]), Layout.from_offsets(torch.tensor([0, 3, 4])))
    assert pairs.token_P.tolist() == [0, 1, 1, 2, 2, 2, 3]
    assert pairs.item_P.tolist() == [4, 4, 5, 4, 5, 6, 7]


# Against the slow twin


def generate_slowly(model, items, segments, user_row):
    """The best item after ``items`` that is not among them, by one run of the model over all of them."""
    layout = Layout.from_offsets(torch.tensor([0, len(items)]))
    batch = TrainingBatch(
        torch.tensor(items),
        torch.zeros(len(items), dtype=torch.int64),
        torch.tensor(segments),
        layout.position,
        layout.offsets,
        torch.tensor([user_row]),
    )
    with torch.no_grad():
        scores = (model.item_table.weight @ model.interest(batch, layout)[-1]).tolist()
    allowed = [item for item in range(1, NUM_ITEMS + 1) if item not in items]
    return max(allowed, key=lambda item: scores[item])


def rank_slowly(model, prefix, chosen, user_row):
    """How many items that may follow are better than the chosen one; all of them if it may not itself."""
    layout = Layout.from_offsets(torch.tensor([0, len(prefix)]))
    nothing = torch.zeros(len(prefix), dtype=torch.int64)
    rows = torch.tensor([user_row])
    batch = TrainingBatch(torch.tensor(prefix), nothing, nothing, layout.position, layout.offsets, rows)
    with torch.no_grad():
        scores = (model.item_table.weight @ model.interest(batch, layout)[-1]).tolist()
    if chosen in prefix:
        return NUM_ITEMS
    return sum(scores[item] > scores[chosen] for item in range(1, NUM_ITEMS + 1) if item not in prefix)


def interleave_slowly(model, items, user_row):
    inputs, targets = items[:-1], items[1:]
    history = ([], [], [], [])
    for place, (item, target) in enumerate(zip(inputs, targets, strict=True)):
        entries = [(item, target, 0, place)]
        if place + 1 < len(inputs):
            prefix = inputs[: place + 1]
            generated = generate_slowly(model, prefix, [0] * len(prefix), user_row)
            entries.append((generated, 0, 1, place + 1))
        for entry in entries:
            for column, value in zip(history, entry, strict=True):
                column.append(value)
    return (*history, user_row)


def replace_last_slowly(model, items, user_row, count):
    inputs, targets = items[:-1], items[1:]
    segments = [0] * len(inputs)
    if len(inputs) > count:
        for place in range(len(inputs) - count, len(inputs)):
            inputs[place] = generate_slowly(model, inputs[:place], segments[:place], user_row)
            segments[place] = 1
    return (inputs, targets, segments, list(range(len(inputs))), user_row)


@pytest.mark.parametrize("kind", ["none", "hashed"])
@pytest.mark.parametrize(
    ("prompts", "slowly"),
    [
        (INTERLEAVED, interleave_slowly),
        (LAST, lambda *history: replace_last_slowly(*history, 1)),
        (LAST_TWO, lambda *history: replace_last_slowly(*history, 2)),
        (
            PromptSettings(interleaved_share=0.0, last_share=1.0, last_items=4),
            lambda *history: replace_last_slowly(*history, 4),
        ),
    ],
)
def test_equals_the_slow_twin(kind, prompts, slowly):
    model = model_of(settings_of(kind))
    lists = random_lists(seed=2)
    fast = by_user(prompted(model, lists, prompts))
    rows = model.gpt.user_rows(torch.arange(len(lists))).tolist()
    assert fast == [slowly(model, list(items), row) for items, row in zip(lists, rows, strict=True)]
    generated = {
        item for items, _, segments, *_ in fast for item, s in zip(items, segments, strict=True) if s
    }
    assert len(generated) > 6, "a model that always generates the same would prove little"


def test_a_mixed_batch_equals_its_histories_one_by_one():
    """Each history is placed by its own draw, whatever batch it is in, and whatever stands beside it."""
    model = model_of(settings_of())
    lists = random_lists(seed=3)
    hashes = [1000 * number for number in range(len(lists))]
    together = by_user(prompted(model, lists, MIXED, hashes, key=(5, 2)))
    alone = [
        by_user(prompted(model, [items], MIXED, [number], key=(5, 2)))[0]
        for items, number in zip(lists, hashes, strict=True)
    ]
    assert together == alone
    backwards = by_user(prompted(model, lists[::-1], MIXED, hashes[::-1], key=(5, 2)))
    assert together == backwards[::-1]
    placements = {(0 in targets, 1 in segments) for _, targets, segments, *_ in together}
    assert placements == {(False, False), (True, True), (False, True)}, "plain, interleaved and last"


def test_the_placement_depends_on_seed_and_epoch():
    model = model_of(settings_of("none"))
    lists = random_lists(seed=4)
    batches = {key: by_user(prompted(model, lists, MIXED, key=key)) for key in [(0, 0), (0, 1), (1, 0)]}
    assert batches[0, 0] == by_user(prompted(model, lists, MIXED, key=(0, 0)))
    assert batches[0, 0] != batches[0, 1]
    assert batches[0, 0] != batches[1, 0]


@pytest.mark.parametrize("prompts", [INTERLEAVED, LAST_TWO, MIXED])
def test_generated_items_are_new_to_their_prefix_and_targets_stay(prompts):
    model = model_of(settings_of())
    lists = random_lists(seed=5)
    for items, (mixed, targets, segments, positions, _) in zip(
        lists, by_user(prompted(model, lists, prompts)), strict=True
    ):
        assert [target for target in targets if target] == items[1:]
        for place, (item, segment) in enumerate(zip(mixed, segments, strict=True)):
            if segment:
                real = items[: positions[place]]
                assert 1 <= item <= NUM_ITEMS
                assert item not in real
                if prompts is LAST_TWO:
                    assert item not in mixed[:place]
            else:
                assert item == items[positions[place]]


def test_the_plain_batch_is_not_changed():
    model = model_of(settings_of())
    packed = packed_of(random_lists(seed=6))
    plain = plain_batch(model, packed, TrainSettings(model=model.gpt.settings), 0, CPU)
    before = by_user(plain)
    for prompts in (INTERLEAVED, LAST):
        prompted_batch(model, plain, packed.user_hash_B, prompts, (0, 0))
        assert by_user(plain) == before


def test_seen_items_may_be_generated_if_asked_for(counting_model):
    prompts = PromptSettings(interleaved_share=1.0, last_share=0.0, train_from_rank=None, allow_seen=True)
    (history,) = by_user(prompted(counting_model, [[1, 2, 3]], prompts))
    assert history[0] == [1, 90, 2]  # 90 and the number of items that are forbidden


def test_generated_items_are_drawn_in_proportion_to_their_scores():
    table = table_of(ItemTable, 3, 1)
    table.weight.data = torch.tensor([[9.0], [0.0], [1.0], [2.0]]).log()
    torch.manual_seed(0)
    drawn = table.best_item(torch.full((30_000, 1), 2.0), no_pairs(CPU), temperature=2.0)
    shares = torch.bincount(drawn, minlength=4) / 30_000
    torch.testing.assert_close(shares, torch.tensor([0.0, 0.0, 1 / 3, 2 / 3]), rtol=0, atol=0.01)
    fewer = table.best_item(torch.full((100, 1), 2.0), no_pairs(CPU), pool_items=1, temperature=2.0)
    assert len(fewer.unique()) == 1, "of one drawn item there is no choice"


# The plain batch


def test_plain_batch_by_hand():
    settings = settings_of()
    batch = plain_batch(
        model_of(settings), packed_of([[1, 2, 3], [4, 5]], [7, -1]), TrainSettings(model=settings), 0, CPU
    )
    # Rows of the user table: 7 % 5 + 1, and -1 % 5 + 1 in the mathematical sense.
    assert by_user(batch) == [([1, 2], [2, 3], [0, 0], [0, 1], 3), ([4], [5], [0], [0], 5)]


@pytest.mark.parametrize("kind", ["none", "hashed"])
def test_with_a_dropout_of_1_or_without_a_user_module_all_users_are_unknown(kind):
    settings = settings_of(kind, dropout=1.0 if kind == "hashed" else 0.0)
    packed = packed_of(random_lists(seed=7))
    batch = plain_batch(model_of(settings), packed, TrainSettings(model=settings), 0, CPU)
    assert batch.user_row_B.tolist() == [0] * 30


def test_the_unknown_users_of_an_epoch_depend_on_the_user_alone():
    settings = TrainSettings(model=settings_of(dropout=0.5))
    model = model_of(settings.model)

    def unknown(hashes, epoch):
        batch = plain_batch(model, packed_of([[1, 2]] * len(hashes), hashes), settings, epoch, CPU)
        return {number for number, row in zip(hashes, batch.user_row_B.tolist(), strict=True) if row == 0}

    everyone = list(range(400))
    first = unknown(everyone, epoch=0)
    assert 150 < len(first) < 250
    assert unknown(everyone[::-1][:50], epoch=0) == first & set(everyone[-50:])
    assert unknown(everyone, epoch=1) != first
