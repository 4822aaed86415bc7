"""Good inputs, small and always the same: a log, a dataset, a model, an index, candidates, settings."""

import dataclasses
import gzip
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import torch

from benchmarks.made_up_model import made_up_gpt
from recgpt import storage
from recgpt.config import ModelSettings, RecallSettings, SplitSettings, UserSettings
from recgpt.data.dataset import Ancestor, DatasetManifest, HistoryDataset, HistoryFile, parquet_footer
from recgpt.data.hashing import stable_hash
from recgpt.data.vocabulary import Vocabulary, vocabulary_order
from recgpt.model.export import ModelInfo, model_fingerprint, save_model
from recgpt.model.users import KnownUsers
from recgpt.retrieval import candidates
from recgpt.retrieval.approximate_index import IndexManifest, Kind, new_index, save_index
from recgpt.schema import INDEX_SCHEMA_VERSION

NUM_USERS, NUM_ITEMS, WIDTH = 24, 12, 8
FIRST_TIME = 1_700_000_000
RECALL = RecallSettings(4, (3, 1), batch_users=8, block_items=8)
ITEMS = [f"i{number}" for number in range(NUM_ITEMS)]
HISTORIES = {
    100 + user: [(user * 5 + place * 7) % NUM_ITEMS for place in range(2 + user % 4)]
    for user in range(NUM_USERS)
}
LOG = [
    (user, ITEMS[item], FIRST_TIME + 60 * place)
    for user, items in HISTORIES.items()
    for place, item in enumerate(items)
]


def log_table() -> pa.Table:
    users, items, times = zip(*LOG, strict=True)
    return pa.table({"user_id": users, "item_id": items, "timestamp": pa.array(times, pa.int64())})


def log_files() -> dict[str, bytes]:
    """The same log in each format, by the name of the file."""
    rows = "".join(f"{user},{item},{time}\n" for user, item, time in LOG)
    table = f"user_id,item_id,timestamp\n{rows}".encode()
    sink, quoted = io.BytesIO(), io.BytesIO()
    pq.write_table(log_table(), sink, row_group_size=32)
    pyarrow.csv.write_csv(log_table(), quoted)
    fields = "".join(f"{user}\t{item}\t5\t{time}\n" for user, item, time in LOG)
    lines = "".join(
        f"{user} {' '.join(ITEMS[item] for item in items)}\n" for user, items in HISTORIES.items()
    )
    return {
        "log.parquet": sink.getvalue(),
        "log.csv": table,
        "quoted.csv": quoted.getvalue(),
        "log.csv.gz": gzip.compress(table, mtime=0),
        "log.inter": f"user_id:token\titem_id:token\trating:float\ttimestamp:float\n{fields}".encode(),
        "log.txt": lines.encode(),
    }


def write_dataset(folder: Path) -> HistoryDataset:
    """A dataset of that log: two part files of several row groups each."""
    item_ids = vocabulary_order(pa.array(ITEMS))
    counts = np.bincount([item for items in HISTORIES.values() for item in items], minlength=NUM_ITEMS)
    places = [ITEMS.index(item) for item in item_ids.to_pylist()]
    vocabulary = Vocabulary(item_ids, counts[places].astype(np.int64))
    vocabulary_sha256 = vocabulary.save(str(folder))
    index_of = {item: place + 1 for place, item in enumerate(places)}
    users = pa.array(list(HISTORIES), pa.int64())
    table = pa.table(
        {
            "user_id": users,
            "user_hash": stable_hash(users),
            "item_indices": pa.array(
                [[index_of[item] for item in items] for items in HISTORIES.values()], pa.list_(pa.int32())
            ),
            "timestamps": pa.array(
                [[FIRST_TIME + 60 * place for place in range(len(items))] for items in HISTORIES.values()],
                pa.list_(pa.int64()),
            ),
        }
    ).sort_by("user_hash")
    half = NUM_USERS // 2
    files = [_write_part(folder, number, table.slice(number * half, half)) for number in range(2)]
    manifest = DatasetManifest(
        schema_version=1,
        num_users=NUM_USERS,
        num_items=NUM_ITEMS,
        num_interactions=len(LOG),
        has_timestamps=True,
        time_unit="seconds",
        user_id_type="int64",
        item_id_type="string",
        vocabulary_fingerprint=vocabulary.fingerprint,
        time_quantiles={"0.8": FIRST_TIME + 120, "0.9": FIRST_TIME + 180},
        sources=[{"path": "log.csv", "format": "csv", "bytes": 1000}],
        settings={"format": "auto"},
        dropped={"duplicates": 0},
        files=files,
        lineage=[Ancestor("/older", "d" * 64, "v" * 64, 3, 4)],
        vocabulary_sha256=vocabulary_sha256,
    )
    storage.write_json(str(folder / "manifest.json"), dataclasses.asdict(manifest))
    return HistoryDataset.open(str(folder))


def _write_part(folder: Path, number: int, table: pa.Table) -> HistoryFile:
    path = f"histories/part-{number:05d}.parquet"
    (folder / "histories").mkdir(exist_ok=True)
    pq.write_table(table, folder / path, row_group_size=5, compression="zstd", write_page_checksum=True)
    metadata = pq.read_metadata(folder / path)
    row_groups = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    interactions = sum(map(len, table["item_indices"].to_pylist()))
    with open(folder / path, "rb") as file:
        footer = storage.checksum_of(parquet_footer(file))
    checksum = storage.checksum(str(folder / path))
    return HistoryFile(path, len(table), interactions, checksum, row_groups, footer)


def write_model(folder: Path, dataset: HistoryDataset) -> None:
    """A model of user kind `table` for that dataset, its tables in several files."""
    user = UserSettings(kind="table")
    settings = ModelSettings(width=WIDTH, members=1, layers=1, heads=2, max_history=6, user=user)
    hashes = torch.from_numpy(np.sort(stable_hash(pa.array(list(HISTORIES), pa.int64()))))
    table = torch.Generator().manual_seed(0)
    info = ModelInfo(
        dataset.num_items,
        dataset.manifest.vocabulary_fingerprint,
        settings,
        SplitSettings(),
        RECALL,
        "d" * 64,
    )
    items = torch.randn(NUM_ITEMS + 1, WIDTH, generator=table)
    users = torch.randn(NUM_USERS + 1, WIDTH, generator=table)
    state = made_up_gpt(settings).state_dict()
    save_model(str(folder), info, state, iter(items.split(7)), KnownUsers(hashes), iter(users.split(10)))


def write_index(folder: Path, model: Path, kind: Kind) -> None:
    """An approximate index of that model's items."""
    generator = torch.Generator().manual_seed(1)
    vectors = torch.randn(NUM_ITEMS, WIDTH, generator=generator).numpy()
    parameters = {"lists": 2} if kind == "ivf" else {"neighbors": 4, "build_breadth": 20}
    found = new_index(kind, WIDTH, parameters)
    found.train(vectors)
    found.add(vectors)
    fingerprint = model_fingerprint(str(model))
    manifest = IndexManifest(
        INDEX_SCHEMA_VERSION, kind, parameters, 2, 10, 0.9, 8, 1.5, NUM_ITEMS, fingerprint, ""
    )
    folder.mkdir(exist_ok=True)
    save_index(str(folder), found, manifest)


def write_candidates(folder: Path, dataset: HistoryDataset, job: str = "") -> None:
    """Right candidates for all users of that dataset: a part for each row group."""
    vocabulary = dataset.vocabulary()
    made_from = candidates.MadeFrom(
        "/model", "m" * 64, dataset.url, dataset.fingerprint, dataset.manifest.vocabulary_fingerprint
    )
    files = []
    for part, row_group in enumerate(dataset.row_groups):
        histories = dataset.read_row_group(row_group)
        lists = [_unseen(items, vocabulary) for items in histories["item_indices"].to_pylist()]
        table = pa.table(
            {
                "user_id": histories["user_id"],
                "item_ids": pa.array(lists, pa.list_(pa.string())),
                "scores": pa.array([[3.0, 2.0, 1.0, 5.0]] * len(lists), pa.list_(pa.float32())),
                "steps": pa.array([[1, 1, 1, 2]] * len(lists), pa.list_(pa.int8())),
            }
        )
        files.append(candidates.write_part(str(folder), part, table))
    manifest = candidates.manifest_of(files, RECALL, made_from)
    candidates.finish(str(folder), dataclasses.replace(manifest, job=job))


def _unseen(seen: list[int], vocabulary: Vocabulary) -> list[str]:
    items = vocabulary.item_ids.to_pylist()
    return [item for place, item in enumerate(items) if place + 1 not in seen][:4]
