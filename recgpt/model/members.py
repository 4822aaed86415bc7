"""Models side by side in one: an ensemble that is trained, stored and served like a single model.

Each member has its share of every vector, from the item table to the interest vector, and of the attention
heads, and sees nothing of the others. Each is trained by a loss of its own. The score of an item is the mean
of the members' scores, which is one dot product of whole vectors: recall knows nothing of members.

Members that start from different weights err differently, so that their mean is better than each of them
(deep ensembles, Lakshminarayanan et al. 2017, arXiv 1612.01474).

Shapes: T tokens, D width, M members, S = D / M width of a member, I and O values in and out.
"""

from collections.abc import Iterator, Sequence
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recgpt.model.unit_rows import UnitRows

Rows = TypeVar("Rows", bound=Tensor | UnitRows)


class MemberLinear(nn.Linear):
    """A linear layer for each member: [T, M x I] to [T, M x O]; ``weight`` is [M x O, I].

    ``parts_in`` and ``parts_out``: a member's share of the input, or output, is so many vectors end to end.
    """

    def __init__(self, inputs: int, outputs: int, members: int, parts_in: int = 1, parts_out: int = 1):
        super().__init__(inputs // members, outputs)
        self.members = members
        self.parts_in = parts_in
        self.parts_out = parts_out

    def forward(self, x_TI: Tensor) -> Tensor:
        return member_linear(x_TI, self.weight, self.bias, self.members)

    def as_one(self) -> tuple[Tensor, Tensor]:
        """Weight [M x O, M x I] and bias of an ordinary layer that computes the same, but in and out stands
        the first part of all members before the second: as without members.
        """
        weight = torch.block_diag(*self.weight.chunk(self.members))
        weight = _parts_first(
            _parts_first(weight, self.members, self.parts_out).T, self.members, self.parts_in
        ).T
        return weight.contiguous(), _parts_first(self.bias, self.members, self.parts_out)


def _parts_first(x: Tensor, members: int, parts: int) -> Tensor:
    return x.unflatten(0, (members, parts, -1)).transpose(0, 1).flatten(0, 2)


def weights_as_one(module: nn.Module) -> dict[str, Tensor]:
    """The state dict with each ``MemberLinear`` ``as_one``: for encoders that know ordinary layers alone."""
    weights = module.state_dict()
    for name, layer in module.named_modules():
        if isinstance(layer, MemberLinear):
            weights[f"{name}.weight"], weights[f"{name}.bias"] = (value.detach() for value in layer.as_one())
    return weights


def member_linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor, members: int) -> Tensor:
    """What a ``MemberLinear`` computes."""
    if members == 1:
        return F.linear(x_TI, weight_OI, bias_O)
    x_MTI = x_TI.unflatten(1, (members, -1)).transpose(0, 1)
    weight_MIO = weight_OI.unflatten(0, (members, -1)).transpose(1, 2)
    out_MTO = torch.baddbmm(bias_O.view(members, 1, -1), x_MTI, weight_MIO)
    return out_MTO.transpose(0, 1).flatten(1)


def member_norm(width: int, members: int) -> nn.Module:
    """Layer normalisation of each member's share of vectors [T, D]."""
    return nn.GroupNorm(members, width) if members > 1 else nn.LayerNorm(width)


def joined(first_TD: Tensor, second_TD: Tensor, members: int) -> Tensor:
    """Two vectors as one, [T, 2 x D], in which each member's shares of both stand side by side."""
    shares = [x_TD.unflatten(-1, (members, -1)) for x_TD in (first_TD, second_TD)]
    return torch.cat(shares, -1).flatten(-2)


def by_member(interest_TD: Tensor, rows_ND: Rows, members: int) -> Iterator[tuple[Tensor, Rows]]:
    """For each member, what its scores are the dot products of: [T, S] and [N, S].

    Their mean over the members is the dot product of the whole vectors.
    """
    rows = rows_ND.of_members() if isinstance(rows_ND, UnitRows) else rows_ND.chunk(members, dim=1)
    yield from zip((members * interest_TD).chunk(members, dim=1), cast(Sequence[Rows], rows), strict=True)
