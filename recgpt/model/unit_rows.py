"""Rows of length 1, as a table with cosine similarity shows them; the table itself keeps them of any length.

Shapes: N rows, D width, U rows asked for, M members, S = D / M width of a member. Of a model with several
members (see ``recgpt.model.members``) the part of a row that belongs to a member has length 1 by itself.

The length of a row says nothing then, and grows in training: gradients stand at right angles to their
row, so that each step lengthens it, and the next one turns it by less (Wang et al. 2017, arXiv 1704.06369).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_SHORTEST = 1e-12  # a row of zeros stays one
_ROWS_AT_A_TIME = 16_384


def unit(rows_ND: Tensor, members: int = 1) -> Tensor:
    """Each row divided by its length, [N, D]; with ``members``, each member's part of it by its own."""
    parts_NMS = rows_ND.unflatten(-1, (members, -1))
    return F.normalize(parts_NMS, dim=-1, eps=_SHORTEST).flatten(-2)


class UnitRows:
    """Rows [N, D] of which those that are read are divided by their length, in ``dtype``: no copy of all."""

    def __init__(self, rows_ND: Tensor, dtype: torch.dtype, members: int = 1):
        self._rows_ND = rows_ND
        self._dtype = dtype
        self._members = members

    @property
    def shape(self) -> torch.Size:
        return self._rows_ND.shape

    def __len__(self) -> int:
        return len(self._rows_ND)

    def __getitem__(self, rows: slice | Tensor) -> Tensor:
        """The rows of a slice or of indices (int64 [U])."""
        return unit(self._rows_ND[rows].to(self._dtype), self._members)

    def of_members(self) -> list["UnitRows"]:
        """The part of each member by itself, [N, S]."""
        return [UnitRows(part_NS, self._dtype) for part_NS in self._rows_ND.chunk(self._members, dim=1)]


def gradient_by_raw_rows(rows_UD: Tensor, gradient_UD: Tensor, members: int = 1) -> Tensor:
    """The gradient by rows of any length, in place of ``gradient_UD``, that by the rows divided by it.

    With u = e / |e|, for each member's part e of a row:  dL/de = (dL/du - (dL/du . u) u) / |e|
    """
    for rows_ND, gradient_ND in zip(
        rows_UD.split(_ROWS_AT_A_TIME), gradient_UD.split(_ROWS_AT_A_TIME), strict=True
    ):
        part_NMS = rows_ND.unflatten(1, (members, -1))
        gradient_NMS = gradient_ND.view(part_NMS.shape)
        length_NM1 = part_NMS.to(gradient_ND.dtype).norm(dim=2, keepdim=True).clamp(min=_SHORTEST)
        unit_NMS = part_NMS / length_NM1
        gradient_NMS.sub_(unit_NMS * (gradient_NMS * unit_NMS).sum(2, keepdim=True)).div_(length_NM1)
    return gradient_UD
