"""How recommendations spread over the catalogue: few items for everybody, or something for each.

Shapes: I items of the catalogue.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from recgpt.data.arrow import combine
from recgpt.data.vocabulary import Vocabulary
from recgpt.retrieval.candidate_checks import ItemIndices
from recgpt.retrieval.candidates import read_candidates
from recgpt.schema import ITEM_IDS

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Spread:
    """How occurrences spread over the items of a catalogue."""

    coverage: float
    """Share of the items that occur at all."""
    gini: float
    """0 if all items occur alike often; towards 1 the fewer have all occurrences."""
    mean_rank: float
    """Mean over the occurrences: the place of the item by popularity in the log, from 1."""


def count_candidates(url: str, vocabulary: Vocabulary) -> Counts:
    """In how many users' candidates each item is, [I]. Memory is that of one part and the catalogue.

    Raises ``UserError`` if the candidates are not finished, not whole, or of another dataset.
    """
    indices = ItemIndices(vocabulary)
    counts = np.zeros(vocabulary.num_items + 1, np.int64)
    for table in read_candidates(url):
        items = indices.encode(combine(table[ITEM_IDS]).flatten())
        counts += np.bincount(items, minlength=len(counts))
    return counts[1:]


def spread(counts_I: Counts, rank_I: npt.NDArray[np.float64]) -> Spread:
    """Of counts, at least one of them above 0; ``rank_I``: places by popularity (``popularity_places``)."""
    num_items, total = len(counts_I), counts_I.sum()
    ascending = np.sort(counts_I)
    weighted = float(np.arange(1, num_items + 1) @ ascending)
    return Spread(
        coverage=float(np.mean(counts_I > 0)),
        gini=2 * weighted / (num_items * float(total)) - (num_items + 1) / num_items,
        mean_rank=float(rank_I @ counts_I / total),
    )


def popularity_places(counts_I: Counts) -> npt.NDArray[np.float64]:
    """The place of each item by popularity, [I], from 1; equally popular items share their mean place."""
    _, group_I, sizes = np.unique(-counts_I, return_inverse=True, return_counts=True)
    ends = sizes.cumsum()
    return (ends - (sizes - 1) / 2)[group_I]


def share_of_top(counts_I: Counts, share: float) -> float:
    """Of all occurrences, those of the items that occur most: ``share`` of the catalogue, one at least."""
    top = max(1, round(share * len(counts_I)))
    return float(np.sort(counts_I)[::-1][:top].sum() / counts_I.sum())
