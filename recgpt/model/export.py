"""The exported model: loads with torch and safetensors alone, and nothing in it can run code.

A folder with ``model.json`` (written last), ``gpt.safetensors`` and the item table in consecutive row
ranges, ``item_table-00000.safetensors`` ..., each holding one tensor ``rows`` [rows, D]. A model with a row
for each user has ``user_table-00000.safetensors`` ... besides, and ``users.safetensors`` with the hashes of
the users that it knows.
"""

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate
from typing import Annotated, Any, TypeAlias

import safetensors.torch
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from recgpt import storage
from recgpt.config import ModelSettings, RecallSettings, SplitSettings
from recgpt.errors import UserError
from recgpt.model.gpt import GPT
from recgpt.model.row_ranges import RowRanges
from recgpt.model.users import KnownUsers, UserVectors
from recgpt.schema import MODEL_SCHEMA_VERSION
from recgpt.settings_reading import from_dict, to_dict

EXPORT_FOLDER = "model"  # inside a run
INFO_FILE = "model.json"
GPT_FILE = "gpt.safetensors"
USERS_FILE = "users.safetensors"
ITEM_TABLE = "item_table"
USER_TABLE = "user_table"
CHECKSUMS = "sha256"

ReadTensors: TypeAlias = Callable[[str, str, dict[str, Any]], dict[str, Tensor]]

# BLAS sums in another order where rows lie differently with respect to 64 bytes: a table that is read from
# its n-th row on begins at a multiple of this in memory, and so gives the same scores as a whole one.
_ALIGNED_ROWS = 16
_VALUES_CHECKED_AT_ONCE = 2**20


@dataclass
class ModelInfo:
    """What a model knows of itself."""

    num_items: Annotated[int, Field(ge=0, lt=2**31)]
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
    sums: dict[str, str] = {}

    def write(file: str, tensors: dict[str, Tensor]) -> None:
        data = safetensors.torch.save(tensors)
        storage.write_bytes(storage.join(url, file), data)
        sums[file] = storage.checksum_of(data)

    write(GPT_FILE, gpt)
    description = {
        "schema_version": MODEL_SCHEMA_VERSION,
        "num_items": info.num_items,
        "vocabulary_fingerprint": info.vocabulary_fingerprint,
        "dataset_fingerprint": info.dataset_fingerprint,
        "model": to_dict(info.model),
        "split": to_dict(info.split),
        "recall": to_dict(info.recall),
        ITEM_TABLE: _save_table(write, ITEM_TABLE, item_table, info.num_items + 1),
    }
    if known_users is not None:
        write(USERS_FILE, {"hashes": known_users.hashes})
        description[USER_TABLE] = _save_table(write, USER_TABLE, user_table, known_users.num_rows)
    storage.write_json(storage.join(url, INFO_FILE), {**description, CHECKSUMS: sums})


def save_quotas(url: str, quotas: Sequence[int]) -> None:
    """Let an exported model serve these recall quotas unless told otherwise; ``k`` becomes their sum.

    ``model.json`` is replaced whole or not at all. What else it says stays, checksums included.
    ``model_fingerprint`` covers the file: with other quotas it is another model to all that was made from it.
    An approximate index has to be built again. `recgpt generate` begins anew where it was interrupted, does
    not replace finished candidates without ``--overwrite``, and ends with an error if it is at work. A run
    that was started from the model cannot be gone on with. If the model's own run trains on, it exports the
    model again, with the quotas of its settings.
    Raises ``UserError`` if there is no model that this version can read.
    """
    description = _read_description(url)
    where = storage.join(url, INFO_FILE)
    recall = replace(_info(description, where).recall, k=sum(quotas), quotas=tuple(quotas))
    storage.write_json(where, {**description, "recall": to_dict(recall)})


def _save_table(
    write: Callable[[str, dict[str, Tensor]], None], name: str, pieces: Iterable[Tensor], num_rows: int
) -> list[dict[str, Any]]:
    """Write each piece as a file; returns their entries in ``model.json``."""
    entries = []
    first = 0
    for index, rows_ND in enumerate(pieces):
        file = f"{name}-{index:05d}.safetensors"
        write(file, {"rows": rows_ND.contiguous()})
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
    return _info(_read_description(url), storage.join(url, INFO_FILE))


def model_fingerprint(url: str) -> str:
    """SHA-256, in hexadecimal, over the names and contents of an exported model's files.

    Raises ``UserError`` if one is missing, or not the one that was written.
    """
    description = _read_description(url)
    files = [INFO_FILE, GPT_FILE, *(entry["file"] for entry in _table_files(url, description, ITEM_TABLE))]
    if USER_TABLE in description:
        files += [USERS_FILE, *(entry["file"] for entry in _table_files(url, description, USER_TABLE))]
    lines = []
    for file in files:
        with _as_user_error(storage.join(url, file)):
            checksum = storage.checksum(storage.join(url, file))
        if file != INFO_FILE:
            _check_sum(url, description, file, checksum)
        lines.append(f"{checksum}  {file}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_model(url: str) -> tuple[ModelInfo, GPT, Tensor]:
    """The model's description, its GPT in eval mode, and the item table, float32 [num_items + 1, D].

    A table of users, and whom it knows, come with the GPT.
    Raises ``UserError`` if there is no finished model, or one that this version cannot read.
    """
    info, gpt = load_without_items(url)
    num_rows = info.num_items + 1
    return info, gpt, _load_table(url, ITEM_TABLE, num_rows, info.model.vector_width, 0, num_rows)


def load_without_items(url: str) -> tuple[ModelInfo, GPT]:
    """The same without the item table, which ``open_item_table`` reads. Raises ``UserError`` alike."""
    info = read_info(url)
    weights = _read_tensors(url, GPT_FILE, _read_description(url))
    _check_weights(url, weights, info.model)
    gpt = GPT(info.model)
    gpt.load_state_dict(weights)
    if info.model.user.kind == "table":
        gpt.known_users = read_known_users(url)
        num_rows = gpt.known_users.num_rows
        gpt.user = UserVectors(_load_table(url, USER_TABLE, num_rows, info.model.vector_width, 0, num_rows))
    return info, gpt.eval()


def open_item_table(url: str, info: ModelInfo, first: int, end: int) -> RowRanges:
    """Rows ``first`` to ``end`` (exclusive, not empty) of the item table, float32.

    Local files are mapped into memory and not read: processes on one machine share what they use of them. So
    their checksums are not looked at; ``model_fingerprint`` has done so, once for all processes of a job.
    Others are read, those alone that hold such rows. Raises ``UserError`` as ``load_model``.
    """
    num_rows = info.num_items + 1
    if storage.is_local(url):
        pieces = table_pieces(url, ITEM_TABLE, num_rows, first, end, _map_tensors)
        return RowRanges([rows_ND for _, rows_ND in pieces])
    before = first % _ALIGNED_ROWS
    table_RD = _load_table(url, ITEM_TABLE, num_rows, info.model.vector_width, first - before, end)
    return RowRanges([table_RD[before:]])


def check_finite(url: str, tensors: Iterable[Tensor]) -> None:
    """Raises ``UserError`` if some of the model's tensors hold values that are not finite numbers."""
    # In slices: looked at whole, a tensor would take its own memory again and more.
    slices = (some for tensor in tensors for some in tensor.flatten().split(_VALUES_CHECKED_AT_ONCE))
    if not all(bool(torch.isfinite(some).all()) for some in slices):
        raise UserError(
            f"{url}: the model holds values that are not finite; its training diverged, train again"
        )


def load_gpt(url: str, gpt: GPT) -> None:
    """Load the weights of an exported GPT into ``gpt``. Raises ``UserError`` as ``load_model``."""
    weights = _read_tensors(url, GPT_FILE, _read_description(url))
    _check_same_shapes(url, weights, gpt.state_dict())
    gpt.load_state_dict(weights)


def _check_weights(url: str, weights: dict[str, Tensor], settings: ModelSettings) -> None:
    """Raises ``UserError`` if a GPT of these settings has other weights; none is made to find that out."""
    try:
        assert settings.layers <= len(weights), "more layers than weights"
        with torch.device("meta"):
            expected = GPT(settings).state_dict()
    except (AssertionError, RuntimeError, OverflowError, TypeError) as error:
        raise UserError(f"{url}: the GPT weights do not fit model.json: {_one_line(error)}") from None
    _check_same_shapes(url, weights, expected)


def _check_same_shapes(url: str, weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name in sorted({*weights, *expected}):
        here, there = (
            f"{some[name].dtype} {list(some[name].shape)}" if name in some else "absent"
            for some in (weights, expected)
        )
        if here != there:
            problem = f"{name} is {here}, not {there}"
            raise UserError(f"{url}: the GPT weights do not fit model.json: {problem}")


def read_known_users(url: str) -> KnownUsers:
    """The users of an exported model of user kind `table`. Raises ``UserError`` as ``load_model``."""
    tensors = _read_tensors(url, USERS_FILE, _read_description(url))
    hashes = tensors.get("hashes", torch.empty(0))
    if hashes.dtype != torch.int64 or hashes.dim() != 1 or not bool((hashes[:-1] < hashes[1:]).all()):
        raise UserError(f"{url}/{USERS_FILE}: holds no ascending hashes; export again")
    return KnownUsers(hashes)


def table_pieces(
    url: str,
    name: str,
    num_rows: int,
    first: int,
    end: int,
    read: ReadTensors = lambda url, file, description: _read_tensors(url, file, description),
) -> Iterator[tuple[int, Tensor]]:
    """Rows ``first`` to ``end`` (exclusive) of an exported table, file by file: other files are not read.

    Args:
        num_rows: that the whole table must have.
        read: gives the tensors of a file of the folder, which ``model.json`` describes.

    Yields the first row of each piece, counted in the whole table, and the piece, float32 [rows, D].
    Raises ``UserError`` as ``load_model``.
    """
    description = _read_description(url)
    width = _info(description, storage.join(url, INFO_FILE)).model.vector_width
    files = _table_files(url, description, name)
    total = sum(entry["rows"] for entry in files)
    if total != num_rows:
        raise UserError(f"{url}: {name} has {total} rows, model.json says {num_rows}; export again")
    for entry, start, stop in files_with_rows(files, first, end):
        rows_ND = read(url, entry["file"], description).get("rows", torch.empty(0))
        if rows_ND.shape != (entry["rows"], width) or rows_ND.dtype != torch.float32:
            raise UserError(
                f"{url}/{entry['file']}: its rows {list(rows_ND.shape)} are not the "
                f"{entry['rows']} x {width} float32 that model.json describes; export again"
            )
        yield start, rows_ND[start - entry["first_row"] : stop - entry["first_row"]]


def files_with_rows(
    files: Iterable[dict[str, Any]], first: int, end: int
) -> Iterator[tuple[dict[str, Any], int, int]]:
    """Of a table's files, those that hold some of its rows ``first`` to ``end`` (exclusive).

    Yields the entry of each file (it has ``first_row`` and ``rows``) and the range of such rows in it,
    counted in the whole table.
    """
    for entry in files:
        start, stop = max(first, entry["first_row"]), min(end, entry["first_row"] + entry["rows"])
        if start < stop:
            yield entry, start, stop


def _load_table(url: str, name: str, num_rows: int, width: int, first: int, end: int) -> Tensor:
    """Rows ``first`` to ``end`` (exclusive) of a table, float32, allocated once and filled file by file."""
    table_RD = torch.empty(end - first, width)
    for start, rows_ND in table_pieces(url, name, num_rows, first, end):
        table_RD[start - first : start - first + len(rows_ND)] = rows_ND
    return table_RD


def _read_description(url: str) -> dict[str, Any]:
    """What ``model.json`` holds, if it is of this schema version; else raises ``UserError``."""
    where = storage.join(url, INFO_FILE)
    description = storage.read_json(where)
    version = description.get("schema_version") if isinstance(description, dict) else None
    if version != MODEL_SCHEMA_VERSION:
        raise UserError(
            f"{where}: model schema version {version}, this RecGPT reads {MODEL_SCHEMA_VERSION}; train again"
        )
    return description


def _info(description: dict[str, Any], where: str) -> ModelInfo:
    names = [field.name for field in fields(ModelInfo)]
    return from_dict(ModelInfo, {name: description[name] for name in names if name in description}, where)


@dataclass(frozen=True)
class _TableFile:
    """A file of a table, as ``model.json`` names it."""

    file: str
    first_row: Annotated[int, Field(ge=0, lt=2**63)]
    rows: Annotated[int, Field(ge=0, lt=2**63)]


def _table_files(url: str, description: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """The entries of a table's files. Raises ``UserError`` if they are not consecutive ranges of rows."""
    where = storage.join(url, INFO_FILE)
    files = from_dict(list[_TableFile], description.get(name), f"{where}: {name}")
    if [file.first_row for file in files] != [0, *accumulate(file.rows for file in files)][:-1]:
        raise UserError(f"{where}: damaged, {name} does not name consecutive rows; export again")
    for file in files:
        storage.join_inside(url, file.file, where)
    return [asdict(file) for file in files]


def _check_sum(url: str, description: dict[str, Any], file: str, checksum: str) -> None:
    """Raises ``UserError`` if a file is not the one that was written, as far as ``model.json`` says which."""
    sums = description.get(CHECKSUMS)  # absent in models of older releases
    if sums is not None and (not isinstance(sums, dict) or sums.get(file) != checksum):
        raise UserError(f"{url}/{file}: not the file that was written (its SHA-256 differs); export again")


def _read_tensors(url: str, file: str, description: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a file of a model, if it is the one that was written."""
    where = storage.join(url, file)
    with _as_user_error(where):
        data = storage.read_bytes(where)
        _check_sum(url, description, file, storage.checksum_of(data))
        return safetensors.torch.load(data)


def _map_tensors(url: str, file: str, _description: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a local file, memory-mapped."""
    path = storage.join(url, file).removeprefix("file://")
    with _as_user_error(path):
        # Python's own errors name the file and the reason; those of safetensors do not.
        with open(path, "rb"):
            pass
        with safe_open(path, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118


@contextlib.contextmanager
def _as_user_error(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{url}: no such file; the model is not complete") from None
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"{url}: not a readable safetensors file ({_one_line(error)})") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
