"""Checkpoints that do not depend on the number of workers and that cannot run code.

RUN/checkpoints/step-0000001234-epoch-00002/ holds whole dense tensors, the rows of sharded tables with
their optimizer state in files of consecutive global rows, and the state of training as JSON;
``manifest.json`` with the size and checksum of every file is written last. A folder without a valid
manifest is never loaded. A shard is written and read file by file: besides the shard itself there are at
most two copies of one file in memory.

Everything is safetensors or JSON. torch.distributed.checkpoint, which could store the rows too, keeps
its metadata in a pickle, and a pickle from a stranger can run code.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

from recgpt import storage
from recgpt.distributed import collectives
from recgpt.errors import UserError
from recgpt.model.export import files_with_rows
from recgpt.schema import MANIFEST_FILE

FOLDER = "checkpoints"
STATE_FILE = "state.json"
DENSE_FILE = "dense.safetensors"
DENSE_OPTIMIZER_FILE = "dense_optimizer.safetensors"
ROWS_PER_FILE = 250_000  # of a sharded table; with Adam's state at width 64, some 200 MB
_PREFIX = "step-"
_ADVICE = "remove the checkpoint folder to use an older one"


@dataclass
class TableRows:
    """This rank's part of a sharded table: ``rows`` and any further tensors with one row per table row."""

    num_rows: int  # of the whole table
    first: int  # this rank's first row, counted in the whole table
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
    tables: dict[str, TableRows],
) -> None:
    """Write checkpoint ``name``. Collective: every rank writes its rows of each table, rank 0 the rest."""
    folder = storage.join(run, FOLDER, name)
    if collectives.rank() == 0:
        _remove(folder)
    collectives.barrier()  # nobody writes into a folder that rank 0 is still clearing
    written = []
    if collectives.rank() == 0:
        written.append(_write(folder, STATE_FILE, json.dumps(state, indent=2).encode()))
        written.append(_write(folder, DENSE_FILE, safetensors.torch.save(dense)))
        written.append(_write(folder, DENSE_OPTIMIZER_FILE, safetensors.torch.save(dense_optimizer)))
    for table, part in tables.items():
        for first_row, piece in _pieces(part):
            file = f"{table}-rows-{first_row:012d}.safetensors"
            entry = _write(folder, file, safetensors.torch.save(piece))
            written.append(entry | {"table": table, "first_row": first_row, "rows": len(piece["rows"])})
    entries = [entry for part in collectives.gather_objects(written) for entry in part]
    if collectives.rank() == 0:
        num_rows = {table: part.num_rows for table, part in tables.items()}
        for table in tables:
            saved = sum(entry["rows"] for entry in entries if entry.get("table") == table)
            assert saved == num_rows[table], f"the ranks hold {saved} rows of {table}"
        manifest = {"name": name, "files": entries, "tables": num_rows}
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
    return json.loads(_Finished(run, name).read(STATE_FILE))


def load_dense(run: str, name: str) -> dict[str, Tensor]:
    return _Finished(run, name).tensors(DENSE_FILE)


def load_dense_optimizer(run: str, name: str) -> dict[str, Tensor]:
    return _Finished(run, name).tensors(DENSE_OPTIMIZER_FILE)


def load_table_into(run: str, name: str, table: str, first: int, tensors: dict[str, Tensor]) -> None:
    """Fill tensors in place with a sharded table's rows ``first`` onwards, whichever ranks wrote them.

    Only the files that hold such rows are read.

    Args:
        tensors: those wanted, by the names they were saved under, all with one row per table row.

    Raises ``UserError`` if the checkpoint has no such table, or if a tensor was not saved with it.
    """
    (count,) = {len(tensor) for tensor in tensors.values()}
    checkpoint = _Finished(run, name)
    files = checkpoint.table_files(table)
    assert first + count <= checkpoint.manifest["tables"][table]
    for entry, start, end in files_with_rows(files, first, first + count):
        saved = checkpoint.tensors(entry["file"])
        for key, tensor in tensors.items():
            if key not in saved:
                raise UserError(
                    f"{checkpoint.folder}: {table} was saved without {key}, by another table optimizer; "
                    "go on with the optimizer of that run, or train again with --overwrite"
                )
            piece = saved[key][start - entry["first_row"] : end - entry["first_row"]]
            assert tensor.shape[1:] == piece.shape[1:]
            tensor[start - first : end - first] = piece
        del saved, piece  # before the next file is read


def table_row_ranges(run: str, name: str, table: str) -> Iterator[Tensor]:
    """The rows of a sharded table in order, float32, file by file. Raises ``UserError`` if it has none."""
    checkpoint = _Finished(run, name)
    for entry in checkpoint.table_files(table):
        yield checkpoint.tensors(entry["file"])["rows"].float()


def _pieces(part: TableRows) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """What goes into each file: its first row, counted in the whole table, and its tensors."""
    for start in range(0, len(part.tensors["rows"]), ROWS_PER_FILE):
        end = start + ROWS_PER_FILE
        yield (
            part.first + start,
            {key: tensor[start:end].contiguous() for key, tensor in part.tensors.items()},
        )


def _remove(folder: str) -> None:
    storage.remove(storage.join(folder, MANIFEST_FILE))  # first: half removed is not finished
    storage.remove(folder)


def _write(folder: str, file: str, data: bytes) -> dict[str, Any]:
    storage.write_bytes(storage.join(folder, file), data)
    return {"file": file, "bytes": len(data), "sha256": storage.checksum_of(data)}


class _Finished:
    """A finished checkpoint: its files are as the manifest says, or ``UserError`` is raised."""

    def __init__(self, run: str, name: str):
        self.folder = storage.join(run, FOLDER, name)
        self.manifest = storage.read_json(storage.join(self.folder, MANIFEST_FILE))

    def table_files(self, table: str) -> list[dict[str, Any]]:
        """The entries of a sharded table's files, by ascending rows."""
        if table not in self.manifest["tables"]:
            raise UserError(f"{self.folder}: holds no sharded {table}; train again with --overwrite")
        return [entry for entry in self.manifest["files"] if entry.get("table") == table]

    def read(self, file: str) -> bytes:
        expected = {entry["file"]: entry["sha256"] for entry in self.manifest["files"]}
        try:
            data = storage.read_bytes(storage.join(self.folder, file))
        except FileNotFoundError:
            raise UserError(f"{self.folder}/{file}: missing; {_ADVICE}") from None
        if storage.checksum_of(data) != expected.get(file):
            raise UserError(f"{self.folder}/{file}: damaged (wrong checksum); {_ADVICE}")
        return data

    def tensors(self, file: str) -> dict[str, Tensor]:
        try:
            return safetensors.torch.load(self.read(file))
        except safetensors.SafetensorError as error:
            raise UserError(f"{self.folder}/{file}: not safetensors ({error}); {_ADVICE}") from None
