"""The protocol: which users are tested on which item, and what is served to them.

A user's held-out item of a split (``recgpt.data.sequences`` says which) is looked for in the list
of k candidates that autoregressive recall, exactly as in production, makes of the items before it.
All items of the catalogue compete, except those of the user's whole input history (seen items),
unless the model serves these too (``keep_seen``). Items that recur are then out of reach, for the
model and for the baselines alike. A held-out item outside the list has an infinite rank.
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
from recgpt.evaluation.metrics import Ranks, served_ranks
from recgpt.retrieval.autoregressive import AutoregressiveRecall
from recgpt.retrieval.recall_model import scale_quotas
from recgpt.schema import TARGET, USER_HASH

SERVED = "served"  # the variant with the model's own recall settings

HeldOutPart = Literal["valid", "test"]


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


def ranks_of_recall(recall: AutoregressiveRecall, users: HeldOutUsers) -> Ranks:
    """The rank of each user's held-out item in the list that ``recall`` serves, float64 [B]."""
    served = recall.recommend(
        torch.from_numpy(users.item_T.astype(np.int64)),
        torch.from_numpy(users.offsets.astype(np.int64)),
        torch.from_numpy(users.user_hash_B.copy()),  # Arrow's memory is read-only
    )
    return served_ranks(
        served.item_index_BK.numpy(), served.score_BK.numpy(), served.step_BK.numpy(), users.target_B
    )


def recall_variants(settings: RecallSettings) -> dict[str, RecallSettings]:
    """The recall settings to measure: the model's own (``served``), ``one_step`` and ``two_step``.

    All have the same k. Two steps take the model's own quotas if it has two, else 9 to 1, which is
    (18, 2) for k = 20.
    """
    two_step = settings.quotas if len(settings.quotas) == 2 else scale_quotas((9, 1), settings.k)
    return {
        SERVED: settings,
        "one_step": replace(settings, quotas=(settings.k,)),
        "two_step": replace(settings, quotas=two_step),
    }
