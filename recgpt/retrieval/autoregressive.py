"""Autoregressive recall: the model's best guess becomes part of the input of its next step.

Step 1 encodes a history, scores all items with the interest vector and keeps the best ``quotas[0]``.
Each further step appends what the step before found (segment 1), which gives the next interest vector,
and adds its own quota of items that were neither seen nor found (Zhang et al. 2024). What is appended, and
what recall with several branches is, `recgpt.retrieval.continuations` says.

A user without a history gets the most popular items instead, whatever the quotas: of equally popular ones
the lower item index comes first, scores are the counts, and the step is ``POPULARITY_STEP``.

Shapes: T tokens of B histories laid end to end, D width, R = V + 1 table rows, K candidates.
"""

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from recgpt.config import ModelSettings, RecallSettings
from recgpt.data.hashing import uniform
from recgpt.errors import UserError
from recgpt.model.attention import Layout, offsets_of_lengths
from recgpt.model.gpt import GPT
from recgpt.model.losses import blocks
from recgpt.model.unit_rows import unit
from recgpt.retrieval.continuations import Beam, OnePath
from recgpt.retrieval.index import Exclusions, Index
from recgpt.schema import PADDING_INDEX, POPULARITY_STEP, SEGMENT_GENERATED, SEGMENT_REAL

MOST_STEPS = 127  # of int8


@dataclass
class Recalled:
    """Candidates of B users: those of step 1 first, the best first within a step.

    Where fewer items remain than were asked for, the list ends with item index 0 and score -inf.
    """

    item_index_BK: Tensor  # int64
    score_BK: Tensor  # dtype of the item table; comparable within a step only
    step_BK: Tensor  # int8, 1 for the first step; ``POPULARITY_STEP`` for users without a history


class AutoregressiveRecall:
    """Batched recall with a key/value cache: a further step costs one position per user.

    Args:
        gpt: in eval mode; its device is where recall computes.
        index: finds the best items of an interest vector, and knows the vectors of items; on that device.
        settings: quotas, batch size, continuation, and whether seen items may be found again.
        popularity_R: a count of each item, for users without a history; None: there are no such users.
        allowed: the items that may be found, int64, as the index was told; None: all.

    Raises ``UserError`` if there are more steps than positions in the model's window.
    """

    def __init__(
        self,
        gpt: GPT,
        index: Index,
        settings: RecallSettings,
        popularity_R: Tensor | None = None,
        allowed: Tensor | None = None,
    ):
        self.gpt = gpt
        self.index = index
        self.settings = settings
        check_steps_fit(gpt.settings, len(settings.quotas))
        self.window = recall_window(gpt.settings, settings)
        self.popular = None
        if popularity_R is not None:
            self.popular = most_popular(popularity_R, allowed, settings.k)

    @torch.inference_mode()
    def recommend(self, item_indices: Tensor, offsets: Tensor, user_hash: Tensor) -> Recalled:
        """Candidates for any number of users, in the order given.

        Args:
            item_indices: int64 [T], histories in time order, whole: all of a history counts as seen,
                its last items that fit the window are the model's input. Empty ones need ``popularity_R``.
            offsets: int64 [B + 1], first token of each history and, last, T.
            user_hash: int64 [B].

        The result lies where the histories do.
        """
        assert not self.gpt.training, "recall needs the model in eval mode"
        length_B = offsets.diff()
        # Batches of equal length waste nothing on padding inside attention. Empty histories come first.
        by_length = length_B.clamp(max=self.window).argsort(stable=True)
        num_empty = int((length_B == 0).sum())
        pieces = [self._popular_items(num_empty, offsets.device)] if num_empty else []
        for start, end in blocks(num_empty, len(by_length), self._users_at_a_time()):
            users = by_length[start:end]
            items, batch_offsets = _ranges(item_indices, offsets[users], length_B[users])
            pieces.append(self._recommend_batch(items, batch_offsets, user_hash[users]))
        return _in_order(pieces, by_length, self.settings.k)

    def _users_at_a_time(self) -> int:
        """A beam takes as much memory as so many users."""
        branches = self.settings.beam_width if self.settings.continuation == "beam" else 1
        return max(1, self.settings.batch_users // branches)

    def _recommend_batch(self, item_T: Tensor, offsets: Tensor, user_hash_B: Tensor) -> Recalled:
        home, device = item_T.device, self.gpt.position.weight.device
        item_T, offsets, user_hash_B = item_T.to(device), offsets.to(device), user_hash_B.to(device)
        excluded = Exclusions.none(device)
        if not self.settings.keep_seen:
            excluded = Exclusions.from_offsets(item_T, offsets)
        path = self._start(item_T, offsets, user_hash_B)
        scores, items = [], []
        for step, quota in enumerate(self.settings.quotas, start=1):
            score_BQ, item_BQ = path.find(quota, excluded)
            scores.append(score_BQ)
            items.append(item_BQ)
            if step < len(self.settings.quotas):
                excluded = excluded.plus(Exclusions.from_lists(item_BQ))
                path.go_on(step, score_BQ, item_BQ)
        item_BK, score_BK = torch.cat(items, 1), torch.cat(scores, 1)
        return Recalled(item_BK.to(home), score_BK.to(home), _steps(self.settings, len(item_BK), home))

    def _start(self, item_T: Tensor, offsets: Tensor, user_hash_B: Tensor) -> OnePath | Beam:
        input_T, input_offsets = last_items(item_T, offsets, self.window)
        interest_BD, state = self.gpt.prefill(
            self.index.vectors(input_T),
            Layout.from_offsets(input_offsets),
            self.gpt.user_rows(user_hash_B),
            len(self.settings.quotas) - 1,
        )
        if self.settings.continuation == "beam":
            return Beam(self.gpt, self.index, self.settings, interest_BD, state)
        return OnePath(self.gpt, self.index, self.settings, user_hash_B, interest_BD, state)

    def _popular_items(self, num_users: int, home: torch.device) -> Recalled:
        assert self.popular is not None, "recall for an empty history needs the popularity of items"
        item_K, count_K = self.popular
        item_BK = item_K.to(home).expand(num_users, -1)
        score_BK = count_K.to(home, self.gpt.position.weight.dtype).expand(num_users, -1)
        return Recalled(item_BK, score_BK, torch.full_like(item_BK, POPULARITY_STEP, dtype=torch.int8))


def most_popular(popularity_R: Tensor, allowed: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` most popular items, int64 [K], and their counts, float64 [K]; ends as ``Recalled`` does."""
    item_A = torch.arange(PADDING_INDEX + 1, len(popularity_R)) if allowed is None else allowed
    count_A, order_A = popularity_R[item_A].double().sort(descending=True, stable=True)
    item_K = torch.full((k,), PADDING_INDEX)
    count_K = torch.full((k,), -torch.inf, dtype=torch.float64)
    found = min(k, len(item_A))
    item_K[:found], count_K[:found] = item_A[order_A[:found]], count_A[:found]
    return item_K, count_K


def check_steps_fit(model: ModelSettings, steps: int) -> None:
    """Raises ``UserError`` if the items that ``steps`` recall steps generate leave no room for a history."""
    if steps > MOST_STEPS:
        raise UserError(f"{steps} recall steps are too many; give at most {MOST_STEPS} quotas")
    if steps > model.max_history:
        raise UserError(
            f"{steps} recall steps do not fit a model with max_history={model.max_history}; give fewer quotas"
        )


def recall_window(model: ModelSettings, settings: RecallSettings) -> int:
    """Items of a history that the model is shown, so that the generated ones fit behind them."""
    return model.max_history - (len(settings.quotas) - 1)


def _steps(settings: RecallSettings, num_users: int, device: torch.device) -> Tensor:
    """The recall step of each place in the list, int8 [B, K]."""
    step_S = torch.arange(1, len(settings.quotas) + 1, dtype=torch.int8, device=device)
    quota_S = torch.tensor(settings.quotas, device=device)
    return step_S.repeat_interleave(quota_S).expand(num_users, -1)


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


Branch = tuple[float, list[Tensor]]
"""Of the slow twin: the sum of the scores of the appended items, and the vectors [D] that were appended."""


@torch.inference_mode()
def recommend_reference(
    gpt: GPT,
    table_RD: Tensor,
    settings: RecallSettings,
    item_indices: Tensor,
    offsets: Tensor,
    user_hash: Tensor,
    popularity_R: Tensor | None = None,
    allowed: Tensor | None = None,
) -> Recalled:
    """What ``AutoregressiveRecall.recommend`` does, in its obvious form: its slow twin, for tests.

    One user at a time; every step encodes the whole input again and sorts the scores of all items.
    """
    may_be_found = set(range(1, len(table_RD)) if allowed is None else allowed.tolist())
    rows, steps = [], []
    for user in range(len(user_hash)):
        history = item_indices[offsets[user] : offsets[user + 1]].tolist()
        if history:
            rows.append(
                _recall_of(gpt, table_RD, settings, history, user_hash[user : user + 1], may_be_found)
            )
            steps.append([step for step, quota in enumerate(settings.quotas, start=1) for _ in range(quota)])
        else:
            assert popularity_R is not None
            rows.append(_best_of(dict(enumerate(popularity_R.tolist())), may_be_found, settings.k))
            steps.append([POPULARITY_STEP] * settings.k)
    pairs = torch.tensor(rows, dtype=torch.float64).view(len(rows), settings.k, 2)
    step_BK = torch.tensor(steps, dtype=torch.int8).view(len(rows), settings.k)
    return Recalled(pairs[..., 1].long(), pairs[..., 0].to(table_RD.dtype), step_BK)


def _recall_of(
    gpt: GPT,
    table_RD: Tensor,
    settings: RecallSettings,
    history: list[int],
    user_hash_1: Tensor,
    may_be_found: set[int],
) -> list[tuple[float, int]]:
    """(score, item) of each place in one user's list."""
    new = may_be_found if settings.keep_seen else may_be_found - set(history)
    given = history[-recall_window(gpt.settings, settings) :]
    branches: list[Branch] = [(0.0, [])]
    places: list[tuple[float, int]] = []
    for step, quota in enumerate(settings.quotas, start=1):
        score_of_branch = []
        for _, appended in branches:
            vector_TD = torch.stack([*table_RD[given], *appended])
            segments = [SEGMENT_REAL] * len(given) + [SEGMENT_GENERATED] * len(appended)
            layout = Layout.from_offsets(torch.tensor([0, len(vector_TD)]))
            interest_TD = gpt(vector_TD, layout, gpt.user_rows(user_hash_1), torch.tensor(segments))
            score_of_branch.append((table_RD @ interest_TD[-1]).tolist())
        score_of = {item: max(scores[item] for scores in score_of_branch) for item in new}
        found = _best_of(score_of, new, quota)
        places += found
        best = [item for _, item in found if item != PADDING_INDEX]
        new = new - set(best)
        if best:
            vectors = {item: table_RD[item] for item in best}
            branches = _continued(settings, branches, score_of_branch, vectors, user_hash_1, step)
            if settings.continuation == "mean" and gpt.settings.similarity == "cosine":
                members = gpt.settings.members
                branches = [(0.0, [*appended, unit(last, members)]) for _, (*appended, last) in branches]
    return places


def _best_of(score_of: dict[int, float], items: set[int], k: int) -> list[tuple[float, int]]:
    best = sorted(items, key=lambda item: (-score_of[item], item))[:k]
    return [(score_of[item], item) for item in best] + [(-math.inf, PADDING_INDEX)] * (k - len(best))


def _continued(
    settings: RecallSettings,
    branches: list[Branch],
    score_of_branch: list[list[float]],
    vectors: dict[int, Tensor],
    user_hash_1: Tensor,
    step: int,
) -> list[Branch]:
    """The branches after a step that found the items of ``vectors``, the best first."""
    pairs = [
        (total + scores[item], [*appended, vector])
        for (total, appended), scores in zip(branches, score_of_branch, strict=True)
        for item, vector in vectors.items()
    ]
    if settings.continuation == "beam":
        return sorted(pairs, key=lambda pair: -pair[0])[: settings.beam_width]
    if settings.continuation == "best":
        return pairs[:1]
    scores = [score_of_branch[0][item] for item in vectors]
    weights = [math.exp((score - scores[0]) / settings.temperature) for score in scores]
    sums = list(accumulate(weights))
    if settings.continuation == "mean":
        shares = torch.tensor(weights, dtype=torch.float64) / sums[-1]
        mean = shares.to(next(iter(vectors.values())).dtype) @ torch.stack([*vectors.values()])
        return [(0.0, [*branches[0][1], mean])]
    draw = float(uniform(user_hash_1.numpy(), step)[0]) * sums[-1]
    return [next(pair for pair, running in zip(pairs, sums, strict=True) if running > draw)]
