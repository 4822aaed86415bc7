"""A table of rows that lies in several pieces of memory, such as memory-mapped files of consecutive rows.

Shapes: R rows, D width, N rows asked for.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import TypeAlias

import torch
from torch import Tensor

from recgpt.model.unit_rows import UnitRows


class RowRanges:
    """Consecutive pieces of a table, read like one tensor [R, D] without being copied together.

    Args:
        pieces: [rows, D] each, of one dtype; at least one.
    """

    def __init__(self, pieces: Sequence[Tensor]):
        self.pieces = list(pieces)
        self.starts = [0, *accumulate(map(len, self.pieces))]  # of each piece, and R

    def __len__(self) -> int:
        return self.starts[-1]

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """The rows of a slice without step, [N, D], or of indices (int64, any shape), [..., D].

        A slice inside one piece is a view of it; all else is a copy.
        """
        if isinstance(rows, slice):
            first, end, _ = rows.indices(len(self))
            return self._range(first, max(first, end))
        if len(self.pieces) == 1:
            return self.pieces[0][rows]
        return self._rows(rows.flatten()).view(*rows.shape, self.pieces[0].shape[1])

    def _range(self, first: int, end: int) -> Tensor:
        parts = [
            piece[max(first - start, 0) : end - start]
            for start, piece in zip(self.starts, self.pieces, strict=False)
            if first < start + len(piece) and start < end
        ]
        if not parts:
            return self.pieces[0][:0]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _rows(self, row_N: Tensor) -> Tensor:
        found_ND = self.pieces[0].new_empty(len(row_N), self.pieces[0].shape[1])
        piece_N = torch.searchsorted(torch.tensor(self.starts), row_N, right=True) - 1
        for number in piece_N.unique().tolist():
            place_M = (piece_N == number).nonzero().squeeze(1)
            found_ND[place_M] = self.pieces[number][row_N[place_M] - self.starts[number]]
        return found_ND


Rows: TypeAlias = Tensor | RowRanges | UnitRows
