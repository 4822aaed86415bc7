"""A trained model handed over to programs that know nothing of RecGPT: a folder that serves by itself.

    manifest.json        written last: format, settings, releases; size and SHA-256 of the files with data
    items.json           the ids of items 1, 2, ... and how often the log holds each
    item_vectors.npy     float32 [num_items + 1, D], row 0 is padding; in format `faiss`, items.faiss instead
    encoder.safetensors  the weights of the GPT; in format `onnx`, encoder.onnx instead
    user_vectors.npy     float32 [rows, D], row 0 is that of unknown users; only of a personal model
    user_hashes.npy      int64, ascending: the users of rows 1, 2, ...; only where each user has a row
    serve.py             serves the folder
    README.txt           says what goes in and what comes out

Nothing of it can run code when it is read. PyTorch's format for exported programs (.pt2) is therefore none
of the formats: a file may say that its weights are pickles, and ``torch.export.load`` then loads them so.
"""

import hashlib
import json
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, TypeAlias

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn

from recgpt import __version__, storage
from recgpt.data.dataset import HistoryDataset
from recgpt.model.export import (
    ITEM_TABLE,
    ModelInfo,
    check_finite,
    load_without_items,
    model_fingerprint,
    table_pieces,
)
from recgpt.model.gpt import GPT
from recgpt.model.members import weights_as_one
from recgpt.model.users import UserVectors
from recgpt.retrieval.approximate_index import import_faiss
from recgpt.retrieval.index import FIRST_ITEM
from recgpt.retrieval.onnx_encoder import import_onnx, save_encoder
from recgpt.retrieval.serving_readme import readme
from recgpt.schema import MANIFEST_FILE
from recgpt.settings_reading import to_dict

Format: TypeAlias = Literal["torch", "onnx", "faiss"]

SERVING_SCHEMA_VERSION = 1


def releases(format: Format) -> dict[str, str]:
    """Of RecGPT and what a format is written with, by name. Raises ``UserError`` if a package is missing."""
    packages = {"torch": lambda: [torch], "onnx": import_onnx, "faiss": lambda: [import_faiss()]}[format]()
    return {"recgpt": __version__, **{package.__name__: package.__version__ for package in packages}}


def write_serving_folder(url: str, format: Format, model: str, dataset: HistoryDataset) -> dict[str, Any]:
    """Write a model into an empty folder, the manifest last; returns the manifest.

    One file of the item table is in memory at a time; in format `faiss`, all of it.

    Args:
        model: the exported model's own folder.
        dataset: one with the model's vocabulary.

    Raises ``UserError`` if something cannot be read, or the model holds values that are not finite numbers.
    """
    info, gpt = load_without_items(model)
    check_finite(model, (*gpt.parameters(), *gpt.buffers()))
    vocabulary = dataset.vocabulary()
    files = _Files(url)
    if format == "onnx":
        _write_onnx(files, gpt)
    else:
        weights = {name: value for name, value in weights_as_one(gpt).items() if not name.startswith("user.")}
        files.write("encoder.safetensors", safetensors.torch.save(weights))
    if format == "faiss":
        _write_faiss(files, info.model.vector_width, _item_pieces(model, info))
    else:
        shape = (info.num_items + FIRST_ITEM, info.model.vector_width)
        files.write_array("item_vectors.npy", "<f4", shape, _item_pieces(model, info))
    if gpt.user is not None:
        _write_users(files, gpt)
    items = {"item_ids": vocabulary.item_ids.to_pylist(), "counts": vocabulary.counts.tolist()}
    files.write("items.json", json.dumps(items).encode())
    manifest = {
        "schema_version": SERVING_SCHEMA_VERSION,
        "format": format,
        "releases": releases(format),
        "model_fingerprint": model_fingerprint(model),
        "vocabulary_fingerprint": info.vocabulary_fingerprint,
        "num_items": info.num_items,
        "item_id_type": dataset.manifest.item_id_type,
        "user_id_type": dataset.manifest.user_id_type,
        "model": to_dict(info.model),
        "recall": to_dict(info.recall),
        "files": files.written,
    }
    storage.write_bytes(storage.join(url, "serve.py"), _script().read_bytes())
    storage.write_bytes(storage.join(url, "README.txt"), readme(format, info, list(files.written)).encode())
    storage.write_json(storage.join(url, MANIFEST_FILE), manifest)
    return manifest


class _CheckedFile:
    """A file that is being written: its bytes are counted and their checksum is taken on the way."""

    def __init__(self, file: IO[bytes]):
        self.file = file
        self.size = 0
        self.digest = hashlib.sha256()

    def write(self, data: Any) -> None:
        self.file.write(data)
        self.digest.update(data)
        self.size += memoryview(data).nbytes


class _Files:
    """The files with data in a folder, as they are written, and what the manifest says of them."""

    def __init__(self, url: str):
        self.url = url
        self.written: dict[str, dict[str, Any]] = {}

    @contextmanager
    def open(self, name: str) -> Iterator[_CheckedFile]:
        filesystem, path = storage.filesystem_and_path(storage.join(self.url, name))
        with filesystem.open(path, "wb") as file:
            checked = _CheckedFile(file)
            yield checked
        self.written[name] = {"bytes": checked.size, "sha256": checked.digest.hexdigest()}

    def write(self, name: str, data: bytes) -> None:
        with self.open(name) as file:
            file.write(data)

    def write_array(self, name: str, dtype: str, shape: tuple[int, ...], pieces: Iterable[Tensor]) -> None:
        """An array in numpy's format, of which ``pieces`` follow one another."""
        header = {"descr": dtype, "fortran_order": False, "shape": shape}
        with self.open(name) as file:
            np.lib.format.write_array_header_1_0(file, header)
            for piece in pieces:
                file.write(np.ascontiguousarray(piece.numpy(), dtype).data)


def _item_pieces(model: str, info: ModelInfo) -> Iterator[Tensor]:
    """The item table file by file, float32 [rows, D]."""
    num_rows = info.num_items + FIRST_ITEM
    for _, rows_ND in table_pieces(model, ITEM_TABLE, num_rows, 0, num_rows):
        check_finite(model, [rows_ND])
        yield rows_ND


def _write_onnx(files: _Files, gpt: GPT) -> None:
    with tempfile.TemporaryDirectory() as temporary:  # ONNX and its runtime know local files alone
        save_encoder(Path(temporary), gpt)
        for path in sorted(Path(temporary).iterdir()):
            with files.open(path.name) as target, path.open("rb") as source:
                while chunk := source.read(2**20):
                    target.write(chunk)


def _write_faiss(files: _Files, width: int, item_pieces: Iterable[Tensor]) -> None:
    """An exact index by inner product whose ids are item indices; padding is not in it."""
    faiss = import_faiss()
    index = faiss.IndexIDMap(faiss.IndexFlatIP(width))
    first = 0
    for rows_ND in item_pieces:
        item_N = torch.arange(first, first + len(rows_ND))
        is_item_N = item_N >= FIRST_ITEM
        index.add_with_ids(rows_ND[is_item_N].numpy(), item_N[is_item_N].numpy())
        first += len(rows_ND)
    with files.open("items.faiss") as file:
        faiss.write_index(index, faiss.PyCallbackIOWriter(file.write))


def _write_users(files: _Files, gpt: GPT) -> None:
    """The user vectors; and whose they are, where that is more than a matter of the hash."""
    assert isinstance(gpt.user, nn.Embedding | UserVectors)
    rows_RD = gpt.user.rows_RD if isinstance(gpt.user, UserVectors) else gpt.user.weight.detach()
    files.write_array("user_vectors.npy", "<f4", tuple(rows_RD.shape), [rows_RD])
    if gpt.known_users is not None:
        hashes = gpt.known_users.hashes
        files.write_array("user_hashes.npy", "<i8", tuple(hashes.shape), [hashes])


def _script() -> Path:
    """``serve.py``: inside an installed package, among the documents in a checkout."""
    package = Path(__file__).parents[1]
    installed = package / "serving" / "serve.py"
    return installed if installed.is_file() else package.parent / "docs" / "serving" / "serve.py"
