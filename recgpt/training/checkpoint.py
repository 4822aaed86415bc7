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
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from recgpt import storage
from recgpt.distributed import collectives
from recgpt.errors import UserError
from recgpt.manifests import validated
from recgpt.model.export import files_with_rows
from recgpt.schema import MANIFEST_FILE

FOLDER = "checkpoints"
STATE_FILE = "state.json"
DENSE_FILE = "dense.safetensors"
DENSE_OPTIMIZER_FILE = "dense_optimizer.safetensors"
DAMAGED_FILE = "damaged.json"  # says what is wrong with a checkpoint that was found to be damaged
ROWS_PER_FILE = 250_000  # of a sharded table; with Adam's state at width 64, some 200 MB
SCHEMA_VERSION = 1
MOMENTS = ("exp_avg", "exp_avg_sq")  # of the dense weights, by the names that torch.optim.AdamW gives them
_ADVICE = "bring the file back, or begin again with --restart"
_NAME = re.compile(r"step-\d{10,}-epoch-\d{5,}")
_FILE_NAME = re.compile(r"\w[\w.-]*")  # nothing that leads out of the folder


@dataclass
class TableRows:
    """This rank's part of a sharded table: ``rows`` and any further tensors with one row per table row."""

    num_rows: int  # of the whole table
    first: int  # this rank's first row, counted in the whole table
    tensors: dict[str, Tensor]


@dataclass
class Snapshot:
    """What this rank puts into a checkpoint."""

    name: str
    state: dict[str, Any]
    """Of training; fit for JSON."""
    dense: dict[str, Tensor]
    """Whole parameters by name; like ``state`` and ``dense_optimizer`` the same on every rank."""
    dense_optimizer: dict[str, Tensor]
    tables: dict[str, TableRows] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)
    """What it was made with and of: settings, fingerprints, versions; fit for JSON."""


@dataclass
class CheckpointFile:
    """One file of a checkpoint, and for a table's file, which rows it holds."""

    file: str
    bytes: int
    sha256: str
    table: str | None = None
    first_row: int = 0
    rows: int = 0


@dataclass
class CheckpointManifest:
    schema_version: int
    name: str
    files: list[CheckpointFile]
    tables: dict[str, int]
    """Number of rows of each sharded table."""
    about: dict[str, Any]


def checkpoint_name(step: int, epoch: int) -> str:
    """Sorts by step; the epoch tells a checkpoint inside an epoch from the one after its last step."""
    return f"step-{step:010d}-epoch-{epoch:05d}"


def write(
    run: str,
    snapshot: Snapshot,
    group: dist.ProcessGroup | None = None,
    check_may_write: Callable[[], None] = lambda: None,
) -> CheckpointManifest:
    """Write a checkpoint. Collective: every rank writes its rows of each table, rank 0 the rest.

    Args:
        group: the ranks, for the collectives of this call alone.
        check_may_write: raises on rank 0 if another process has taken over the run.

    What fails on one rank raises on all of them, and leaves nothing that would be taken for whole.
    """
    folder = storage.join(run, FOLDER, snapshot.name)

    def clear() -> None:
        if collectives.rank() == 0:
            check_may_write()
            _remove(folder)

    collectives.on_every_rank(clear, group)  # nobody writes into a folder that is still being cleared
    written = collectives.on_every_rank(lambda: _write_files(folder, snapshot), group)
    manifest = _manifest_of(snapshot, [entry for part in written for entry in part])

    def finish() -> None:
        if collectives.rank() == 0:
            check_may_write()
            _check_sizes(folder, manifest)
            data = json.dumps(asdict(manifest), indent=2).encode()
            storage.create_bytes(storage.join(folder, MANIFEST_FILE), data)

    collectives.on_every_rank(finish, group)
    return manifest


def finished(run: str) -> list[str]:
    """Names of the finished checkpoints, oldest first, without those that were found to be damaged."""
    return [name for name in _names(run) if _is_finished(run, name)]


def newest(run: str) -> str | None:
    """The name of the newest finished checkpoint, or None. Its files are not looked at."""
    return next(iter(reversed(finished(run))), None)


def newest_whole(run: str, warn: Callable[[str], None]) -> str | None:
    """The newest checkpoint whose files are all there as written; None if there was never one. Collective.

    ``warn`` is told on rank 0 what was passed over. A damaged one is marked as such, and removed like
    an unfinished one when the next checkpoint has been written.
    Raises ``UserError`` if none of several is whole: to begin anew is for the user to decide.
    """
    # One rank looks: a shared file system may show the newest folder to some ranks only.
    found = [(name, _is_finished(run, name)) for name in _names(run)] if collectives.rank() == 0 else []
    found = collectives.gather_objects(found)[0]
    names = [name for name, done in found if done]
    others = [name for name, done in found if not done]
    if collectives.rank() == 0:
        for name in others:
            warn(f"{storage.join(run, FOLDER, name)}: is not whole and is passed over")
    for name in reversed(names):
        problems = collectives.on_every_rank(partial(_problem_in_share, run, name))
        problem = next(filter(None, problems), None)
        if problem is None:
            return name
        if collectives.rank() == 0:
            warn(f"going on from an older checkpoint: {problem}")
            storage.write_json(storage.join(run, FOLDER, name, DAMAGED_FILE), {"problem": problem})
    if names or any(storage.exists(storage.join(run, FOLDER, name, DAMAGED_FILE)) for name in others):
        raise UserError(f"{storage.join(run, FOLDER)}: no checkpoint is whole; begin again with --restart")
    return None


def keep_only(run: str, names: Iterable[str]) -> None:
    """Remove all other checkpoints, finished or not."""
    kept = set(names)
    for name in _names(run):
        if name not in kept:
            _remove(storage.join(run, FOLDER, name))


def read_manifest(run: str, name: str) -> CheckpointManifest:
    """Raises ``UserError`` if the manifest is missing, or not what this release writes."""
    where = storage.join(run, FOLDER, name, MANIFEST_FILE)
    if not _NAME.fullmatch(name):  # it may come from a file
        raise UserError(f"{storage.join(run, FOLDER)}: {name!r} is no checkpoint; begin again with --restart")
    manifest = validated(CheckpointManifest, storage.read_json(where), where, _ADVICE)
    if manifest.schema_version != SCHEMA_VERSION or manifest.name != name:
        raise UserError(f"{where}: is of another release or of another checkpoint")
    for entry in manifest.files:
        if not _FILE_NAME.fullmatch(entry.file):
            raise UserError(f"{where}: {entry.file!r} is not a file of a checkpoint; the file is damaged")
    for table, num_rows in manifest.tables.items():
        entries = [entry for entry in manifest.files if entry.table == table]
        ends = [0, *(entry.first_row + entry.rows for entry in entries)]
        if [entry.first_row for entry in entries] != ends[:-1] or ends[-1] != num_rows:
            raise UserError(f"{where}: does not hold the {num_rows} rows of {table}; the file is damaged")
    return manifest


def load_state(run: str, name: str) -> Any:
    """What was given as state, as JSON holds it. Raises ``UserError`` if it is damaged."""
    checkpoint = _Finished(run, name)
    try:
        return json.loads(checkpoint.read(STATE_FILE))
    except (ValueError, RecursionError):
        raise UserError(f"{checkpoint.folder}/{STATE_FILE}: is not JSON; {_ADVICE}") from None


def load_dense(run: str, name: str, like: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The dense weights by name. Raises ``UserError`` if names or shapes are not those of ``like``."""
    checkpoint = _Finished(run, name)
    weights = checkpoint.tensors(DENSE_FILE)
    if like is not None:
        checkpoint.check_shapes(DENSE_FILE, weights, {key: tensor.shape for key, tensor in like.items()})
    return weights


def load_dense_optimizer(run: str, name: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Both moments of each weight (``exp_avg/NAME``), and ``step``. Raises as ``load_dense`` does."""
    checkpoint = _Finished(run, name)
    state = checkpoint.tensors(DENSE_OPTIMIZER_FILE)
    shapes = {f"{moment}/{key}": tensor.shape for moment in MOMENTS for key, tensor in weights.items()}
    checkpoint.check_shapes(DENSE_OPTIMIZER_FILE, state, shapes | {"step": torch.Size()})
    return state


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
    assert first + count <= checkpoint.manifest.tables[table]
    for entry, start, end in files_with_rows(map(asdict, files), first, first + count):
        saved = checkpoint.tensors(entry["file"])
        for key, tensor in tensors.items():
            if key not in saved:
                raise UserError(
                    f"{checkpoint.folder}: {table} was saved without {key}, by another table optimizer; "
                    "go on with the optimizer of that run, or train again with --restart"
                )
            if saved[key].shape != (entry["rows"], *tensor.shape[1:]):
                raise UserError(
                    f"{checkpoint.folder}/{entry['file']}: {key} has the shape {list(saved[key].shape)}, "
                    f"not {[entry['rows'], *tensor.shape[1:]]}; train again with --restart"
                )
            piece = saved[key][start - entry["first_row"] : end - entry["first_row"]]
            tensor[start - first : end - first] = piece
        del saved, piece  # before the next file is read


def table_row_ranges(run: str, name: str, table: str) -> Iterator[Tensor]:
    """The rows of a sharded table in order, float32, file by file. Raises ``UserError`` if it has none."""
    checkpoint = _Finished(run, name)
    for entry in checkpoint.table_files(table):
        rows = checkpoint.tensors(entry.file).get("rows", torch.empty(0))
        if rows.dim() == 0 or len(rows) != entry.rows:
            raise UserError(f"{checkpoint.folder}/{entry.file}: does not hold {entry.rows} rows; {_ADVICE}")
        yield rows.float()


def _names(run: str) -> list[str]:
    """Of all checkpoints, finished or not, oldest first."""
    return [name for name in storage.list_names(storage.join(run, FOLDER)) if _NAME.fullmatch(name)]


def _is_finished(run: str, name: str) -> bool:
    """Whether a checkpoint is, and was not found to be damaged."""
    folder = storage.join(run, FOLDER, name)
    return storage.exists(storage.join(folder, MANIFEST_FILE)) and not storage.exists(
        storage.join(folder, DAMAGED_FILE)
    )


def _problem_in_share(run: str, name: str) -> str | None:
    """What is wrong with the files of a checkpoint that this rank has to look at: each W-th of W ranks."""
    try:
        checkpoint = _Finished(run, name)
        for entry in checkpoint.manifest.files[collectives.rank() :: collectives.world_size()]:
            checkpoint.check(entry)
    except UserError as error:
        return str(error)
    return None


def _write_files(folder: str, snapshot: Snapshot) -> list[CheckpointFile]:
    """Write this rank's files."""
    written = []
    if collectives.rank() == 0:
        state = json.dumps(snapshot.state, indent=2).encode()
        written.append(_write(folder, CheckpointFile(STATE_FILE, 0, ""), state))
        for file, tensors in ((DENSE_FILE, snapshot.dense), (DENSE_OPTIMIZER_FILE, snapshot.dense_optimizer)):
            written.append(_write(folder, CheckpointFile(file, 0, ""), safetensors.torch.save(tensors)))
    for table, part in snapshot.tables.items():
        for first_row, piece in _pieces(part):
            name = f"{table}-rows-{first_row:012d}.safetensors"
            entry = CheckpointFile(name, 0, "", table, first_row, len(piece["rows"]))
            written.append(_write(folder, entry, safetensors.torch.save(piece)))
    return written


def _write(folder: str, entry: CheckpointFile, data: bytes) -> CheckpointFile:
    storage.write_bytes(storage.join(folder, entry.file), data, durable=True)
    entry.bytes, entry.sha256 = len(data), storage.checksum_of(data)
    return entry


def _pieces(part: TableRows) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """What goes into each file: its first row, counted in the whole table, and its tensors."""
    for start in range(0, len(part.tensors["rows"]), ROWS_PER_FILE):
        end = start + ROWS_PER_FILE
        yield (
            part.first + start,
            {key: tensor[start:end].contiguous() for key, tensor in part.tensors.items()},
        )


def _manifest_of(snapshot: Snapshot, files: list[CheckpointFile]) -> CheckpointManifest:
    num_rows = {table: part.num_rows for table, part in snapshot.tables.items()}
    for table, expected in num_rows.items():
        saved = sum(entry.rows for entry in files if entry.table == table)
        assert saved == expected, f"the ranks hold {saved} rows of {table}"
    return CheckpointManifest(SCHEMA_VERSION, snapshot.name, files, num_rows, snapshot.about)


def _check_sizes(folder: str, manifest: CheckpointManifest) -> None:
    for entry in manifest.files:
        size = storage.size(storage.join(folder, entry.file))
        if size != entry.bytes:
            raise UserError(f"{folder}/{entry.file}: {size} bytes instead of {entry.bytes} were written")


def _remove(folder: str) -> None:
    storage.remove(storage.join(folder, MANIFEST_FILE))  # first: half removed is not finished
    storage.remove(folder)


class _Finished:
    """A finished checkpoint: its files are as the manifest says, or ``UserError`` is raised."""

    def __init__(self, run: str, name: str):
        self.folder = storage.join(run, FOLDER, name)
        self.manifest = read_manifest(run, name)

    def table_files(self, table: str) -> list[CheckpointFile]:
        """The entries of a sharded table's files, by ascending rows."""
        if table not in self.manifest.tables:
            raise UserError(f"{self.folder}: holds no sharded {table}; train again with --restart")
        return [entry for entry in self.manifest.files if entry.table == table]

    def check(self, entry: CheckpointFile) -> None:
        """Read a file through, in pieces."""
        try:
            checksum = storage.checksum(storage.join(self.folder, entry.file))
        except FileNotFoundError:
            raise UserError(f"{self.folder}/{entry.file}: missing; {_ADVICE}") from None
        self._compare(entry.file, checksum)

    def read(self, file: str) -> bytes:
        try:
            data = storage.read_bytes(storage.join(self.folder, file))
        except FileNotFoundError:
            raise UserError(f"{self.folder}/{file}: missing; {_ADVICE}") from None
        self._compare(file, storage.checksum_of(data))
        return data

    def _compare(self, file: str, checksum: str) -> None:
        expected = {entry.file: entry.sha256 for entry in self.manifest.files}
        if checksum != expected.get(file):
            raise UserError(f"{self.folder}/{file}: damaged (wrong checksum); {_ADVICE}")

    def check_shapes(
        self, file: str, tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size]
    ) -> None:
        for key in sorted(set(tensors) | set(shapes)):
            if key not in tensors or key not in shapes or tensors[key].shape != shapes[key]:
                raise UserError(
                    f"{self.folder}/{file}: {key} is not as in this model; begin again with --restart"
                )

    def tensors(self, file: str) -> dict[str, Tensor]:
        try:
            return safetensors.torch.load(self.read(file))
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
            raise UserError(f"{self.folder}/{file}: not safetensors ({error}); {_ADVICE}") from None
