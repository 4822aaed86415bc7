"""Baselines under the same protocol: popularity, and an item-to-item first-order Markov chain.

Both are counted on the training part alone, see the same input histories as the model (the
Markov chain its last item), mask the same items and serve lists of the same length. Their ranks are
exact, with ties broken against them, without ever holding [users x items]: the rank of a target
is a number of counts that are not below its own, minus those among them that are masked.

Shapes: B users, V items, E transitions (pairs of items that follow each other) or expanded pairs.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recgpt.evaluation.metrics import Ranks
from recgpt.evaluation.protocol import HeldOutUsers

IntArray = npt.NDArray[np.int64]

BATCH_USERS = 256  # users ranked at a time; bounds the pairs that are expanded


@dataclass(frozen=True)
class TrainingCounts:
    """What the baselines know: how often items occur and follow each other in the training part."""

    popularity_R: IntArray
    """Interactions of each item index, [V + 1]."""
    successor_E: IntArray
    """Items that follow, grouped by the item that they follow."""
    count_E: IntArray
    """How often they do."""
    first_R: IntArray
    """[V + 2]: the successors of item x are at ``first_R[x]`` to ``first_R[x + 1]``."""


def count_training(
    histories: Iterable[tuple[npt.NDArray[np.int32], IntArray]], num_items: int
) -> TrainingCounts:
    """Count the training part, given as (item indices, offsets) pieces; memory grows with distinct pairs."""
    rows = num_items + 1
    popularity_R = np.zeros(rows, np.int64)
    pairs, counts = np.empty(0, np.int64), np.empty(0, np.int64)
    for item_T, offsets in histories:
        popularity_R += np.bincount(item_T, minlength=rows)
        followed = np.ones(len(item_T), bool)
        followed[offsets[1:][np.diff(offsets) > 0] - 1] = False  # the last item of each history
        before = np.flatnonzero(followed)
        new_pairs, new_counts = np.unique(
            item_T[before].astype(np.int64) * rows + item_T[before + 1], return_counts=True
        )
        pairs, places = np.unique(np.concatenate([pairs, new_pairs]), return_inverse=True)
        counts = np.bincount(places, np.concatenate([counts, new_counts]), len(pairs)).astype(np.int64)
    first_R = np.searchsorted(pairs // rows, np.arange(rows + 1))
    return TrainingCounts(popularity_R, pairs % rows, counts, first_R)


def popularity_ranks(counts: TrainingCounts, users: HeldOutUsers, k: int, keep_seen: bool) -> Ranks:
    """Ranks in the list of the k most popular items, float64 [B]; infinite beyond k.

    score(v) = number of interactions with v in the training part.
    """
    batches = _batches(counts, users, keep_seen)
    return _within_list([_popularity_places(counts, batch, masked) for batch, masked in batches], k)


def markov_ranks(counts: TrainingCounts, users: HeldOutUsers, k: int, keep_seen: bool) -> Ranks:
    """Ranks in the list of the k likeliest successors of the last item, float64 [B]; infinite beyond k.

    score(v | last item x) = number of times that v directly follows x in the training part; items
    of equal score, also those that never follow x, are ordered by popularity.
    """
    batches = _batches(counts, users, keep_seen)
    return _within_list([_markov_places(counts, batch, masked) for batch, masked in batches], k)


class _Masked:
    """The (user, item) pairs of a batch that may not be served."""

    def __init__(self, users: HeldOutUsers, num_rows: int, keep_seen: bool):
        row_T = np.repeat(np.arange(len(users.target_B)), np.diff(users.offsets))
        self._num_rows = num_rows
        self._key_E = np.unique(row_T * num_rows + users.item_T)[: 0 if keep_seen else None]
        self.row_E = self._key_E // num_rows
        self.item_E = self._key_E % num_rows

    def contains(self, row_E: IntArray, item_E: IntArray) -> npt.NDArray[np.bool_]:
        return np.isin(row_E * self._num_rows + item_E, self._key_E)


def _batches(
    counts: TrainingCounts, users: HeldOutUsers, keep_seen: bool
) -> Iterator[tuple[HeldOutUsers, _Masked]]:
    for first in range(0, len(users.target_B), BATCH_USERS):
        batch = users.batch(first, first + BATCH_USERS)
        yield batch, _Masked(batch, len(counts.popularity_R), keep_seen)


def _popularity_places(counts: TrainingCounts, users: HeldOutUsers, masked: _Masked) -> Ranks:
    """Place of each target by popularity among all items that are not masked; infinite if it is."""
    ascending_V = np.sort(counts.popularity_R[1:])
    own_B = counts.popularity_R[users.target_B]
    not_below_B = len(ascending_V) - np.searchsorted(ascending_V, own_B, side="left")
    masked_E = counts.popularity_R[masked.item_E] >= own_B[masked.row_E]
    place_B = not_below_B - _count_by_row(masked.row_E[masked_E], len(own_B))
    return np.where(masked.contains(np.arange(len(own_B)), users.target_B), np.inf, place_B)


def _markov_places(counts: TrainingCounts, users: HeldOutUsers, masked: _Masked) -> Ranks:
    """Place of each target by (transitions from the last item, popularity); infinite if it is masked."""
    batch = len(users.target_B)
    last_B = users.item_T[users.offsets[1:] - 1]
    row_E, place_E = _expand(counts.first_R[last_B], counts.first_R[last_B + 1])
    item_E, count_E = counts.successor_E[place_E], counts.count_E[place_E]

    own_E = item_E == users.target_B[row_E]
    own_count_B = np.zeros(batch, np.int64)
    own_count_B[row_E[own_E]] = count_E[own_E]

    served_E = ~masked.contains(row_E, item_E)
    as_popular_E = counts.popularity_R[item_E] >= counts.popularity_R[users.target_B][row_E]
    more_E = count_E > own_count_B[row_E]
    not_below_E = more_E | ((count_E == own_count_B[row_E]) & as_popular_E)
    among_successors_B = _count_by_row(row_E[served_E & not_below_E], batch)
    # A target that never follows comes after all successors, by popularity among the other items.
    as_popular_successors_B = _count_by_row(row_E[served_E & as_popular_E], batch)
    others_B = _popularity_places(counts, users, masked) - as_popular_successors_B
    places_B: Ranks = np.where((own_count_B == 0) | np.isinf(others_B), others_B, 0.0) + among_successors_B
    return places_B


def _expand(first_B: IntArray, end_B: IntArray) -> tuple[IntArray, IntArray]:
    """All places first <= place < end of each row: (row, place) pairs."""
    length_B = end_B - first_B
    row_E = np.repeat(np.arange(len(first_B)), length_B)
    within_E = np.arange(len(row_E)) - (np.cumsum(length_B) - length_B)[row_E]
    return row_E, first_B[row_E] + within_E


def _count_by_row(row_E: IntArray, num_rows: int) -> IntArray:
    return np.bincount(row_E, minlength=num_rows)


def _within_list(places: list[Ranks], k: int) -> Ranks:
    place_U = np.concatenate([np.empty(0), *places])
    return np.where(place_U <= k, place_U, np.inf)
