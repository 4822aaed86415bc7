"""From an exported model to its index: the whole item table, or the shard that one holder has of it."""

import torch
from torch import Tensor

from recgpt.model.export import check_finite, open_item_table, read_info
from recgpt.retrieval.index import FIRST_ITEM, ExactIndex
from recgpt.retrieval.sharded_index import Bounds, IndexShard


def load_exact_index(
    url: str, block_items: int, allowed: Tensor | None = None, device: torch.device | str = "cpu"
) -> ExactIndex:
    """The exact index of all items, on a device of this process.

    On CPUs, processes on one machine share the memory of a local model. ``allowed``: as for ``ExactIndex``.
    Raises ``UserError`` if the table cannot be read, or holds values that are not finite numbers.
    """
    info = read_info(url)
    row_RD = open_item_table(url, info, 0, info.num_items + FIRST_ITEM)
    check_finite(url, row_RD.pieces)
    device = torch.device(device)
    if device.type == "cuda":
        return ExactIndex(row_RD[:].to(device), block_items, allowed, coarse=torch.bfloat16)
    return ExactIndex(row_RD, block_items, allowed)


def load_shard(url: str, bounds: Bounds, block_items: int, allowed: Tensor | None = None) -> IndexShard:
    """A shard of the item table; other rows are not read. Raises ``UserError`` as ``load_exact_index``."""
    info = read_info(url)
    first, end = bounds
    row_RD = open_item_table(url, info, first - 1, end)
    check_finite(url, row_RD.pieces)
    return IndexShard(row_RD, first, info.num_items, block_items, allowed)
