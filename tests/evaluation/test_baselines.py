"""Baselines on a hand-computed log, and against a slow twin that scores every item for every user."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recgpt.evaluation.baselines import TrainingCounts, count_training, markov_ranks, popularity_ranks
from recgpt.evaluation.protocol import HeldOutUsers

NUM_ITEMS = 5


def flat(histories):
    items = np.array([item for history in histories for item in history], np.int32)
    return items, np.concatenate([[0], np.cumsum([len(history) for history in histories])]).astype(np.int64)


def held_out(histories, targets) -> HeldOutUsers:
    items, offsets = flat(histories)
    return HeldOutUsers(items, offsets, np.zeros(len(targets), np.int64), np.array(targets, np.int64))


@pytest.fixture
def counts() -> TrainingCounts:
    """Popularity of 1..5: 3, 3, 2, 1, 0. After 1: item 2 twice, item 3 once. After 2: 1 and 3. After 3: 4."""
    return count_training([flat([[1, 2, 1, 3], [1, 2]]), flat([[2, 3, 4], []])], NUM_ITEMS)


def test_counts(counts):
    assert counts.popularity_R.tolist() == [0, 3, 3, 2, 1, 0]
    after = {
        item: dict(
            zip(
                counts.successor_E[counts.first_R[item] : counts.first_R[item + 1]].tolist(),
                counts.count_E[counts.first_R[item] : counts.first_R[item + 1]].tolist(),
                strict=True,
            )
        )
        for item in range(1, NUM_ITEMS + 1)
    }
    assert after == {1: {2: 2, 3: 1}, 2: {1: 1, 3: 1}, 3: {4: 1}, 4: {}, 5: {}}


def test_popularity_ranks_with_ties_and_seen_items(counts):
    users = held_out([[3], [1], [1, 2], [4], [4], [3]], [1, 2, 3, 5, 4, 5])
    ranks = popularity_ranks(counts, users, k=20, keep_seen=False)
    # 1 and 2 tie, against the target; 1 alone is masked; 1 and 2 are masked; 4 is masked; seen; 3 is masked
    assert ranks.tolist() == [2, 1, 1, 4, np.inf, 4]


def test_popularity_ranks_when_seen_items_are_kept(counts):
    users = held_out([[1, 2], [4]], [3, 4])
    assert popularity_ranks(counts, users, k=20, keep_seen=True).tolist() == [3, 4]


def test_markov_ranks(counts):
    users = held_out([[4, 1], [2, 1], [1], [2], [4]], [2, 3, 4, 3, 1])
    ranks = markov_ranks(counts, users, k=20, keep_seen=False)
    # after 1: 2 is first; 2 is seen, so 3 is first; 4 comes behind 2 and 3;
    # after 2: 1 and 3 follow equally often, 1 is more popular; after 4 nothing: popularity, 1 ties with 2
    assert ranks.tolist() == [1, 1, 3, 2, 2]


def test_ranks_beyond_the_list_are_infinite(counts):
    users = held_out([[1], [1]], [3, 4])
    assert markov_ranks(counts, users, k=2, keep_seen=False).tolist() == [2, np.inf]


def slow_ranks(training, histories, targets, k, keep_seen, by_transition):
    popularity = np.zeros(NUM_ITEMS + 1)
    follows = np.zeros((NUM_ITEMS + 1, NUM_ITEMS + 1))
    for history in training:
        for item in history:
            popularity[item] += 1
        for item, following in zip(history[:-1], history[1:], strict=True):
            follows[item, following] += 1
    ranks = []
    for history, target in zip(histories, targets, strict=True):
        scores = popularity + (1000 * follows[history[-1]] if by_transition else 0)
        served = [item for item in range(1, NUM_ITEMS + 1) if keep_seen or item not in history]
        rank = sum(scores[item] >= scores[target] for item in served)
        ranks.append(rank if target in served and rank <= k else np.inf)
    return ranks


item = st.integers(1, NUM_ITEMS)
history = st.lists(item, min_size=1, max_size=6)


@given(
    training=st.lists(st.lists(item, max_size=6), max_size=6),
    users=st.lists(st.tuples(history, item), max_size=5),
    k=st.integers(1, NUM_ITEMS),
    keep_seen=st.booleans(),
)
def test_ranks_equal_those_of_the_slow_twin(training, users, k, keep_seen):
    histories, targets = [user[0] for user in users], [user[1] for user in users]
    pieces = [flat(training[:2]), flat(training[2:])]
    counts = count_training(pieces, NUM_ITEMS)
    for ranks_of, by_transition in ((popularity_ranks, False), (markov_ranks, True)):
        ranks = ranks_of(counts, held_out(histories, targets), k, keep_seen)
        assert ranks.tolist() == slow_ranks(training, histories, targets, k, keep_seen, by_transition)
