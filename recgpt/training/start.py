"""Training on from an older model: whether it fits the dataset and the settings, and its weights.

The older model's items must be the first ones of the dataset's vocabulary, so that they keep their rows.
Shapes: N rows of a table on this rank, K of them that the older model has, D width.
"""

from typing import Any

import torch
from torch import Tensor

from recgpt.config import ModelSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.distributed.sharded_table import ShardedTable
from recgpt.errors import UserError
from recgpt.model.export import (
    ITEM_TABLE,
    USER_TABLE,
    ModelInfo,
    find_model,
    load_gpt,
    read_info,
    read_known_users,
    table_pieces,
)
from recgpt.model.item_table import ItemTable
from recgpt.model.users import KnownUsers
from recgpt.schema import UNKNOWN_USER
from recgpt.training.model import NextItemModel

_NOT_THERE = -1  # in place of a row that the older model does not have


def find_start(model: str, settings: ModelSettings, dataset: HistoryDataset) -> str:
    """The exported model's own folder, of a run or of a bare model; no weights are read.

    Raises ``UserError`` if there is none, if its items are not the first ones of the dataset's, or if
    its weights do not fit a model of these settings.
    """
    url = find_model(model)
    info = read_info(url)
    _check_items(url, info, dataset)
    theirs, ours = _shape(info.model), _shape(settings)
    differing = [key for key in theirs if theirs[key] != ours.get(key)]
    if differing:
        had, has = (
            " ".join(f"{key}={shape[key]}" for key in differing if key in shape) for shape in (theirs, ours)
        )
        raise UserError(f"{url}: was trained with {had}, this run has {has}; give --set {had}")
    return url


def load_start(url: str, model: NextItemModel) -> None:
    """Put an exported model's weights in the place of initial ones; rows that it lacks stay as they are.

    A rank reads the files that hold rows of its own shards, and no others.
    Raises ``UserError`` if a file is missing or damaged.
    """
    load_gpt(url, model.gpt)
    num_rows = read_info(url).num_items + 1
    first, rows_ND = _rows_here(model.item_table)
    row_N = torch.arange(first, first + len(rows_ND))
    _fill(url, ITEM_TABLE, num_rows, row_N.where(row_N < num_rows, _NOT_THERE), rows_ND)
    if model.gpt.known_users is not None:
        older = read_known_users(url)
        first, rows_ND = _rows_here(model.gpt.user)
        older_row_N = _older_user_rows(older, model.gpt.known_users)[first : first + len(rows_ND)]
        _fill(url, USER_TABLE, older.num_rows, older_row_N, rows_ND)


def _check_items(url: str, info: ModelInfo, dataset: HistoryDataset) -> None:
    known = {one.vocabulary_fingerprint: one.num_items for one in dataset.manifest.lineage}
    known[dataset.manifest.vocabulary_fingerprint] = dataset.num_items
    if known.get(info.vocabulary_fingerprint) != info.num_items:
        raise UserError(
            f"{url}: its {info.num_items} items are not the first ones of {dataset.url}; give a dataset "
            "that `recgpt prepare --append` made from the model's own, or train without --start-from"
        )


def _shape(model: ModelSettings) -> dict[str, Any]:
    """The settings that decide which weights there are, and what they are used for, by key."""
    keys = ["width", "layers", "heads", "members", "max_history", "similarity"]
    of_user = {"none": ["kind"], "hashed": ["kind", "buckets", "combine"], "table": ["kind", "combine"]}
    shape = {f"model.{key}": getattr(model, key) for key in keys}
    return shape | {f"model.user.{key}": getattr(model.user, key) for key in of_user[model.user.kind]}


def _rows_here(table: Any) -> tuple[int, Tensor]:
    """This rank's first row of a table, counted in the whole table, and its rows themselves, [N, D]."""
    if isinstance(table, ShardedTable):
        return table.first, table.rows
    assert isinstance(table, ItemTable)
    return 0, table.weight.detach()


def _older_user_rows(older: KnownUsers, users: KnownUsers) -> Tensor:
    """The older table's row of each row of the new one, int64 [users.num_rows]."""
    row_U = older.rows(users.hashes)
    unknown = torch.tensor([UNKNOWN_USER])  # has the same row in every table
    return torch.cat([unknown, row_U.where(row_U != UNKNOWN_USER, _NOT_THERE)])


def _fill(url: str, name: str, num_rows: int, older_row_N: Tensor, rows_ND: Tensor) -> None:
    """Copy rows of an exported table of ``num_rows`` into ``rows_ND``, in place.

    Args:
        older_row_N: which row goes where, int64, ascending apart from those that are not there.
    """
    place_K = (older_row_N != _NOT_THERE).nonzero().squeeze(1)
    older_row_K = older_row_N[place_K]
    if not len(older_row_K):
        return
    first, last = older_row_K[[0, -1]].tolist()
    for start, piece_ND in table_pieces(url, name, num_rows, first, last + 1):
        bounds = torch.tensor([start, start + len(piece_ND)])
        here = slice(*torch.searchsorted(older_row_K, bounds).tolist())
        rows_ND[place_K[here].to(rows_ND.device)] = piece_ND[older_row_K[here] - start].to(rows_ND)
