"""One-step metrics on the validation split during training, with the table where it is.

Ranks are counted over all items without a list of candidates, so that a sharded table need not be
gathered. The served lists are measured by ``recgpt evaluate``, through the recall that serves.

Shapes: B users of a batch, T tokens of their histories.
"""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from recgpt.config import TrainSettings
from recgpt.data.dataset import HistoryDataset, RowGroup
from recgpt.data.hashing import uniform
from recgpt.data.packing import Histories
from recgpt.data.sequences import split_histories
from recgpt.distributed import collectives
from recgpt.evaluation.metrics import rank_metrics
from recgpt.model.attention import Layout
from recgpt.model.scoring import ExcludedPairs
from recgpt.retrieval.autoregressive import last_items
from recgpt.schema import PADDING_INDEX, TARGET, USER_HASH
from recgpt.training.model import NextItemModel, TrainingBatch

_BATCH_USERS = 512
_DRAW_VALIDATED = 3


class Validator:
    """Holds this rank's share of the validation users, and measures the model on them.

    Where the dataset has more than ``max_users`` users, a random sample of about that many is held,
    the same at every validation.
    """

    def __init__(
        self,
        dataset: HistoryDataset,
        settings: TrainSettings,
        time_bounds: tuple[int, int] | None,
        device: torch.device,
    ):
        self._settings = settings
        self._device = device
        mine = dataset.row_groups[collectives.rank() :: collectives.world_size()]
        tables = [
            split_histories(_sample(dataset, group, settings), settings.data.split, "valid", time_bounds)
            for group in mine
        ]
        histories = Histories.concatenate([Histories.from_table(table) for table in tables])
        targets = np.concatenate([np.empty(0, np.int64), *(table[TARGET].to_numpy() for table in tables)])
        # Similar lengths side by side: attention takes the histories of each length together.
        order = np.argsort(np.diff(histories.offsets), kind="stable")
        self._batches = [
            (histories.select(part), torch.from_numpy(targets[part].astype(np.int64)))
            for part in np.array_split(order, -(-len(order) // _BATCH_USERS) or 1)
        ]

    def num_users(self) -> int:
        """Users validated, over all ranks. Collective."""
        mine = sum(len(histories) for histories, _ in self._batches)
        return int(collectives.sum_over_ranks(torch.tensor(mine, device=self._device)))

    @torch.no_grad()
    def measure(self, model: NextItemModel) -> dict[str, float]:
        """hit_rate@k and ndcg@k for k = 5, 10, 20, and num_users, over all ranks. Collective."""
        mine = torch.cat([self._ranks(model, *batch) for batch in self._same_number_everywhere()])
        sizes = collectives.gather_sizes(len(mine), self._device)
        ranks = collectives.gather_rows(mine, sizes).cpu().double().numpy()
        metrics = rank_metrics(ranks)
        del metrics["mrr"]  # of the whole catalogue, not of a served list: another figure than evaluation's
        return {"num_users": float(len(ranks)), **metrics}

    def _same_number_everywhere(self) -> Iterator[tuple[Histories, Tensor]]:
        """This rank's batches, filled up with empty ones: scoring a sharded table is collective."""
        most = torch.tensor(len(self._batches), device=self._device)
        for number in range(int(collectives.max_over_ranks(most))):
            if number < len(self._batches):
                yield self._batches[number]
            else:
                yield Histories.empty(), torch.empty(0, dtype=torch.int64)

    def _ranks(self, model: NextItemModel, histories: Histories, target_B: Tensor) -> Tensor:
        offsets = torch.from_numpy(histories.offsets).to(self._device)
        items_T = torch.from_numpy(histories.values.astype(np.int64)).to(self._device)
        whole = Layout.from_offsets(offsets)
        seen_T = torch.full_like(items_T, not self._settings.recall.keep_seen, dtype=torch.bool)
        excluded = ExcludedPairs(whole.row[seen_T], items_T[seen_T])
        input_T, input_offsets = last_items(items_T, offsets, self._settings.model.max_history)
        layout = Layout.from_offsets(input_offsets)
        batch = TrainingBatch(
            item_index_T=input_T,
            target_T=torch.full_like(input_T, PADDING_INDEX),
            segment_T=torch.zeros_like(layout.position),
            position_T=layout.position,
            offsets=input_offsets,
            user_row_B=model.gpt.user_rows(torch.from_numpy(histories.user_hash).to(self._device)),
        )
        interest_BD = model.interest(batch, layout)[input_offsets[1:] - 1]
        return model.item_table.rank_of(interest_BD, target_B.to(self._device), excluded)


def _sample(dataset: HistoryDataset, group: RowGroup, settings: TrainSettings) -> pa.Table:
    """The users of a row group who are validated: a share that does not depend on the number of ranks."""
    share = settings.validation.max_users / dataset.num_users
    table = dataset.read_row_group(group)
    draws = uniform(table[USER_HASH].to_numpy(), settings.seed, _DRAW_VALIDATED)
    return table.filter(pa.array(draws < share))
