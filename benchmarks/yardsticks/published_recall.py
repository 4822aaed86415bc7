"""The yardstick: recall in two steps as the authors' published code does it, written anew.

Histories are padded on the left to the whole window. Each of the two steps runs the model over all
positions, gives the scores of all items at each of them, and then scores the last position twice more as a
dense matrix, once to choose the item that is appended and once for its candidates. Seen items are set to a
score of 0 through a dense mask, and numpy finds the best.

Shapes: B users, L positions (the window), D width, H heads, K width per head, R = V + 1 table rows,
N items found.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from recgpt.model.gpt import GPT
from recgpt.schema import PADDING_INDEX, SEGMENT_GENERATED, SEGMENT_REAL

LONGER_LIST = 100  # of the second step, before what the first one found is dropped
HIDDEN = -10_000.0  # added to attention scores that must not count

IntArray = npt.NDArray[np.int64]
Scores = npt.NDArray[np.float32]


class PublishedRecall:
    """The published algorithm with the weights of our model, so that both find the same items.

    Args:
        gpt: in eval mode, without user vectors.
        table_RD: the item table with its padding row 0.
        quotas: candidates of the two steps.
        all_positions: False leaves out the scores of all items at all positions, which nothing uses.
        seen_score: what masks seen items; minus infinity instead of the authors' 0 makes it exact.
    """

    def __init__(
        self,
        gpt: GPT,
        table_RD: Tensor,
        quotas: tuple[int, int],
        all_positions: bool = True,
        seen_score: float = 0.0,
    ):
        assert gpt.settings.user.kind == "none"
        self.gpt = gpt
        self.table_RD = table_RD
        self.quotas = quotas
        self.all_positions = all_positions
        self.seen_score = seen_score

    @torch.inference_mode()
    def recommend(self, histories: Sequence[IntArray]) -> IntArray:
        """Candidates of one batch of users, item indices [B, sum of the quotas]; none may be empty."""
        item_BL = torch.from_numpy(_padded(histories, self.gpt.settings.max_history))
        segment_BL = torch.full_like(item_BL, SEGMENT_REAL)
        last_BD = self._forward(item_BL, segment_BL)
        next_B1 = torch.from_numpy(best_items(self._scores(last_BD, histories), 1))
        first_BN = best_items(self._scores(last_BD, histories), self.quotas[0])

        item_BL = torch.cat([item_BL[:, 1:], next_B1], 1)
        segment_BL = torch.cat([segment_BL[:, 1:], torch.full_like(next_B1, SEGMENT_GENERATED)], 1)
        last_BD = self._forward(item_BL, segment_BL)
        best_items(self._scores(last_BD, histories), 1)  # the authors' code chooses a next item here too
        longer_BN = best_items(self._scores(last_BD, histories), LONGER_LIST)
        found = first_BN.tolist()
        new = [
            [item for item in longer if item not in old][: self.quotas[1]]
            for longer, old in zip(longer_BN, found, strict=True)
        ]
        return np.concatenate([first_BN, np.array(new)], axis=1)

    def _forward(self, item_BL: Tensor, segment_BL: Tensor) -> Tensor:
        """Interest vectors of the last position, [B, D]."""
        interest_BLD = padded_forward(self.gpt, self.table_RD, item_BL, segment_BL)
        if self.all_positions:
            interest_BLD @ self.table_RD.T
        return interest_BLD[:, -1]

    def _scores(self, last_BD: Tensor, histories: Sequence[IntArray]) -> Scores:
        score_BR = (last_BD @ self.table_RD.T).numpy().copy()
        score_BR[_seen(histories, len(self.table_RD)) > 0] = self.seen_score
        return score_BR


def padded_forward(gpt: GPT, table_RD: Tensor, item_BL: Tensor, segment_BL: Tensor) -> Tensor:
    """What the GPT computes, [B, L, D], over histories padded on the left and with attention spelled out."""
    batch, length = item_BL.shape
    real_BL = item_BL != PADDING_INDEX
    visible_BLL = torch.ones(length, length, dtype=torch.bool).tril() & real_BL[:, None]
    mask_B1LL = (~visible_BLL[:, None]).float() * HIDDEN
    position_BL = (real_BL.cumsum(1) - 1).clamp(min=0)
    x_BLD = table_RD[item_BL] + gpt.position(position_BL) + gpt.segment(segment_BL)
    block: Any
    for block in gpt.blocks:
        attention = block.attention
        qkv_BL3HK = attention.query_key_value(block.attention_norm(x_BLD)).view(
            batch, length, 3, attention.heads, attention.head_width
        )
        query_BHLK, key_BHLK, value_BHLK = qkv_BL3HK.permute(2, 0, 3, 1, 4)
        score_BHLL = query_BHLK @ key_BHLK.transpose(-1, -2) / attention.head_width**0.5 + mask_B1LL
        attended_BHLK = score_BHLL.softmax(-1) @ value_BHLK
        x_BLD = x_BLD + attention.output(attended_BHLK.transpose(1, 2).flatten(2))
        x_BLD = x_BLD + block.feed_forward(block.feed_forward_norm(x_BLD))
    return gpt._interest(x_BLD)


def best_items(score_BR: Scores, count: int) -> IntArray:
    """The ``count`` items with the highest scores, the highest first, [B, N]."""
    item_BN = np.argpartition(score_BR, -count)[:, -count:]
    order_BN = np.take_along_axis(score_BR, item_BN, 1).argsort()[:, ::-1]
    return np.take_along_axis(item_BN, order_BN, 1)


def _padded(histories: Sequence[IntArray], length: int) -> IntArray:
    """The last items of each history, padding before them, [B, L]."""
    item_BL = np.full((len(histories), length), PADDING_INDEX)
    for row_L, history in zip(item_BL, histories, strict=True):
        row_L[-len(history[-length:]) :] = history[-length:]
    return item_BL


def _seen(histories: Sequence[IntArray], num_rows: int) -> npt.NDArray[np.float64]:
    """How a sparse matrix of seen items looks made dense, [B, R]; padding counts as seen."""
    seen_BR = np.zeros((len(histories), num_rows))
    seen_BR[
        np.repeat(np.arange(len(histories)), [len(history) for history in histories]),
        np.concatenate(histories),
    ] = 1
    seen_BR[:, PADDING_INDEX] = 1
    return seen_BR
