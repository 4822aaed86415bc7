"""An approximate index: faiss finds most of the best items among a part of the catalogue.

What it promises is what every index does: no repeats, no excluded items, full lists, true scores. Only that
these are the very best items it does not. An index lies in a folder of its own: faiss's file and, written
last, a manifest with its checksum and the model that it belongs to.

Shapes: B interest vectors, D width, R = V + 1 table rows, K items asked for, C items fetched,
P excluded (row, item) pairs.
"""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from recgpt import storage
from recgpt.errors import UserError
from recgpt.manifests import validated
from recgpt.retrieval.index import FIRST_ITEM, Exclusions, Index, rescore
from recgpt.schema import INDEX_SCHEMA_VERSION, MANIFEST_FILE, PADDING_INDEX

Kind: TypeAlias = Literal["ivf", "hnsw"]
Number: TypeAlias = Annotated[int, Field(gt=0, lt=2**31)]
INDEX_FILE = "index.faiss"


@dataclass(frozen=True)
class IndexManifest:
    """What ``recgpt index`` says about the index it built."""

    schema_version: int
    kind: Kind
    parameters: dict[str, Number]
    """It was built with: ``lists`` (ivf), or ``neighbors`` and ``build_breadth`` (hnsw)."""
    effort: Number
    """It is searched with: lists that are looked into (ivf), or breadth of the search (hnsw)."""
    recall_at: Number
    recall: float
    """The share of each list of the ``recall_at`` best that it finds, on average."""
    recall_users: Number
    """Users whose interest vectors it was measured on."""
    speed_up: float
    """Time of the exact index over that of this one, on the same vectors."""
    num_items: Number
    model_fingerprint: str
    """SHA-256 over the files of the exported model whose items it holds."""
    sha256: str
    """Of faiss's file."""


class ApproximateIndex:
    """An ``Index`` that lets faiss find candidates and an exact index do what is left.

    Args:
        found: faiss's index by inner product; its n-th vector (from 0) is item n + 1.
        effort: as in the manifest.
        exact: has the vectors of all items, and finds the lists that would not get full otherwise.
        allowed: items that may be found, int64, ascending; None: all. Those of ``exact``, too.
    """

    def __init__(self, found: Any, kind: Kind, effort: int, exact: Index, allowed: Tensor | None = None):
        faiss = import_faiss()
        faiss.omp_set_num_threads(torch.get_num_threads())
        self.found = found
        self.exact = exact
        parameters: dict[str, Any] = {"nprobe" if kind == "ivf" else "efSearch": effort}
        if allowed is not None:
            bit_V = np.zeros(found.ntotal, np.bool_)
            bit_V[allowed.numpy() - FIRST_ITEM] = True
            parameters["sel"] = faiss.IDSelectorBitmap(np.packbits(bit_V, bitorder="little"))
        make = faiss.SearchParametersIVF if kind == "ivf" else faiss.SearchParametersHNSW
        self.parameters = make(**parameters)

    @torch.inference_mode()
    def search(
        self, interest_BD: Tensor, k: int, excluded: Exclusions | None = None
    ) -> tuple[Tensor, Tensor]:
        """As ``Index.search`` says; scores are dot products of the vectors, float32.

        More is fetched than asked for. Rows of whose items too many are excluded fetch more, in rounds;
        those that faiss has no more for are searched by the exact index.
        """
        pairs = Exclusions.none(interest_BD.device) if excluded is None else excluded
        wanted_B = k + torch.bincount(pairs.token_P, minlength=len(interest_BD))
        score_BK = interest_BD.new_full((len(interest_BD), k), -torch.inf)
        item_BK = torch.full_like(score_BK, PADDING_INDEX, dtype=torch.int64)
        short_B = torch.arange(len(interest_BD))
        fetched = 0
        while len(short_B) and fetched < int(wanted_B[short_B].max()):
            fetched = min(2 * max(fetched, k), int(wanted_B[short_B].max()))
            vector_BD = interest_BD[short_B]
            item_BC = _without(self.fetch(vector_BD, fetched), _of_rows(pairs, short_B))[:, :k]
            full_B = item_BC[:, -1] != PADDING_INDEX
            best = rescore(vector_BD[full_B], self.vectors(item_BC[full_B]), item_BC[full_B], k)
            score_BK[short_B[full_B]], item_BK[short_B[full_B]] = best
            short_B = short_B[~full_B]
        if len(short_B):
            left = self.exact.search(interest_BD[short_B], k, _of_rows(pairs, short_B))
            score_BK[short_B], item_BK[short_B] = left
        return score_BK, item_BK

    def vectors(self, item_X: Tensor) -> Tensor:
        """As ``Index.vectors`` says."""
        return self.exact.vectors(item_X)

    def fetch(self, interest_BD: Tensor, count: int) -> Tensor:
        """The best items that faiss finds, the best first, int64 [B, count]; 0 where it finds no more."""
        # Faiss's places begin at 0, and are -1 where there is none: one less than items and padding.
        _, place_BC = self.found.search(interest_BD.numpy(), count, params=self.parameters)
        return torch.from_numpy(place_BC) + FIRST_ITEM


def _without(item_BC: Tensor, excluded: Exclusions) -> Tensor:
    """The lists without excluded items, closed up, with padding at their ends."""
    row_B1 = torch.arange(len(item_BC))[:, None]
    most = 1 + max([0, *(int(item_X.max()) for item_X in (item_BC, excluded.item_P) if item_X.numel())])
    gone_BC = torch.isin(row_B1 * most + item_BC, excluded.token_P * most + excluded.item_P)
    gone_BC, order_BC = gone_BC.sort(dim=1, stable=True)
    return item_BC.gather(1, order_BC).masked_fill_(gone_BC, PADDING_INDEX)


def _of_rows(excluded: Exclusions, row_S: Tensor) -> Exclusions:
    """The pairs of some rows (int64, ascending, not empty), which are numbered by their places there."""
    place_P = torch.searchsorted(row_S, excluded.token_P).clamp(max=len(row_S) - 1)
    here = row_S[place_P] == excluded.token_P
    return Exclusions(place_P[here], excluded.item_P[here])


def import_faiss() -> Any:
    """Faiss, which is an optional package. Raises ``UserError`` that says how to install it."""
    try:
        import faiss
    except ImportError:
        raise UserError("approximate indexes need faiss: pip install 'recgpt[faiss]'") from None
    return faiss


def new_index(kind: Kind, width: int, parameters: Mapping[str, int]) -> Any:
    """An empty faiss index by inner product; ``parameters`` as in the manifest."""
    faiss = import_faiss()
    if kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, parameters["neighbors"], faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = parameters["build_breadth"]
        return index
    index = faiss.index_factory(width, f"IVF{parameters['lists']},Flat", faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1  # faiss warns on stderr otherwise; the measured recall tells more
    return index


def save_index(folder: str, found: Any, manifest: IndexManifest) -> IndexManifest:
    """Write faiss's file and then the manifest, with the checksum of the file; returns it."""
    faiss = import_faiss()
    url = storage.join(folder, INDEX_FILE)
    with tempfile.TemporaryDirectory() as temporary:
        path = str(Path(temporary, INDEX_FILE))
        faiss.write_index(found, path)
        filesystem, target = storage.filesystem_and_path(url)
        filesystem.put_file(path, target)
        manifest = replace(manifest, sha256=storage.checksum(path))
    storage.write_json(storage.join(folder, MANIFEST_FILE), asdict(manifest))
    return manifest


@dataclass(frozen=True)
class StoredIndex:
    """An index folder that belongs to the model; cheap to open and to pickle."""

    url: str
    manifest: IndexManifest

    @classmethod
    def open(cls, url: str, model_fingerprint: str) -> "StoredIndex":
        """Read the manifest of an index folder.

        Raises ``UserError`` if there is no finished index, or one of another release or another model, or
        no faiss to read it with.
        """
        import_faiss()
        url = storage.absolute(url)
        where = storage.join(url, MANIFEST_FILE)
        if not storage.exists(where):
            raise UserError(f"{url}: no index here ({MANIFEST_FILE} is missing); run `recgpt index` first")
        manifest = _manifest(storage.read_json(where), where)
        if manifest.model_fingerprint != model_fingerprint:
            raise UserError(f"{url}: the index of another model; run `recgpt index` for this one")
        return cls(url, manifest)

    def load(self, exact: Index, allowed: Tensor | None = None) -> ApproximateIndex:
        """The index itself, in memory. ``exact`` and ``allowed``: as for ``ApproximateIndex``.

        Faiss's reader runs no code that a file brings, but a file made to harm may well damage memory in it:
        it gets to read only what has the manifest's checksum, which shows damage, not who made it.
        Raises ``UserError`` if the file is missing or not the one that was written.
        """
        faiss = import_faiss()
        file = storage.join(self.url, INDEX_FILE)
        with _on_this_machine(file) as path:
            if storage.checksum(path) != self.manifest.sha256:
                raise UserError(f"{file}: not the file that its manifest describes; run `recgpt index` again")
            found = faiss.read_index(path)
        expected = faiss.IndexHNSW if self.manifest.kind == "hnsw" else faiss.IndexIVF
        if not isinstance(found, expected) or found.ntotal != self.manifest.num_items:
            raise UserError(
                f"{file}: holds {type(found).__name__} of {found.ntotal} items, its manifest says "
                f"{self.manifest.kind} of {self.manifest.num_items}; run `recgpt index` again"
            )
        return ApproximateIndex(found, self.manifest.kind, self.manifest.effort, exact, allowed)


def _manifest(values: Any, where: str) -> IndexManifest:
    version = values.get("schema_version") if isinstance(values, dict) else None
    if version != INDEX_SCHEMA_VERSION:
        raise UserError(
            f"{where}: index schema version {version}, this RecGPT reads {INDEX_SCHEMA_VERSION}; "
            "run `recgpt index` again"
        )
    return validated(IndexManifest, values, where, "run `recgpt index` again")


@contextmanager
def _on_this_machine(url: str) -> Iterator[str]:
    """The path of a file that faiss can read: the file itself, or a copy of one that is not local."""
    filesystem, path = storage.filesystem_and_path(url)
    if not filesystem.exists(path):
        raise UserError(f"{url}: no such file; run `recgpt index` again")
    if storage.is_local(url):
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        copy = str(Path(temporary, INDEX_FILE))
        filesystem.get_file(path, copy)
        yield copy
