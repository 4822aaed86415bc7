"""Building an approximate index, and finding out how little effort finds enough.

The index is built from the item table block by block. Then the interest vectors of real users are searched,
with more and more effort, until a wanted share of the best items is found.

Shapes: U users, D width, K items asked for, N rows.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recgpt.config import RecallSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.data.sequences import history_lists
from recgpt.errors import UserError
from recgpt.model.attention import Layout
from recgpt.model.gpt import GPT
from recgpt.model.losses import blocks
from recgpt.model.row_ranges import Rows
from recgpt.retrieval.approximate_index import ApproximateIndex, Kind, new_index
from recgpt.retrieval.autoregressive import last_items, recall_window
from recgpt.retrieval.index import FIRST_ITEM, Index
from recgpt.schema import ITEM_INDICES, PADDING_INDEX, USER_HASH

SAMPLE_USERS = 1000  # whose interest vectors are searched
TRAINING_ROWS_PER_LIST = 64  # a sample of items from which the centres of lists are learnt
BUILD_BREADTH = 200
LARGE_CATALOGUE = 100_000  # from here on, a graph needs more neighbours to be searched well


def default_parameters(
    kind: Kind, num_items: int, lists: int | None, neighbors: int | None
) -> dict[str, int]:
    """Parameters of an index as in its manifest: those that are given, and what suits the catalogue's size.

    Raises ``UserError`` if one is given that the kind does not have, or that the catalogue is too small for.
    """
    if kind == "hnsw":
        if lists is not None:
            raise UserError(f"--lists {lists}: give it with --kind ivf")
        neighbors = neighbors or (16 if num_items < LARGE_CATALOGUE else 32)
        return {"neighbors": neighbors, "build_breadth": BUILD_BREADTH}
    if neighbors is not None:
        raise UserError(f"--neighbors {neighbors}: give it with --kind hnsw")
    if lists is not None and lists > num_items:
        raise UserError(f"--lists {lists}: the catalogue has {num_items} items; give fewer lists")
    return {"lists": lists or max(1, min(round(4 * num_items**0.5), num_items // 40))}


def build(kind: Kind, parameters: Mapping[str, int], row_RD: Rows, block_items: int) -> Any:
    """A faiss index of all items of a table.

    Beside the index itself memory holds a sample of items for training, and after that one block.
    """
    num_items = len(row_RD) - FIRST_ITEM
    index = new_index(kind, row_RD[:0].shape[1], parameters)
    if kind == "ivf":
        size = min(num_items, TRAINING_ROWS_PER_LIST * parameters["lists"])
        sample_N = np.random.default_rng(0).choice(num_items, size, replace=False)
        index.train(row_RD[torch.from_numpy(np.sort(sample_N)) + FIRST_ITEM].numpy())
    for start, end in blocks(FIRST_ITEM, len(row_RD), block_items):
        index.add(row_RD[start:end].numpy())
    return index


def interest_vectors(gpt: GPT, index: Index, dataset: HistoryDataset, settings: RecallSettings) -> Tensor:
    """Interest vectors [U, D] of ``SAMPLE_USERS`` users after their whole histories, or of all if fewer.

    Users stand in the order of a hash, so that the first ones are a fair sample.
    """
    found, missing = [], SAMPLE_USERS
    for row_group in dataset.row_groups:
        users = dataset.read_row_group(row_group, [USER_HASH, ITEM_INDICES]).slice(0, missing)
        for first in range(0, len(users), settings.batch_users):
            batch = users.slice(first, settings.batch_users)
            values, offsets = history_lists(batch)
            item_T, input_offsets = last_items(
                torch.from_numpy(values.astype(np.int64)),
                torch.from_numpy(offsets),
                recall_window(gpt.settings, settings),
            )
            user_rows = gpt.user_rows(torch.from_numpy(batch[USER_HASH].to_numpy().copy()))
            with torch.inference_mode():
                layout = Layout.from_offsets(input_offsets)
                found.append(gpt.prefill(index.vectors(item_T), layout, user_rows, 0)[0])
        missing -= len(users)
        if not missing:
            break
    return torch.cat(found)


@dataclass(frozen=True)
class Measured:
    """What an index finds with an effort; the names are those of the manifest."""

    effort: int
    recall: float
    speed_up: float


def choose_effort(
    found: Any,
    kind: Kind,
    parameters: Mapping[str, int],
    exact: Index,
    interest_UD: Tensor,
    k: int,
    min_recall: float,
    batch_users: int,
) -> Measured:
    """The least of some efforts, each twice the one before, with which enough of the ``k`` best are found.

    Raises ``UserError`` if none finds ``min_recall`` of them.
    """
    (_, exact_UK), exact_seconds = _timed(exact.search, interest_UD, k, batch_users)
    reached = 0.0
    for effort in _efforts(kind, parameters, found.ntotal, k):
        index = ApproximateIndex(found, kind, effort, exact)
        found_UK = torch.cat([index.fetch(batch_BD, k) for batch_BD in interest_UD.split(batch_users)])
        reached = recall_of(found_UK, exact_UK)
        if reached >= min_recall:
            _, seconds = _timed(index.search, interest_UD, k, batch_users)
            return Measured(effort, reached, exact_seconds / seconds)
    raise UserError(
        f"--min-index-recall {min_recall}: kind {kind} with {dict(parameters)} finds {reached:.3f} of the "
        f"{k} best items at most; give other parameters or the other kind, or use the exact index"
    )


def recall_of(found_UK: Tensor, exact_UK: Tensor) -> float:
    """The share of the exact lists' items that is found, over all rows (int64 [U, K] each)."""
    row_U1 = torch.arange(len(exact_UK))[:, None] * (1 + max(int(found_UK.max()), int(exact_UK.max())))
    wanted_UK = exact_UK != PADDING_INDEX
    hit_UK = torch.isin(row_U1 + exact_UK, row_U1 + found_UK) & wanted_UK
    return float(hit_UK.sum() / wanted_UK.sum())


def _efforts(kind: Kind, parameters: Mapping[str, int], num_items: int, k: int) -> Iterator[int]:
    """Up to half of the lists or a tenth of the catalogue: with more, the exact index is as fast."""
    effort, most = (1, parameters["lists"] // 2) if kind == "ivf" else (k, num_items // 10)
    yield effort
    while 2 * effort <= most:
        effort *= 2
        yield effort


def _timed(
    search: Callable[[Tensor, int], tuple[Tensor, Tensor]], interest_UD: Tensor, k: int, batch_users: int
) -> tuple[tuple[Tensor, Tensor], float]:
    started = time.perf_counter()
    scores, items = zip(*(search(batch_BD, k) for batch_BD in interest_UD.split(batch_users)), strict=True)
    return (torch.cat(scores), torch.cat(items)), time.perf_counter() - started
