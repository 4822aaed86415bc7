"""Checkpoints that do not depend on the number of workers and that cannot run code.

RUN/checkpoints/step-0000001234-epoch-00002/ holds whole dense tensors, the rows of a sharded table with their
optimizer state by global row, and the state of training as JSON; ``manifest.json`` with the size and
checksum of every file is written last. A folder without a valid manifest is never loaded.

Everything is safetensors or JSON. torch.distributed.checkpoint, which could store the rows too, keeps
its metadata in a pickle, and a pickle from a stranger can run code.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from recgpt import storage
from recgpt.distributed import collectives
from recgpt.distributed.sharded_item_table import row_range
from recgpt.errors import UserError
from recgpt.schema import MANIFEST_FILE

FOLDER = "checkpoints"
STATE_FILE = "state.json"
DENSE_FILE = "dense.safetensors"
DENSE_OPTIMIZER_FILE = "dense_optimizer.safetensors"
_PREFIX = "step-"
_ADVICE = "remove the checkpoint folder to use an older one"


@dataclass
class TableRows:
    """This rank's part of a sharded table: ``rows`` and any further tensors with one row per table row."""

    num_rows: int  # of the whole table
    tensors: dict[str, Tensor]


def checkpoint_name(step: int, epoch: int) -> str:
    """Sorts by step; the epoch tells a checkpoint inside an epoch from the one after its last step."""
    return f"{_PREFIX}{step:010d}-epoch-{epoch:05d}"


def save(
    run: str,
    name: str,
    state: dict[str, Any],
    dense: dict[str, Tensor],
    dense_optimizer: dict[str, Tensor],
    table: TableRows | None,
) -> None:
    """Write checkpoint ``name``. Collective: every rank writes its table rows, rank 0 the rest."""
    folder = storage.join(run, FOLDER, name)
    files: dict[str, bytes] = {}
    if collectives.rank() == 0:
        _remove(folder)
        files[DENSE_FILE] = safetensors.torch.save(dense)
        files[DENSE_OPTIMIZER_FILE] = safetensors.torch.save(dense_optimizer)
    if table is not None:
        tensors = {key: tensor.contiguous() for key, tensor in table.tensors.items()}
        files[_table_file(collectives.rank())] = safetensors.torch.save(tensors)
    collectives.barrier()  # nobody writes into a folder that rank 0 is still clearing
    written = [_write(folder, file, data) for file, data in files.items()]
    entries = [entry for part in collectives.gather_objects(written) for entry in part]
    if collectives.rank() == 0:
        entries.append(_write(folder, STATE_FILE, json.dumps(state, indent=2).encode()))
        layout = {"num_rows": table.num_rows, "shards": collectives.world_size()} if table else None
        manifest = {"name": name, "files": entries, "item_table": layout}
        storage.write_json(storage.join(folder, MANIFEST_FILE), manifest)
    collectives.barrier()


def newest(run: str) -> str | None:
    """The name of the newest finished checkpoint, or None."""
    return next(iter(reversed(finished(run))), None)


def finished(run: str) -> list[str]:
    """Names of the finished checkpoints, oldest first."""
    folder = storage.join(run, FOLDER)
    names = [name for name in storage.list_names(folder) if name.startswith(_PREFIX)]
    return [name for name in names if storage.exists(storage.join(folder, name, MANIFEST_FILE))]


def keep_only(run: str, names: Iterable[str]) -> None:
    """Remove all other checkpoints, finished or not."""
    kept = set(names)
    folder = storage.join(run, FOLDER)
    for name in storage.list_names(folder):
        if name.startswith(_PREFIX) and name not in kept:
            _remove(storage.join(folder, name))


def load_state(run: str, name: str) -> dict[str, Any]:
    return json.loads(_read(run, name, STATE_FILE))


def load_dense(run: str, name: str) -> dict[str, Tensor]:
    return _load(run, name, DENSE_FILE)


def load_dense_optimizer(run: str, name: str) -> dict[str, Tensor]:
    return _load(run, name, DENSE_OPTIMIZER_FILE)


def load_table_rows(run: str, name: str, first: int, end: int) -> dict[str, Tensor]:
    """Rows ``first`` to ``end`` (exclusive) of every tensor of the sharded table, whoever wrote them."""
    layout = storage.read_json(storage.join(run, FOLDER, name, MANIFEST_FILE))["item_table"]
    pieces: dict[str, list[Tensor]] = {}
    for shard in range(layout["shards"]):
        shard_first, shard_end = row_range(layout["num_rows"], shard, layout["shards"])
        if shard_end <= first or shard_first >= end:
            continue
        for key, tensor in _load(run, name, _table_file(shard)).items():
            rows = tensor[max(first - shard_first, 0) : end - shard_first]
            pieces.setdefault(key, []).append(rows)
    return {key: torch.cat(parts) for key, parts in pieces.items()}


def _table_file(shard: int) -> str:
    return f"item_table-{shard:05d}.safetensors"


def _remove(folder: str) -> None:
    storage.remove(storage.join(folder, MANIFEST_FILE))  # first: half removed is not finished
    storage.remove(folder)


def _write(folder: str, file: str, data: bytes) -> dict[str, Any]:
    storage.write_bytes(storage.join(folder, file), data)
    return {"file": file, "bytes": len(data), "sha256": storage.checksum_of(data)}


def _read(run: str, name: str, file: str) -> bytes:
    """A file of a finished checkpoint. Raises ``UserError`` if it is not as the manifest says."""
    folder = storage.join(run, FOLDER, name)
    manifest = storage.read_json(storage.join(folder, MANIFEST_FILE))
    expected = {entry["file"]: entry["sha256"] for entry in manifest["files"]}
    try:
        data = storage.read_bytes(storage.join(folder, file))
    except FileNotFoundError:
        raise UserError(f"{folder}/{file}: missing; {_ADVICE}") from None
    if storage.checksum_of(data) != expected.get(file):
        raise UserError(f"{folder}/{file}: damaged (wrong checksum); {_ADVICE}")
    return data


def _load(run: str, name: str, file: str) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(_read(run, name, file))
    except safetensors.SafetensorError as error:
        url = storage.join(run, FOLDER, name, file)
        raise UserError(f"{url}: not safetensors ({error}); {_ADVICE}") from None
