"""How recall goes on from what a step found: by one appended item, or by several branches.

With one branch (`OnePath`) what is appended comes from the items that the step found:

- `mean`: the sum over them of exp(score_i / temperature) / (their sum) x the vector of item i, brought to
  length 1 where all vectors have it (of several members, the part of each). One guess is mostly wrong; all of
  them say where the model looks.
- `best`: the first of them.
- `sampled`: item i with the probability that is its weight in `mean`. It is the first at which the
  running sum of probabilities, from the best item on, exceeds a number in [0, 1) that depends on the user's
  hash and the step alone.

With `beam` there are up to ``beam_width`` branches (`Beam`). Each is the history with items of its own
appended, and has a sum: of the scores that these items had for the branch when they were appended. A step
scores each item with the interest vectors of all branches; the highest of them is its score, and the step
finds the best items by that. Every pair of a branch and one of the items that the step found is then a
possible branch, with the pair's score added to the branch's sum; those with the highest sums are kept. Of
equal sums the earlier branch comes first, then the better item. One branch is the same as `best`.

Where nothing was found, padding is appended, as nothing is left to find.

Shapes: B users, D width, Q items that a step finds, W branches before a step, N branches after it.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recgpt.config import RecallSettings
from recgpt.data.hashing import uniform
from recgpt.model.gpt import GPT, HistoryState
from recgpt.model.unit_rows import unit
from recgpt.retrieval.index import Exclusions, Index
from recgpt.schema import PADDING_INDEX, SEGMENT_GENERATED


@dataclass
class OnePath:
    """One continuation of each user's history: `mean`, `best` or `sampled`."""

    gpt: GPT
    index: Index
    settings: RecallSettings
    user_hash_B: Tensor
    interest_BD: Tensor
    state: HistoryState

    def find(self, quota: int, excluded: Exclusions) -> tuple[Tensor, Tensor]:
        """The items of a step: scores and item indices [B, Q]."""
        return self.index.search(self.interest_BD, quota, excluded)

    def go_on(self, step: int, score_BQ: Tensor, item_BQ: Tensor) -> None:
        """Append to each history one of the items that this step found, or the mean of them."""
        if self.settings.continuation == "mean":
            appended_BD = self._mean(score_BQ, item_BQ)
        elif self.settings.continuation == "sampled":
            place_B = sampled_places(score_BQ, self.settings.temperature, self.user_hash_B, step)
            appended_BD = self.index.vectors(item_BQ.gather(1, place_B[:, None]).squeeze(1))
        else:
            appended_BD = self.index.vectors(item_BQ[:, 0])
        self.interest_BD = self.gpt.extend(appended_BD, SEGMENT_GENERATED, self.state)

    def _mean(self, score_BQ: Tensor, item_BQ: Tensor) -> Tensor:
        weight_BQ = weights(score_BQ, self.settings.temperature)
        share_BQ = weight_BQ / weight_BQ.sum(1, keepdim=True).clamp(min=1)  # the best item weighs 1
        vector_BQD = self.index.vectors(item_BQ)
        mean_BD = (share_BQ.to(vector_BQD.dtype)[:, None] @ vector_BQD).squeeze(1)
        settings = self.gpt.settings
        return unit(mean_BD, settings.members) if settings.similarity == "cosine" else mean_BD


class Beam:
    """The best branches of each user's history; one at first."""

    def __init__(
        self, gpt: GPT, index: Index, settings: RecallSettings, interest_BD: Tensor, state: HistoryState
    ):
        self.gpt = gpt
        self.index = index
        self.width = settings.beam_width
        self.interest_BWD = interest_BD[:, None]
        self.sum_BW = torch.zeros_like(interest_BD[:, :1])  # -inf: there is no such branch
        self.state = state

    def find(self, quota: int, excluded: Exclusions) -> tuple[Tensor, Tensor]:
        """The items of a step: scores and item indices [B, Q]."""
        num_users, width, _ = self.interest_BWD.shape
        score_XQ, item_XQ = self.index.search(
            self.interest_BWD.flatten(0, 1), quota, excluded.for_branches(width)
        )
        score_BWQ = score_XQ.view(num_users, width, quota)
        score_BWQ = score_BWQ.masked_fill(self.sum_BW[:, :, None] == -torch.inf, -torch.inf)
        return best_of_branches(score_BWQ.flatten(1), item_XQ.view(num_users, -1), quota)

    def go_on(self, step: int, score_BQ: Tensor, item_BQ: Tensor) -> None:
        """Keep the best pairs of a branch and an item that this step found."""
        num_users, width, _ = self.interest_BWD.shape
        vector_BQD = self.index.vectors(item_BQ)
        if width == 1:
            score_BWQ = score_BQ[:, None]
        else:
            score_BWQ = self.interest_BWD @ vector_BQD.transpose(1, 2)
            score_BWQ.masked_fill_(item_BQ[:, None] == PADDING_INDEX, -torch.inf)
        sum_BWQ = self.sum_BW[:, :, None] + score_BWQ
        sum_BN, pair_BN = sum_BWQ.flatten(1).sort(dim=1, descending=True, stable=True)
        # Where there are fewer pairs than branches to keep, there are fewer branches.
        self.sum_BW, pair_BN = sum_BN[:, : self.width], pair_BN[:, : self.width]
        branch_BN, place_BN = pair_BN // item_BQ.shape[1], pair_BN % item_BQ.shape[1]
        user_B1 = torch.arange(num_users, device=item_BQ.device)[:, None]
        self.state = self.state.select((user_B1 * width + branch_BN).flatten())
        appended_XD = vector_BQD[user_B1, place_BN].flatten(0, 1)
        interest_XD = self.gpt.extend(appended_XD, SEGMENT_GENERATED, self.state)
        self.interest_BWD = interest_XD.view(num_users, -1, interest_XD.shape[1])


def weights(score_BQ: Tensor, temperature: float) -> Tensor:
    """exp(score / temperature) over that of the first item, float64 [B, Q]; 0 where there is no item."""
    score_BQ = score_BQ.double()
    return torch.where(score_BQ > -torch.inf, ((score_BQ - score_BQ[:, :1]) / temperature).exp(), 0.0)


def sampled_places(score_BQ: Tensor, temperature: float, user_hash_B: Tensor, step: int) -> Tensor:
    """The place of the item that each user draws in this step, int64 [B]; 0 where there is none."""
    found_BQ = score_BQ > -torch.inf
    sum_BQ = weights(score_BQ, temperature).cumsum(1)
    draw_B = torch.from_numpy(uniform(user_hash_B.cpu().numpy(), step)).to(score_BQ.device)
    place_B = (sum_BQ <= draw_B[:, None] * sum_BQ[:, -1:]).sum(1)
    return place_B.minimum(found_BQ.sum(1) - 1).clamp(min=0)


def best_of_branches(score_BC: Tensor, item_BC: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The best ``k`` different items of C scored ones, each with its highest score; as ``Index.search``."""
    score_BC, by_score_BC = score_BC.sort(dim=1, descending=True)
    item_BC, by_item_BC = item_BC.gather(1, by_score_BC).sort(dim=1, stable=True)
    score_BC = score_BC.gather(1, by_item_BC)
    score_BC[:, 1:].masked_fill_(item_BC[:, 1:] == item_BC[:, :-1], -torch.inf)
    score_BC, order_BC = score_BC.sort(dim=1, descending=True, stable=True)
    score_BK, item_BK = score_BC[:, :k], item_BC.gather(1, order_BC[:, :k])
    return score_BK, item_BK.masked_fill(score_BK == -torch.inf, PADDING_INDEX)
