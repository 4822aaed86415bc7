"""The item table: one vector per item index, input of the model and, tied, its output.

Shapes: V = num_items, table rows R = V + 1 (row 0 is padding), D width, T tokens.
"""

import numpy as np
import torch
from torch import Tensor, nn

from recgpt.model.losses import full_cross_entropy
from recgpt.model.scoring import ExcludedPairs, best_row, count_at_least

INIT_STANDARD_DEVIATION = 0.02
_INIT_CHUNK_ROWS = 4096


class ItemTable(nn.Module):
    """The whole table in one process: the simple choice, and the reference for the sharded one."""

    def __init__(self, num_items: int, width: int, seed: int, loss_block_items: int):
        super().__init__()
        self.loss_block_items = loss_block_items
        self.weight = nn.Parameter(initial_rows(seed, 0, num_items + 1, width))

    def forward(self, item_index_T: Tensor) -> Tensor:
        """Item vectors [T, D] of item indices (int64 [T])."""
        return nn.functional.embedding(item_index_T, self.weight)

    def loss_sum(self, interest_TD: Tensor, target_T: Tensor) -> Tensor:
        """Sum over targets (int64 [T], item indices >= 1) of full cross-entropy; a scalar."""
        return full_cross_entropy(interest_TD, self.weight, target_T, self.loss_block_items)

    def best_item(self, interest_TD: Tensor, excluded: ExcludedPairs) -> Tensor:
        """The best allowed item index of each interest vector, int64 [T]; the lower one wins a tie."""
        return best_row(interest_TD, self.weight, 1, self.loss_block_items, excluded)[1]

    def rank_of(self, interest_TD: Tensor, target_T: Tensor, excluded: ExcludedPairs) -> Tensor:
        """1-based rank of each target among all allowed items, int64 [T]; ties count against the target.

        A target that is itself excluded (its user chose it before) ranks after all items.
        """
        score_T = (interest_TD * self.weight[target_T]).sum(1)
        others = excluded.with_targets(target_T)
        above_T = count_at_least(interest_TD, score_T, self.weight, 1, self.loss_block_items, others)
        return excluded.ranks(above_T, target_T, len(self.weight))


def initial_rows(seed: int, first: int, end: int, width: int) -> Tensor:
    """Initial rows ``first`` to ``end`` (exclusive), float32 [end - first, D].

    A row depends on (seed, row) alone, so that it starts the same whatever shard holds it.
    """
    pieces = []
    for chunk in range(first // _INIT_CHUNK_ROWS, -(-end // _INIT_CHUNK_ROWS)):
        # Not torch's generator: on the CPU it looks at 32 bits of the seed only.
        generator = np.random.default_rng((seed, chunk))
        values = generator.standard_normal((_INIT_CHUNK_ROWS, width), dtype=np.float32)
        rows = torch.from_numpy(values) * INIT_STANDARD_DEVIATION
        chunk_first = chunk * _INIT_CHUNK_ROWS
        pieces.append(rows[max(first - chunk_first, 0) : end - chunk_first])
    return torch.cat(pieces) if pieces else torch.empty(0, width)
