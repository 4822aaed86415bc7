"""The protocol: which users are tested on which item, and what is served to them.

A user's held-out item of a split (``recgpt.data.sequences`` says which) is looked for in the list
of k candidates that autoregressive recall, exactly as in production, makes of the items before it.
All items of the catalogue compete. What becomes of those of the user's whole input history (seen
items) is said by ``SeenItems``. A held-out item outside the list has an infinite rank.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from recgpt.config import RecallSettings, SplitSettings
from recgpt.data.dataset import HistoryDataset, RowGroup
from recgpt.data.sequences import history_lists, resolve_time_bounds, split_columns, split_histories
from recgpt.evaluation.metrics import Ranks, ranks_with_seen_at_zero, served_ranks
from recgpt.model.gpt import GPT
from recgpt.retrieval.autoregressive import AutoregressiveRecall
from recgpt.retrieval.recall_model import scale_quotas
from recgpt.schema import TARGET, UNKNOWN_USER, USER_HASH

# Variants of recall that are measured.
SERVED = "served"  # as the model serves
ONE_STEP = "one_step"
TWO_STEP = "two_step"
UNKNOWN_USERS = "unknown_users"  # as the model serves users whom it does not know

HeldOutPart = Literal["valid", "test"]

SeenItems = Literal["mask", "zero", "keep"]
"""`mask`: seen items are never served; one that recurs as held-out item is out of reach. `keep`: they compete
like all others. `zero`: they compete with score 0, as in the code of the RecGPT authors; see
``ranks_with_seen_at_zero``. The baselines have no such scores: for them `zero` is as `mask`."""


@dataclass(frozen=True)
class HeldOutUsers:
    """B users of a split with their input histories, laid end to end, and held-out items."""

    item_T: npt.NDArray[np.int32]
    """Input histories, whole; none is empty."""
    offsets: npt.NDArray[np.int64]
    """[B + 1], where each history begins in ``item_T``, and its length at the end."""
    user_hash_B: npt.NDArray[np.int64]
    target_B: npt.NDArray[np.int64]

    def batch(self, first: int, end: int) -> "HeldOutUsers":
        """Users ``first`` to ``end`` (exclusive; fewer if there are fewer)."""
        offsets = self.offsets[first : end + 1]
        item_T = self.item_T[offsets[0] : offsets[-1]]
        return HeldOutUsers(
            item_T, offsets - offsets[0], self.user_hash_B[first:end], self.target_B[first:end]
        )

    def seen(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """How many distinct items each user has seen, int64 [B], and whether the target is one, bool [B]."""
        users = len(self.target_B)
        row_T = np.repeat(np.arange(users), np.diff(self.offsets))
        row_P, item_P = np.unique(np.stack([row_T, self.item_T]), axis=1)
        num_seen_B = np.bincount(row_P, minlength=users)
        target_seen_B = np.bincount(row_P[item_P == self.target_B[row_P]], minlength=users) > 0
        return num_seen_B, target_seen_B


def read_held_out(
    dataset: HistoryDataset, row_group: RowGroup, split: SplitSettings, part: HeldOutPart, max_users: int
) -> Iterator[tuple[int, HeldOutUsers]]:
    """The users of a row group, read once, in ranges of at most ``max_users``.

    Yields for each range its number of users, and those of them who have an item held out in this part.
    """
    time_bounds = resolve_time_bounds(split, dataset.manifest)
    histories = dataset.read_row_group(row_group, split_columns(split))
    for first in range(0, row_group.rows, max_users):
        users = histories.slice(first, max_users)
        held_out = split_histories(users, split, part, time_bounds)
        item_T, offsets = history_lists(held_out)
        hashes, targets = held_out[USER_HASH].to_numpy(), held_out[TARGET].to_numpy().astype(np.int64)
        yield len(users), HeldOutUsers(item_T, offsets, hashes, targets)


def training_histories(
    dataset: HistoryDataset, split: SplitSettings
) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]]:
    """(item indices, offsets) of the training part, one row group after the other."""
    time_bounds = resolve_time_bounds(split, dataset.manifest)
    for row_group in dataset.row_groups:
        table = dataset.read_row_group(row_group, split_columns(split))
        yield history_lists(split_histories(table, split, "train", time_bounds))


def ranks_of_recall(recall: AutoregressiveRecall, users: HeldOutUsers, seen_at_zero: bool = False) -> Ranks:
    """The rank of each user's held-out item in the list that ``recall`` serves, float64 [B].

    ``recall`` masks or keeps seen items. ``seen_at_zero``: it masks them, but ranks are those of seen items
    with score 0.
    """
    served = recall.recommend(
        torch.from_numpy(users.item_T.astype(np.int64)),
        torch.from_numpy(users.offsets.astype(np.int64)),
        torch.from_numpy(users.user_hash_B.copy()),  # Arrow's memory is read-only
    )
    lists = served.item_index_BK.numpy(), served.score_BK.numpy(), served.step_BK.numpy(), users.target_B
    if not seen_at_zero:
        return served_ranks(*lists)
    assert not recall.settings.keep_seen, "seen items are put at zero in lists without them"
    return ranks_with_seen_at_zero(*lists, *users.seen())


def recall_variants(settings: RecallSettings, personal: bool = False) -> dict[str, RecallSettings]:
    """The recall settings to measure: those given (``served``), ``one_step`` and ``two_step``.

    All have the same k. Two steps take the given quotas if there are two, else 9 to 1, which is
    (18, 2) for k = 20. A ``personal`` model, one with a vector per user, is also measured with the given
    settings on ``unknown_users``: what new users get.
    """
    two_step = settings.quotas if len(settings.quotas) == 2 else scale_quotas((9, 1), settings.k)
    variants = {
        SERVED: settings,
        ONE_STEP: replace(settings, quotas=(settings.k,)),
        TWO_STEP: replace(settings, quotas=two_step),
    }
    return {**variants, UNKNOWN_USERS: settings} if personal else variants


class _GPTWithoutUsers(GPT):
    def user_rows(self, user_hash_B: torch.Tensor) -> torch.Tensor:
        return torch.full_like(user_hash_B, UNKNOWN_USER)


def without_users(gpt: GPT) -> GPT:
    """The same model, with the same memory for its weights, to which every user is an unknown one."""
    impersonal = _GPTWithoutUsers(gpt.settings)
    impersonal.load_state_dict(gpt.state_dict(), assign=True)
    impersonal.user = gpt.user  # a table of users is no part of the state dict
    return impersonal.eval()
