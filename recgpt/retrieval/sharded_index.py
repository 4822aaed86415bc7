"""An item table that is divided over several holders, searched as if it were one.

Interest vectors go to every shard, each of which finds the best of its own items, and the short lists are
merged: what travels does not grow with the catalogue. Shards hold whole blocks of the undivided search,
so that each score is computed by the same product and comes out the same to the last bit.

Shapes: B interest vectors, D width, K items asked for, P excluded (row, item) pairs, X items looked up,
S shards.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from recgpt.model.row_ranges import Rows
from recgpt.retrieval.index import FIRST_ITEM, ExactIndex, Exclusions, best_of_lists, few_allowed

Bounds: TypeAlias = tuple[int, int]
"""First item of a shard, and the one after its last."""

Ask: TypeAlias = Callable[[str, Mapping[int, tuple[Any, ...]]], Mapping[int, Any]]
"""Calls the named method of the given shards with their arguments, all at once, and returns their answers."""


def shard_bounds(
    num_items: int, block_items: int, shards: int, allowed: Tensor | None = None
) -> list[Bounds]:
    """The items of each shard, in order: whole blocks, as evenly as they divide.

    What is left over when all are cut into blocks goes to the last shard, which has a whole block before it.
    There are fewer shards than asked for where there are fewer blocks. ``allowed``: as for ``IndexShard``.
    """
    if allowed is None or not few_allowed(allowed, num_items + FIRST_ITEM):
        allowed = torch.arange(FIRST_ITEM, num_items + FIRST_ITEM)
    blocks = max(1, len(allowed) // block_items)
    shards = min(shards, blocks)
    cuts = [number * blocks // shards * block_items for number in range(1, shards)]
    starts = [FIRST_ITEM, *allowed[cuts].tolist()]
    return list(zip(starts, [*starts[1:], num_items + FIRST_ITEM], strict=True))


class IndexShard:
    """What the holder of a shard does. Items have their numbers of the whole catalogue outside.

    Args:
        row_RD: rows ``first - 1`` to the last of the shard. The one before the first stands where an
            index has its padding: it is never found.
        first: the first item.
        num_items: items of the whole catalogue.
        block_items: items scored at a time; that of the undivided search.
        allowed: items of the whole catalogue that may be found, int64, ascending; None: all.
    """

    def __init__(
        self, row_RD: Rows, first: int, num_items: int, block_items: int, allowed: Tensor | None = None
    ):
        self.offset = first - FIRST_ITEM
        self.row_RD = row_RD
        copied = allowed is not None and few_allowed(allowed, num_items + FIRST_ITEM)
        if allowed is not None:
            allowed = allowed[(allowed >= first) & (allowed < self.offset + len(row_RD))] - self.offset
        self.index = ExactIndex(row_RD, block_items, allowed, copied=copied)

    def search(self, interest_BD: Tensor, k: int, row_P: Tensor, item_P: Tensor) -> tuple[Tensor, Tensor]:
        """Scores and items [B, K] as ``ExactIndex.search`` finds them; pairs (row, item) are excluded."""
        score_BK, item_BK = self.index.search(interest_BD, k, Exclusions(row_P, item_P - self.offset))
        found_BK = score_BK > -torch.inf
        return score_BK, torch.where(found_BK, item_BK + self.offset, item_BK)

    def vectors(self, item_X: Tensor) -> Tensor:
        """The rows of items of this shard, [X, D]; the first shard has padding, too."""
        return self.row_RD[item_X - self.offset]


class ShardedIndex:
    """The index of a table whose shards are asked through ``ask``; finds what ``ExactIndex`` finds.

    Args:
        bounds: as ``shard_bounds`` gives them.
        ask: reaches the ``IndexShard`` of each number.
    """

    def __init__(self, bounds: Sequence[Bounds], ask: Ask):
        self.ask = ask
        self.num_shards = len(bounds)
        self.start_S = torch.tensor([first for first, _ in bounds[1:]], dtype=torch.int64)

    def search(
        self, interest_BD: Tensor, k: int, excluded: Exclusions | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``Index.search`` says; scores have the dtype of the table."""
        pairs = Exclusions.none(interest_BD.device) if excluded is None else excluded
        order = pairs.item_P.argsort()
        rows = self._by_shard(pairs.item_P[order], pairs.token_P[order])
        items = self._by_shard(pairs.item_P[order], pairs.item_P[order])
        answers = self.ask(
            "search",
            {shard: (interest_BD, k, rows[shard], items[shard]) for shard in range(self.num_shards)},
        )
        lists = [answers[shard] for shard in range(self.num_shards)]
        return best_of_lists(
            torch.cat([score_BK for score_BK, _ in lists], 1),
            torch.cat([item_BK for _, item_BK in lists], 1),
            k,
        )

    def vectors(self, item_X: Tensor) -> Tensor:
        """As ``Index.vectors`` says; the row of each item travels once."""
        item_N, place_X = item_X.unique(return_inverse=True)
        parts = self._by_shard(item_N, item_N)
        # Without any items the first shard still says how wide the vectors are.
        asked = [shard for shard, part in enumerate(parts) if len(part)] or [0]
        answers = self.ask("vectors", {shard: (parts[shard],) for shard in asked})
        return torch.cat([answers[shard] for shard in sorted(answers)])[place_X]

    def _by_shard(self, item_N: Tensor, value_N: Tensor) -> Sequence[Tensor]:
        """The values of the items (ascending) of each shard."""
        return value_N.tensor_split(torch.searchsorted(item_N, self.start_S))
