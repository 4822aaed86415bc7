"""The exported model: loads with torch and safetensors alone, and nothing in it can run code.

A folder with ``model.json`` (written last), ``gpt.safetensors`` and the item table in row ranges,
``item_table-00000.safetensors`` ..., each holding one tensor ``rows`` [rows, D].
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from recgpt import storage
from recgpt.config import ModelSettings, RecallSettings, SplitSettings, from_dict, to_dict
from recgpt.errors import UserError
from recgpt.model.gpt import GPT
from recgpt.schema import MODEL_SCHEMA_VERSION

EXPORT_FOLDER = "model"  # inside a run
INFO_FILE = "model.json"
GPT_FILE = "gpt.safetensors"


@dataclass
class ModelInfo:
    """What a model knows of itself."""

    num_items: int
    vocabulary_fingerprint: str
    model: ModelSettings
    split: SplitSettings  # how its training split was made: evaluation uses the same
    recall: RecallSettings  # how it serves unless told otherwise
    dataset_fingerprint: str = ""  # the dataset it was trained on; empty if not known


def table_file(index: int) -> str:
    return f"item_table-{index:05d}.safetensors"


def save_model(url: str, info: ModelInfo, gpt: dict[str, Tensor], row_ranges: Iterable[Tensor]) -> None:
    """Write a model into the folder ``url``.

    Args:
        gpt: state dict of the GPT.
        row_ranges: the item table in consecutive float32 pieces [rows, D], row 0 (padding) first.
    """
    storage.write_bytes(storage.join(url, GPT_FILE), safetensors.torch.save(gpt))
    ranges = []
    first = 0
    for index, rows_ND in enumerate(row_ranges):
        data = safetensors.torch.save({"rows": rows_ND.contiguous()})
        storage.write_bytes(storage.join(url, table_file(index)), data)
        ranges.append({"file": table_file(index), "first_row": first, "rows": len(rows_ND)})
        first += len(rows_ND)
    assert first == info.num_items + 1, f"table has {first} rows for {info.num_items} items"
    description = {
        "schema_version": MODEL_SCHEMA_VERSION,
        "num_items": info.num_items,
        "vocabulary_fingerprint": info.vocabulary_fingerprint,
        "dataset_fingerprint": info.dataset_fingerprint,
        "model": to_dict(info.model),
        "split": to_dict(info.split),
        "recall": to_dict(info.recall),
        "item_table": ranges,
    }
    storage.write_json(storage.join(url, INFO_FILE), description)


def find_model(url: str) -> str:
    """The exported model of a run folder, or ``url`` itself if it is an exported model.

    Raises ``UserError`` if there is neither.
    """
    url = storage.absolute(url)
    for candidate in (storage.join(url, EXPORT_FOLDER), url):
        if storage.exists(storage.join(candidate, INFO_FILE)):
            return candidate
    raise UserError(f"{url}: no trained model here; give a folder that `recgpt train` has finished")


def read_info(url: str) -> ModelInfo:
    """The description of an exported model, without its weights. Raises ``UserError`` as ``load_model``."""
    where = storage.join(url, INFO_FILE)
    return _read_info(storage.read_json(where), where)


def model_fingerprint(url: str) -> str:
    """SHA-256, in hexadecimal, over the names and contents of an exported model's files."""
    description = storage.read_json(storage.join(url, INFO_FILE))
    files = [INFO_FILE, GPT_FILE, *(part["file"] for part in description["item_table"])]
    lines = [f"{storage.checksum(storage.join(url, file))}  {file}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_model(url: str) -> tuple[ModelInfo, GPT, Tensor]:
    """The model's description, its GPT in eval mode, and the item table, float32 [num_items + 1, D].

    Raises ``UserError`` if there is no finished model, or one that this version cannot read.
    """
    where = storage.join(url, INFO_FILE)
    description = storage.read_json(where)
    info = _read_info(description, where)
    gpt = GPT(info.model)
    try:
        gpt.load_state_dict(_read_tensors(storage.join(url, GPT_FILE)))
    except RuntimeError as error:
        raise UserError(f"{url}: the GPT weights do not fit model.json: {_one_line(error)}") from None
    pieces = [_read_tensors(storage.join(url, part["file"]))["rows"] for part in description["item_table"]]
    table_RD = torch.cat(pieces)
    if table_RD.shape != (info.num_items + 1, info.model.width):
        raise UserError(f"{url}: the item table has shape {list(table_RD.shape)}, which model.json denies")
    return info, gpt.eval(), table_RD


def _read_info(description: Any, where: str) -> ModelInfo:
    version = description.get("schema_version") if isinstance(description, dict) else None
    if version != MODEL_SCHEMA_VERSION:
        raise UserError(
            f"{where}: model schema version {version}, this RecGPT reads {MODEL_SCHEMA_VERSION}; export again"
        )
    try:
        return ModelInfo(
            num_items=int(description["num_items"]),
            vocabulary_fingerprint=str(description["vocabulary_fingerprint"]),
            dataset_fingerprint=str(description["dataset_fingerprint"]),
            model=from_dict(ModelSettings, description["model"], where),
            split=from_dict(SplitSettings, description["split"], where),
            recall=from_dict(RecallSettings, description["recall"], where),
        )
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{where}: damaged model description ({error!r})") from None


def _read_tensors(url: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(storage.read_bytes(url))
    except FileNotFoundError:
        raise UserError(f"{url}: no such file; the model is not complete") from None
    except SafetensorError as error:
        raise UserError(f"{url}: not a readable safetensors file ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
