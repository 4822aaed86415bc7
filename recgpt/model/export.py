"""The exported model: loads with torch and safetensors alone, and nothing in it can run code.

A folder with ``model.json`` (written last), ``gpt.safetensors`` and the item table in consecutive row
ranges, ``item_table-00000.safetensors`` ..., each holding one tensor ``rows`` [rows, D]. A model with a row
for each user has ``user_table-00000.safetensors`` ... besides, and ``users.safetensors`` with the hashes of
the users that it knows.
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
from recgpt.model.users import KnownUsers, UserVectors
from recgpt.schema import MODEL_SCHEMA_VERSION

EXPORT_FOLDER = "model"  # inside a run
INFO_FILE = "model.json"
GPT_FILE = "gpt.safetensors"
USERS_FILE = "users.safetensors"
ITEM_TABLE = "item_table"
USER_TABLE = "user_table"


@dataclass
class ModelInfo:
    """What a model knows of itself."""

    num_items: int
    vocabulary_fingerprint: str
    model: ModelSettings
    split: SplitSettings  # how its training split was made: evaluation uses the same
    recall: RecallSettings  # how it serves unless told otherwise
    dataset_fingerprint: str = ""  # the dataset it was trained on; empty if not known


def save_model(
    url: str,
    info: ModelInfo,
    gpt: dict[str, Tensor],
    item_table: Iterable[Tensor],
    known_users: KnownUsers | None = None,
    user_table: Iterable[Tensor] = (),
) -> None:
    """Write a model into the folder ``url``. Of a table no more than one piece is asked for at a time.

    Args:
        gpt: state dict of the GPT.
        item_table: consecutive float32 pieces [rows, D], row 0 (padding) first.
        known_users: for user kind `table`, and only then.
        user_table: their vectors, in pieces like the item table; row 0 is that of unknown users.
    """
    assert (known_users is not None) == (info.model.user.kind == "table")
    storage.write_bytes(storage.join(url, GPT_FILE), safetensors.torch.save(gpt))
    description = {
        "schema_version": MODEL_SCHEMA_VERSION,
        "num_items": info.num_items,
        "vocabulary_fingerprint": info.vocabulary_fingerprint,
        "dataset_fingerprint": info.dataset_fingerprint,
        "model": to_dict(info.model),
        "split": to_dict(info.split),
        "recall": to_dict(info.recall),
        ITEM_TABLE: _save_table(url, ITEM_TABLE, item_table, info.num_items + 1),
    }
    if known_users is not None:
        data = safetensors.torch.save({"hashes": known_users.hashes})
        storage.write_bytes(storage.join(url, USERS_FILE), data)
        description[USER_TABLE] = _save_table(url, USER_TABLE, user_table, known_users.num_rows)
    storage.write_json(storage.join(url, INFO_FILE), description)


def _save_table(url: str, name: str, pieces: Iterable[Tensor], num_rows: int) -> list[dict[str, Any]]:
    """Write each piece as a file; returns their entries in ``model.json``."""
    entries = []
    first = 0
    for index, rows_ND in enumerate(pieces):
        file = f"{name}-{index:05d}.safetensors"
        data = safetensors.torch.save({"rows": rows_ND.contiguous()})
        storage.write_bytes(storage.join(url, file), data)
        entries.append({"file": file, "first_row": first, "rows": len(rows_ND)})
        first += len(rows_ND)
    assert first == num_rows, f"{name} has {first} rows, expected {num_rows}"
    return entries


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
    files = [INFO_FILE, GPT_FILE, *(entry["file"] for entry in description[ITEM_TABLE])]
    if USER_TABLE in description:
        files += [USERS_FILE, *(entry["file"] for entry in description[USER_TABLE])]
    lines = [f"{storage.checksum(storage.join(url, file))}  {file}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_model(url: str) -> tuple[ModelInfo, GPT, Tensor]:
    """The model's description, its GPT in eval mode, and the item table, float32 [num_items + 1, D].

    A table of users, and whom it knows, come with the GPT.
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
    width = info.model.width
    if info.model.user.kind == "table":
        gpt.known_users = KnownUsers(_read_tensors(storage.join(url, USERS_FILE))["hashes"])
        gpt.user = UserVectors(
            _load_table(url, USER_TABLE, description[USER_TABLE], gpt.known_users.num_rows, width)
        )
    item_table_RD = _load_table(url, ITEM_TABLE, description[ITEM_TABLE], info.num_items + 1, width)
    return info, gpt.eval(), item_table_RD


def _load_table(url: str, name: str, entries: list[dict[str, Any]], num_rows: int, width: int) -> Tensor:
    """A table, float32 [num_rows, D], allocated once and filled file by file."""
    table_RD = torch.empty(num_rows, width)
    first = 0
    for entry in entries:
        rows_ND = _read_tensors(storage.join(url, entry["file"]))["rows"]
        place_ND = table_RD[first : first + len(rows_ND)]
        if rows_ND.shape != place_ND.shape:
            raise UserError(
                f"{url}/{entry['file']}: its rows {list(rows_ND.shape)} do not fit the table of "
                f"{num_rows} x {width} that model.json describes, from row {first} on; export again"
            )
        place_ND.copy_(rows_ND)
        first += len(rows_ND)
    if first < num_rows:
        raise UserError(f"{url}: {name} has {first} rows, model.json says {num_rows}; export again")
    return table_RD


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
