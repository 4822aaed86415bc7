"""The candidates table, its manifest, and the check of both."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recgpt.config import RecallSettings
from recgpt.data.vocabulary import Vocabulary
from recgpt.errors import UserError
from recgpt.retrieval.autoregressive import Recalled
from recgpt.retrieval.candidates import (
    CandidateFile,
    MadeFrom,
    candidates_table,
    finish,
    manifest_of,
    part_name,
    read_candidates,
    read_manifest,
    write_part,
)

INFINITY = float("inf")
MADE_FROM = MadeFrom("model", "m" * 64, "dataset", "d" * 64, "v" * 64)
RECALLED = Recalled(
    torch.tensor([[3, 1, 2], [2, 0, 0]]),
    torch.tensor([[0.5, 0.25, 1.5], [1.0, -INFINITY, -INFINITY]]),
    torch.tensor([[1, 1, 2], [1, 1, 2]], dtype=torch.int8),
)


def table_of(item_ids: pa.Array, user_ids: pa.Array) -> pa.Table:
    vocabulary = Vocabulary(item_ids, np.ones(len(item_ids), np.int64))
    return candidates_table(pa.chunked_array([user_ids]), RECALLED, vocabulary)


@pytest.fixture
def folder(tmp_path):
    """Two finished part files with one row group each; user 9 has candidates of steps 1 and 2."""
    table = table_of(pa.array(["a", "b", "c"]), pa.array([9, 7]))
    parts = [write_part(str(tmp_path), part, table.slice(row, 1)) for part, row in ((4, 1), (1, 0))]
    (tmp_path / "part-00001.parquet.partial").write_bytes(b"left by a killed run")
    finish(str(tmp_path), manifest_of(parts, RecallSettings(3, (2, 1)), MADE_FROM))
    return tmp_path


def test_rows_hold_the_logs_own_ids():
    table = table_of(pa.array(["a", "b", "c"]), pa.array([9, 7]))
    assert table.schema.equals(
        pa.schema(
            {
                "user_id": pa.int64(),
                "item_ids": pa.list_(pa.string()),
                "scores": pa.list_(pa.float32()),
                "steps": pa.list_(pa.int8()),
            }
        )
    )
    assert table.to_pylist() == [
        {"user_id": 9, "item_ids": ["c", "a", "b"], "scores": [0.5, 0.25, 1.5], "steps": [1, 1, 2]},
        {"user_id": 7, "item_ids": ["b"], "scores": [1.0], "steps": [1]},  # no other item was left
    ]


def test_integer_items_and_string_users():
    table = table_of(pa.array([30, 10, 20]), pa.array(["u9", "u7"]))
    assert table.schema.field("item_ids").type == pa.list_(pa.int64())
    assert table["user_id"].to_pylist() == ["u9", "u7"]
    assert table["item_ids"].to_pylist() == [[20, 30, 10], [10]]


def test_manifest_counts_and_names_every_file(folder):
    manifest = read_manifest(str(folder))
    assert (manifest.num_users, manifest.num_candidates, manifest.k, manifest.quotas) == (2, 4, 3, [2, 1])
    assert [(file.path, file.rows, file.candidates) for file in manifest.files] == [
        ("part-00001.parquet", 1, 3),
        ("part-00004.parquet", 1, 1),
    ]
    assert manifest.made_from == MADE_FROM


def test_parts_stand_in_the_order_of_their_numbers():
    numbers = [0, 7, 99_999, 100_000, 100_001, 1_000_000]
    files = [CandidateFile(part_name(number), 1, 1, "s") for number in reversed(numbers)]
    manifest = manifest_of(files, RecallSettings(3, (2, 1)), MADE_FROM)
    assert [file.path for file in manifest.files] == [part_name(number) for number in numbers]


def test_the_folder_reads_as_plain_parquet(folder):
    assert pq.read_table(folder)["user_id"].to_pylist() == [9, 7]


def test_parts_are_read_one_by_one_in_order(folder):
    assert [table["user_id"].to_pylist() for table in read_candidates(str(folder))] == [[9], [7]]


def test_the_same_table_is_the_same_file(tmp_path):
    table = table_of(pa.array(["a", "b", "c"]), pa.array([9, 7]))
    assert write_part(str(tmp_path), 0, table) == write_part(str(tmp_path), 0, table)


def test_changed_missing_and_added_files_are_noticed(folder):
    part = folder / "part-00004.parquet"
    original = part.read_bytes()
    part.write_bytes(original[:-1] + b"X")
    with pytest.raises(UserError, match="part-00004.parquet: not the file that was written"):
        list(read_candidates(str(folder)))
    part.unlink()
    with pytest.raises(UserError, match="part-00004.parquet: the manifest names this file but it is missing"):
        list(read_candidates(str(folder)))
    part.write_bytes(original)
    (folder / "part-00007.parquet").write_bytes(original)
    with pytest.raises(UserError, match="part-00007.parquet is not in the manifest"):
        list(read_candidates(str(folder)))


@pytest.mark.parametrize("name", ["_SUCCESS", "_manifest.json"])
def test_unfinished_folders_are_refused(folder, name):
    (folder / name).unlink()
    with pytest.raises(UserError, match=f"no finished candidates .{name} is missing"):
        list(read_candidates(str(folder)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema_version": 99}, "schema version 99, this release reads version 1"),
        ({"k": "many"}, "damaged, k: "),
    ],
)
def test_manifests_that_cannot_be_read(folder, change, message):
    path = folder / "_manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        list(read_candidates(str(folder)))
