"""What a training step computes: item table, GPT and loss together, the table replicated or sharded.

Shapes: T tokens of B histories laid end to end, D width.
"""

import copy
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from recgpt.config import TrainSettings
from recgpt.distributed.sharded_item_table import ShardedItemTable
from recgpt.model.attention import Layout
from recgpt.model.gpt import GPT
from recgpt.model.item_table import ItemTable
from recgpt.model.scoring import ExcludedPairs
from recgpt.schema import PADDING_INDEX


class Table(Protocol):
    """What both placements of the item table can do; see ``ItemTable`` for the meaning."""

    def __call__(self, item_index_T: Tensor) -> Tensor: ...

    def loss_sum(self, interest_TD: Tensor, target_T: Tensor) -> Tensor: ...

    def best_item(self, interest_TD: Tensor, excluded: ExcludedPairs) -> Tensor: ...

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

    def twin(self) -> "NextItemModel":
        """A copy in evaluation mode with weights of its own; a sharded table is shared."""
        table = copy.deepcopy(self.item_table) if isinstance(self.item_table, nn.Module) else self.item_table
        return NextItemModel(copy.deepcopy(self.gpt), table).requires_grad_(False).eval()

    def interest(self, batch: TrainingBatch, layout: Layout) -> Tensor:
        """Interest vectors, float32 [T, D]; the GPT computes in bfloat16 on CUDA."""
        item_TD = self.item_table(batch.item_index_T)
        with torch.autocast("cuda", torch.bfloat16, enabled=item_TD.is_cuda):
            return self.gpt(item_TD, layout, batch.user_row_B, batch.segment_T, batch.position_T).to(
                item_TD.dtype
            )


def build_model(settings: TrainSettings, num_items: int, device: torch.device) -> NextItemModel:
    """A model with initial weights, which depend on the seed and not on the number of workers."""
    torch.manual_seed(settings.seed)
    gpt = GPT(settings.model).to(device)
    width, block = settings.model.width, settings.item_table.loss_block_items
    if is_sharded(settings, num_items):
        return NextItemModel(gpt, ShardedItemTable(num_items, width, settings.seed, block, device))
    return NextItemModel(gpt, ItemTable(num_items, width, settings.seed, block).to(device))


def is_sharded(settings: TrainSettings, num_items: int) -> bool:
    """Whether the item table is split over the workers."""
    placement = settings.item_table.placement
    return placement == "sharded" or (
        placement == "auto" and num_items >= settings.item_table.sharded_from_items
    )
