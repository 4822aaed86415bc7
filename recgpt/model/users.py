"""The users that a model with a row for each user knows, and their rows once they are trained.

Shapes: U known users, R = U + 1 rows of their table (row 0 is ``UNKNOWN_USER``), B histories, D width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from recgpt.schema import UNKNOWN_USER


@dataclass(frozen=True)
class KnownUsers:
    """Users by the stable hash of their id; the i-th in order of the hash, from 1, has row i."""

    hashes: Tensor  # int64 [U], ascending, distinct

    def __post_init__(self) -> None:
        assert bool((self.hashes[:-1] < self.hashes[1:]).all()), "hashes are not ascending and distinct"

    def __deepcopy__(self, memo: dict[int, Any]) -> "KnownUsers":
        return self  # nothing changes it: copies of a model share it

    @property
    def num_rows(self) -> int:
        """Rows of their table, that of the unknown users included."""
        return len(self.hashes) + 1

    def rows(self, user_hash_B: Tensor) -> Tensor:
        """Table rows, int64 [B], of user hashes (int64 [B], on any device)."""
        hash_B = user_hash_B.to(self.hashes.device)
        smaller_B = torch.searchsorted(self.hashes, hash_B)
        not_larger_B = torch.searchsorted(self.hashes, hash_B, right=True)
        return not_larger_B.where(smaller_B < not_larger_B, UNKNOWN_USER).to(user_hash_B.device)


class UserVectors(nn.Module):
    """The trained rows of a table of users, for recall.

    They move with the model but are no part of its state dict: an export keeps them in files of their own.
    """

    def __init__(self, rows_RD: Tensor):
        super().__init__()
        self.register_buffer("rows_RD", rows_RD, persistent=False)
        self.rows_RD: Tensor

    def forward(self, user_row_B: Tensor) -> Tensor:
        """Vectors [B, D] of table rows (int64 [B])."""
        return nn.functional.embedding(user_row_B, self.rows_RD)
