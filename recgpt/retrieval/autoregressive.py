"""Autoregressive recall: the model's best guess becomes part of the input of its next step.

Step 1 encodes a history, scores all items with the interest vector and keeps the best ``quotas[0]``.
Each further step appends the best new item of the step before (segment 1), which gives the next
interest vector, and adds its own quota of items that were neither seen nor found (Zhang et al. 2024).

Shapes: T tokens of B histories laid end to end, D width, R = V + 1 table rows, K candidates.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recgpt.config import ModelSettings, RecallSettings
from recgpt.errors import UserError
from recgpt.model.attention import Layout, offsets_of_lengths
from recgpt.model.gpt import GPT
from recgpt.model.losses import blocks
from recgpt.retrieval.index import ExactIndex, Exclusions
from recgpt.schema import PADDING_INDEX, SEGMENT_GENERATED, SEGMENT_REAL


@dataclass
class Recalled:
    """Candidates of B users: those of step 1 first, the best first within a step.

    Where fewer items remain than were asked for, the list ends with item index 0 and score -inf.
    """

    item_index_BK: Tensor  # int64
    score_BK: Tensor  # dtype of the item table; comparable within a step only
    step_BK: Tensor  # int8, 1 for the first step


class AutoregressiveRecall:
    """Batched recall with a key/value cache: a further step costs one position per user.

    Args:
        gpt: in eval mode.
        index: finds the best items of an interest vector.
        table_RD: the item table with its padding row 0, for the model's input.
        settings: quotas, batch size, and whether seen items may be found again.

    Raises ``UserError`` if there are more steps than positions in the model's window.
    """

    def __init__(self, gpt: GPT, index: ExactIndex, table_RD: Tensor, settings: RecallSettings):
        self.gpt = gpt
        self.index = index
        self.table_RD = table_RD
        self.settings = settings
        check_steps_fit(gpt.settings, len(settings.quotas))
        self.window = recall_window(gpt.settings, settings)

    @torch.inference_mode()
    def recommend(self, item_indices: Tensor, offsets: Tensor, user_hash: Tensor) -> Recalled:
        """Candidates for any number of users, in the order given.

        Args:
            item_indices: int64 [T], histories in time order, whole: all of a history counts as seen,
                its last items that fit the window are the model's input. None may be empty.
            offsets: int64 [B + 1], first token of each history and, last, T.
            user_hash: int64 [B].
        """
        assert not self.gpt.training, "recall needs the model in eval mode"
        length_B = offsets.diff()
        assert bool((length_B > 0).all()), "recall cannot start from an empty history"
        # Batches of equal length waste nothing on padding inside attention.
        by_length = length_B.clamp(max=self.window).argsort(stable=True)
        pieces = []
        for start, end in blocks(0, len(by_length), self.settings.batch_users):
            users = by_length[start:end]
            items, batch_offsets = _ranges(item_indices, offsets[users], length_B[users])
            pieces.append(self._recommend_batch(items, batch_offsets, user_hash[users]))
        return _in_order(pieces, by_length, self.settings.k)

    def _recommend_batch(self, item_T: Tensor, offsets: Tensor, user_hash_B: Tensor) -> Recalled:
        excluded = Exclusions.none(item_T.device)
        if not self.settings.keep_seen:
            excluded = Exclusions.from_offsets(item_T, offsets)
        input_T, input_offsets = last_items(item_T, offsets, self.window)
        layout = Layout.from_offsets(input_offsets)
        interest_BD, state = self.gpt.prefill(
            self.table_RD[input_T], layout, self.gpt.user_rows(user_hash_B), len(self.settings.quotas) - 1
        )
        scores, items = [], []
        for step, quota in enumerate(self.settings.quotas, start=1):
            score_BQ, item_BQ = self.index.search(interest_BD, quota, excluded)
            scores.append(score_BQ)
            items.append(item_BQ)
            if step < len(self.settings.quotas):
                excluded = excluded.plus(Exclusions.from_lists(item_BQ))
                interest_BD = self.gpt.extend(self.table_RD[item_BQ[:, 0]], SEGMENT_GENERATED, state)
        return Recalled(torch.cat(items, 1), torch.cat(scores, 1), _steps(self.settings, user_hash_B))


def check_steps_fit(model: ModelSettings, steps: int) -> None:
    """Raises ``UserError`` if the items that ``steps`` recall steps generate leave no room for a history."""
    if steps > model.max_history:
        raise UserError(
            f"{steps} recall steps do not fit a model with max_history={model.max_history}; give fewer quotas"
        )


def recall_window(model: ModelSettings, settings: RecallSettings) -> int:
    """Items of a history that the model is shown, so that the generated ones fit behind them."""
    return model.max_history - (len(settings.quotas) - 1)


@torch.inference_mode()
def recommend_reference(
    gpt: GPT,
    table_RD: Tensor,
    settings: RecallSettings,
    item_indices: Tensor,
    offsets: Tensor,
    user_hash: Tensor,
) -> Recalled:
    """What ``AutoregressiveRecall.recommend`` does, in its obvious form: its slow twin, for tests.

    One user at a time; every step encodes the whole input again and sorts the scores of all items.
    """
    window = recall_window(gpt.settings, settings)
    rows = []
    for user in range(len(user_hash)):
        history = item_indices[offsets[user] : offsets[user + 1]].tolist()
        banned = set() if settings.keep_seen else set(history)
        items, segments = history[-window:], [SEGMENT_REAL] * len(history[-window:])
        found: list[tuple[float, int]] = []
        for quota in settings.quotas:
            layout = Layout.from_offsets(torch.tensor([0, len(items)]))
            user_row = gpt.user_rows(user_hash[user : user + 1])
            interest_TD = gpt(table_RD[items], layout, user_row, torch.tensor(segments))
            score_R = (table_RD @ interest_TD[-1]).tolist()
            allowed = [item for item in range(1, len(table_RD)) if item not in banned]
            best = sorted(allowed, key=lambda item: (-score_R[item], item))[:quota]
            found += [(score_R[item], item) for item in best]
            found += [(-torch.inf, PADDING_INDEX)] * (quota - len(best))
            banned.update(best)
            items = [*items, best[0] if best else PADDING_INDEX]
            segments = [*segments, SEGMENT_GENERATED]
        rows.append(found)
    pairs = torch.tensor(rows, dtype=torch.float64).view(len(rows), settings.k, 2)
    return Recalled(pairs[..., 1].long(), pairs[..., 0].to(table_RD.dtype), _steps(settings, user_hash))


def _steps(settings: RecallSettings, user_hash_B: Tensor) -> Tensor:
    """The recall step of each place in the list, int8 [B, K]."""
    step_S = torch.arange(1, len(settings.quotas) + 1, dtype=torch.int8, device=user_hash_B.device)
    quota_S = torch.tensor(settings.quotas, device=user_hash_B.device)
    return step_S.repeat_interleave(quota_S).expand(len(user_hash_B), -1)


def last_items(item_T: Tensor, offsets: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The last ``most`` items of each history laid end to end, and their offsets."""
    length_B = offsets.diff().clamp(max=most)
    return _ranges(item_T, offsets[1:] - length_B, length_B)


def _ranges(values: Tensor, first_B: Tensor, length_B: Tensor) -> tuple[Tensor, Tensor]:
    """``values[first:first + length]`` of each row laid end to end, and their offsets [B + 1]."""
    offsets = offsets_of_lengths(length_B)
    position_T = torch.arange(int(offsets[-1]), device=values.device)
    return values[position_T + torch.repeat_interleave(first_B - offsets[:-1], length_B)], offsets


def _in_order(pieces: list[Recalled], order: Tensor, k: int) -> Recalled:
    """Batches joined, each user back in its place."""
    if not pieces:
        empty = torch.empty(0, k)
        return Recalled(empty.long(), empty, empty.to(torch.int8))
    place = order.argsort()
    return Recalled(
        torch.cat([piece.item_index_BK for piece in pieces])[place],
        torch.cat([piece.score_BK for piece in pieces])[place],
        torch.cat([piece.step_BK for piece in pieces])[place],
    )
