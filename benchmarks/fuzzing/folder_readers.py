"""Folders with a manifest: datasets, candidates and what is left of their making, models, indexes."""

import random
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa
import torch

from benchmarks.fuzzing import goods
from benchmarks.fuzzing.readers import Input, Place, Reader, spoiled_folder
from recgpt.data.dataset import HistoryDataset
from recgpt.data.formats import read_batches
from recgpt.data.sources import UnreadableFile, sources_of
from recgpt.errors import UserError
from recgpt.model.export import load_model, model_fingerprint, open_item_table
from recgpt.retrieval import candidate_job
from recgpt.retrieval.approximate_index import Kind, StoredIndex
from recgpt.retrieval.candidate_checks import check_candidates, dataset_of
from recgpt.retrieval.candidates import find_strangers, read_candidates, read_manifest, write_part
from recgpt.retrieval.index import ExactIndex
from recgpt.retrieval.one_user import read_user
from recgpt.retrieval.user_selection import all_users, find_user, hash_bounds


class Dataset(Reader):
    """A prepared dataset: as all verbs read it, and as `prepare --append` does."""

    def make_good(self, place: Place) -> None:
        place.folder.mkdir()
        goods.write_dataset(place.folder)

    def read(self, place: Place, given: Input) -> dict[str, Any]:
        dataset = HistoryDataset.open(str(place.folder))
        vocabulary = dataset.vocabulary()
        histories = [dataset.read_row_group(group).to_pydict() for group in dataset.row_groups]
        return {
            "items": vocabulary.item_ids.to_pylist(),
            "counts": vocabulary.counts.tolist(),
            "histories": histories,
            "bounds": hash_bounds(dataset).tolist(),
            "found": find_user(dataset, "101"),
            "appended to": self._appended_to(dataset, vocabulary.item_ids),
            "figures": [dataset.num_users, dataset.num_items, dataset.manifest.num_interactions],
        }

    def objection(self, value: dict[str, Any], truth: dict[str, Any], given: Input) -> str | None:
        """Who makes the checksums fit makes another dataset; what it says of itself is fit for use then."""
        differing = [key for key in truth if repr(value[key]) != repr(truth[key])]
        return None if given.sealed else f"another dataset was taken for right: {differing}"

    def _appended_to(self, dataset: HistoryDataset, item_ids: pa.Array) -> list[Any]:
        rows = []
        try:
            for source in sources_of(dataset):
                for batch in read_batches(source, item_ids=item_ids):
                    columns = (batch.user, batch.item, batch.time)
                    rows += list(zip(*(column.to_pylist() for column in columns), strict=True))
        except UnreadableFile as error:
            raise UserError(str(error)) from None
        return rows


class Candidates(Reader):
    """A folder of candidates, as `show`, other programs and `verify-candidates` read it."""

    def make_good(self, place: Place) -> None:
        place.folder.mkdir()
        dataset = self._dataset(place)
        goods.write_candidates(place.folder, dataset)

    def _dataset(self, place: Place) -> HistoryDataset:
        folder = place.root / "dataset"
        if not folder.exists():
            folder.mkdir()
            goods.write_dataset(folder)
        return HistoryDataset.open(str(folder))

    def read(self, place: Place, given: Input) -> dict[str, Any]:
        url = str(place.folder)
        manifest = read_manifest(url)
        dataset = dataset_of(manifest, str(place.root / "dataset"))
        if strangers := find_strangers(url, manifest):
            raise UserError(f"{strangers[0]} is a stranger")
        tables = pa.concat_tables(read_candidates(url)) if manifest.files else pa.table({})
        return {"tables": tables.to_pydict(), "one": read_user(url, manifest, dataset, "103")}

    def objection(self, value: dict[str, Any], truth: dict[str, Any], given: Input) -> str | None:
        """Who makes the checksums fit makes other candidates."""
        return None if given.sealed else "other candidates were taken for right"


class VerifiedCandidates(Candidates):
    """`recgpt verify-candidates`: whatever is not what was asked for is a problem."""

    def read(self, place: Place, given: Input) -> dict[str, Any]:
        url = str(place.folder)
        manifest = read_manifest(url)
        dataset = dataset_of(manifest, str(place.root / "dataset"))
        problems = [
            problem
            for some in check_candidates(url, manifest, dataset, all_users(dataset))
            for problem in some
        ]
        if problems:
            raise UserError(problems[0])
        return super().read(place, given)

    def objection(self, value: dict[str, Any], truth: dict[str, Any], given: Input) -> str | None:
        """Other lists are as right as any if they keep what was promised."""
        tables = value["tables"]
        if sorted(tables["user_id"]) != sorted(goods.HISTORIES):
            return "other users were taken for right"
        for user, items, steps in zip(tables["user_id"], tables["item_ids"], tables["steps"], strict=True):
            seen = {goods.ITEMS[item] for item in goods.HISTORIES[user]}
            unseen = set(goods.ITEMS) - seen
            if len(set(items)) != len(items) or not set(items) <= unseen or steps != [1, 1, 1, 2]:
                return f"a wrong list was taken for right: {items} {steps}"
        return super().objection(value, truth, given)


class Receipts(Reader):
    """What a run of `recgpt generate` that was killed has left: the next one goes on with it."""

    _job = candidate_job.CandidateJob("m" * 64, "d" * 64, {"k": 4}, None, None, "u" * 64)

    def make_good(self, place: Place) -> None:
        place.folder.mkdir()
        run = candidate_job.begin(str(place.folder / "out"), self._job, set(), overwrite=True)
        for part in range(3):
            table = pa.table(
                {
                    "user_id": pa.array([part]), "item_ids": [["a", "b"]],
                    "scores": pa.array([[2.0, 1.0]], pa.list_(pa.float32())),
                    "steps": pa.array([[1, 1]], pa.list_(pa.int8())),
                }
            )  # fmt: skip
            candidate_job.write_receipt(run, write_part(run.folder, part, table))

    def spoil(self, chance: random.Random, place: Place) -> Input:
        """A receipt that names another file is none."""
        return replace(super().spoil(chance, place), must_be_refused=False)

    def read(self, place: Place, given: Input) -> list[Any]:
        url, parts = str(place.folder / "out"), {f"part-{part:05d}.parquet" for part in range(3)}
        candidate_job.finished_manifest(url, self._job, check=True)
        candidate_job.clear_after(url, self._job)
        run = candidate_job.begin(url, self._job, parts, overwrite=True)
        return [repr(file) for file in run.done]

    def objection(self, value: list[Any], truth: list[Any], given: Input) -> str | None:
        """A part that is not proven is made again."""
        return None if set(value) <= set(truth) or given.sealed else "a part was taken for whole that is not"


class Model(Reader):
    """An exported model, with a table of users."""

    def make_good(self, place: Place) -> None:
        (place.root / "dataset").mkdir()
        goods.write_model(place.folder, goods.write_dataset(place.root / "dataset"))

    def read(self, place: Place, given: Input) -> dict[str, Any]:
        url = str(place.folder)
        fingerprint = model_fingerprint(url)
        info, gpt, table = load_model(url)
        mapped = open_item_table(url, info, 0, info.num_items + 1)[:]
        users = torch.tensor([0, *gpt.known_users.hashes.tolist()] if gpt.known_users else [0])
        return {
            "info": repr(info),
            "fingerprint": fingerprint,
            "table": _plain(table),
            "mapped": _plain(mapped),
            "gpt": {name: _plain(value) for name, value in gpt.state_dict().items()},
            "users": _plain(gpt.user(gpt.known_users.rows(users))) if gpt.known_users else None,
        }

    def objection(self, value: dict[str, Any], truth: dict[str, Any], given: Input) -> str | None:
        """Settings may be others, or tensors that fit, if the checksums were made to fit."""
        if value["fingerprint"] == truth["fingerprint"]:
            return "another model has the same fingerprint"
        if repr(value["table"]) != repr(value["mapped"]):
            return "the item table that is mapped is not the one that is read"
        return None if given.sealed or "model.json" in given.how else "another model was taken for right"


@dataclass
class ApproximateIndex(Reader):
    """An approximate index."""

    kind: Kind = "hnsw"

    def make_good(self, place: Place) -> None:
        (place.root / "dataset").mkdir()
        goods.write_model(place.root / "model", goods.write_dataset(place.root / "dataset"))
        goods.write_index(place.folder, place.root / "model", self.kind)

    def spoil(self, chance: random.Random, place: Place) -> Input:
        """Faiss's own file is only spoilt under its old checksum: what faiss does with others is not ours."""
        given = spoiled_folder(self.good, chance, place)
        if "index.faiss" in given.how and "index.faiss" in given.files:
            given.files = {**self.good, "index.faiss": given.files["index.faiss"]}
        return given

    def read(self, place: Place, given: Input) -> dict[str, Any]:
        stored = StoredIndex.open(str(place.folder), model_fingerprint(str(place.root / "model")))
        table = torch.randn(goods.NUM_ITEMS + 1, goods.WIDTH, generator=torch.Generator().manual_seed(3))
        index = stored.load(ExactIndex(table, 8))
        _, items = index.search(table[:3], 4)
        return {"items": items.tolist(), "manifest": repr(stored.manifest)}

    def objection(self, value: dict[str, Any], truth: dict[str, Any], given: Input) -> str | None:
        """Effort and figures of quality are the manifest's own word."""
        if any(not 1 <= item <= goods.NUM_ITEMS for row in value["items"] for item in row):
            return "an item that is none was found"
        return None if "manifest.json" in given.how else "another index was taken for right"


def _plain(tensor: torch.Tensor) -> Any:
    return [str(tensor.dtype), tensor.float().tolist()]


def folder_readers() -> list[Reader]:
    return [
        Dataset("dataset"),
        Candidates("candidates"),
        VerifiedCandidates("candidates: verify"),
        Receipts("candidates: receipts"),
        Model("exported model"),
        ApproximateIndex("index: hnsw", kind="hnsw"),
        ApproximateIndex("index: ivf", kind="ivf"),
    ]
