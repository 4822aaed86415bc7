"""What a training step computes: item table, GPT and loss together, the table replicated or sharded.

Shapes: T tokens of B histories laid end to end, D width.
"""

import copy
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from recgpt.config import ItemTableSettings, TrainSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.distributed import collectives
from recgpt.distributed.sharded_item_table import ShardedItemTable
from recgpt.distributed.sharded_table import ShardedTable, is_sharded
from recgpt.errors import UserError
from recgpt.model.attention import Layout
from recgpt.model.gpt import GPT
from recgpt.model.item_table import ItemTable
from recgpt.model.scoring import ExcludedPairs
from recgpt.model.users import KnownUsers
from recgpt.schema import PADDING_INDEX, USER_HASH

_USER_TABLE_SEED = 1 << 32  # other initial rows than the item table's


class Table(Protocol):
    """What both placements of the item table can do; see ``ItemTable`` for the meaning."""

    def __call__(self, item_index_T: Tensor, /) -> Tensor: ...

    def loss_sum(self, interest_TD: Tensor, target_T: Tensor) -> Tensor: ...

    def best_item(
        self,
        interest_TD: Tensor,
        excluded: ExcludedPairs,
        pool_items: int | None = None,
        temperature: float = 0.0,
    ) -> Tensor: ...

    def rank_of(self, interest_TD: Tensor, target_T: Tensor, excluded: ExcludedPairs) -> Tensor: ...


@dataclass
class TrainingBatch:
    """One rank's part of a step."""

    item_index_T: Tensor  # int64
    target_T: Tensor  # int64; 0: no target at this position
    segment_T: Tensor  # int64, 0 real or 1 generated
    position_T: Tensor  # int64; place in the real history, which a generated item shares
    offsets: Tensor  # int64 [B + 1]
    user_row_B: Tensor  # int64


class NextItemModel(nn.Module):
    """Next-item prediction. A replicated table is a submodule, trained by the engine with the GPT;
    a sharded one has no parameters that the engine could see.
    """

    def __init__(self, gpt: GPT, item_table: Table):
        super().__init__()
        self.gpt = gpt
        self.item_table = item_table

    def forward(self, batch: TrainingBatch) -> Tensor:
        """Sum of the loss over the batch's targets; collective if the table is sharded."""
        layout = Layout.from_offsets(batch.offsets)
        interest_TD = self.interest(batch, layout)
        has_target = batch.target_T != PADDING_INDEX
        return self.item_table.loss_sum(interest_TD[has_target], batch.target_T[has_target])

    def sharded_tables(self) -> dict[str, ShardedTable]:
        """The tables outside the engine, by name."""
        tables = {"item_table": self.item_table, "user_table": self.gpt.user}
        return {name: table for name, table in tables.items() if isinstance(table, ShardedTable)}

    def twin(self) -> "NextItemModel":
        """A copy in evaluation mode with weights of its own; sharded tables are shared."""
        return copy.deepcopy(self).requires_grad_(False).eval()

    def interest(self, batch: TrainingBatch, layout: Layout) -> Tensor:
        """Interest vectors, float32 [T, D]; the GPT computes in bfloat16 on CUDA."""
        item_TD = self.item_table(batch.item_index_T)
        with torch.autocast("cuda", torch.bfloat16, enabled=item_TD.is_cuda):
            return self.gpt(item_TD, layout, batch.user_row_B, batch.segment_T, batch.position_T).to(
                item_TD.dtype
            )


def build_model(settings: TrainSettings, dataset: HistoryDataset, device: torch.device) -> NextItemModel:
    """A model with initial weights, which depend on the seed and not on the number of workers.

    Raises ``UserError`` for settings that do not go with the size of the dataset.
    """
    torch.manual_seed(settings.seed)
    gpt = GPT(settings.model).to(device)
    if settings.model.user.kind == "table":
        gpt.known_users = known_users(dataset)
        gpt.user = user_table(settings, gpt.known_users.num_rows, device)
    width, num_items, table = settings.model.vector_width, dataset.num_items, settings.item_table
    count_R = torch.from_numpy(np.concatenate([[0], dataset.item_counts()]))
    unit_rows, members = settings.model.similarity == "cosine", settings.model.members
    check_item_table(table, num_items, collectives.world_size())
    if not is_sharded(table, num_items):
        replicated = ItemTable(num_items, width, settings.seed, settings.loss, count_R, unit_rows, members)
        return NextItemModel(gpt, replicated.to(device))
    dtype = getattr(torch, table.row_dtype)
    sharded = ShardedItemTable(
        num_items, width, settings.seed, settings.loss, count_R, device, dtype, unit_rows, members
    )
    return NextItemModel(gpt, sharded)


def check_item_table(table: ItemTableSettings, num_items: int, workers: int) -> None:
    """Raises ``UserError`` if a table of that many items cannot be trained so by that many workers."""
    if is_sharded(table, num_items):
        if num_items < 2 * workers:
            raise UserError(
                f"{num_items} items are too few to shard over {workers} workers; "
                "set item_table.placement=replicated"
            )
    elif table.optimizer != "adam" or table.row_dtype != "float32":
        raise UserError(
            f"item_table.optimizer={table.optimizer}, item_table.row_dtype={table.row_dtype}: a "
            "replicated table is trained by AdamW in float32; set item_table.placement=sharded"
        )


def user_table(settings: TrainSettings, num_rows: int, device: torch.device) -> ShardedTable:
    """A row for each user and, first, one for unknown users; sharded however many there are."""
    if num_rows < collectives.world_size():
        raise UserError(
            f"model.user.kind=table: {num_rows - 1} users are too few to shard over "
            f"{collectives.world_size()} workers; set model.user.kind=hashed"
        )
    dtype = getattr(torch, settings.item_table.row_dtype)
    seed = settings.seed + _USER_TABLE_SEED
    return ShardedTable(num_rows, settings.model.vector_width, seed, device, dtype)


def known_users(dataset: HistoryDataset) -> KnownUsers:
    """All users of a dataset."""
    columns = [dataset.read_row_group(group, [USER_HASH])[USER_HASH] for group in dataset.row_groups]
    hashes = np.unique(np.concatenate([column.to_numpy() for column in columns]))
    return KnownUsers(torch.from_numpy(hashes))
