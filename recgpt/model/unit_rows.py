"""Rows of length 1, as a table with cosine similarity shows them; the table itself keeps them of any length.

Shapes: N rows, D width, U rows asked for.

The length of a row says nothing then, and grows in training: gradients stand at right angles to their
row, so that each step lengthens it, and the next one turns it by less (Wang et al. 2017, arXiv 1704.06369).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_SHORTEST = 1e-12  # a row of zeros stays one
_ROWS_AT_A_TIME = 16_384


def unit(rows_ND: Tensor) -> Tensor:
    """Each row divided by its length, [N, D]."""
    return F.normalize(rows_ND, dim=-1, eps=_SHORTEST)


class UnitRows:
    """Rows [N, D] of which those that are read are divided by their length, in ``dtype``: no copy of all."""

    def __init__(self, rows_ND: Tensor, dtype: torch.dtype):
        self._rows_ND = rows_ND
        self._dtype = dtype

    @property
    def shape(self) -> torch.Size:
        return self._rows_ND.shape

    def __len__(self) -> int:
        return len(self._rows_ND)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """The rows of a slice or of indices (int64 [U])."""
        return unit(self._rows_ND[rows].to(self._dtype))


def gradient_by_raw_rows(rows_UD: Tensor, gradient_UD: Tensor) -> Tensor:
    """The gradient by rows of any length, in place of ``gradient_UD``, that by the rows divided by it.

    With u = e / |e|:  dL/de = (dL/du - (dL/du . u) u) / |e|
    """
    for rows, gradient in zip(
        rows_UD.split(_ROWS_AT_A_TIME), gradient_UD.split(_ROWS_AT_A_TIME), strict=True
    ):
        length_U1 = rows.to(gradient.dtype).norm(dim=1, keepdim=True).clamp(min=_SHORTEST)
        unit_UD = rows / length_U1
        gradient.sub_(unit_UD * (gradient * unit_UD).sum(1, keepdim=True)).div_(length_U1)
    return gradient_UD
