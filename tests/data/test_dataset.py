"""Opening a prepared dataset and reading its row groups."""

import dataclasses
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from recgpt.data.dataset import DatasetManifest, HistoryDataset, HistoryFile, RowGroup
from recgpt.data.vocabulary import Vocabulary
from recgpt.errors import UserError
from recgpt.storage import checksum


@pytest.fixture
def folder(tmp_path):
    """A dataset of three users in two row groups."""
    vocabulary = Vocabulary(pa.array(["a", "b"]), np.array([3, 2]))
    vocabulary.save(str(tmp_path))
    table = pa.table(
        {
            "user_id": pa.array([1, 2, 3], pa.int64()),
            "user_hash": pa.array([-5, 0, 7], pa.int64()),
            "item_indices": pa.array([[1, 2], [1], [2, 1]], pa.list_(pa.int32())),
        }
    )
    (tmp_path / "histories").mkdir()
    path = tmp_path / "histories" / "part-00000.parquet"
    pq.write_table(table, path, row_group_size=2)
    files = [HistoryFile("histories/part-00000.parquet", 3, 5, checksum(str(path)), [2, 1])]
    manifest = DatasetManifest(
        1, 3, 2, 5, False, None, "int64", "string", vocabulary.fingerprint, None, [], {}, {}, files
    )
    (tmp_path / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))
    return tmp_path


def change_manifest(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_open_reads_manifest_vocabulary_and_row_groups(folder):
    dataset = HistoryDataset.open(str(folder))
    assert (dataset.num_users, dataset.num_items) == (3, 2)
    assert dataset.vocabulary().item_ids.to_pylist() == ["a", "b"]
    file = "histories/part-00000.parquet"
    assert dataset.row_groups == [RowGroup(file, 0, 2), RowGroup(file, 1, 1)]
    assert dataset.columns == ["user_id", "user_hash", "item_indices"]
    assert dataset.files == [str(folder / file)]


def test_row_groups_are_read_alone_and_by_column(folder):
    dataset = HistoryDataset.open(str(folder))
    first, second = dataset.row_groups
    assert dataset.read_row_group(first)["item_indices"].to_pylist() == [[1, 2], [1]]
    assert dataset.read_row_group(second, ["user_id"]).to_pydict() == {"user_id": [3]}


def test_relative_path_is_made_absolute(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    assert HistoryDataset.open(folder.name).url == str(folder)


def test_survives_pickling(folder):
    dataset = HistoryDataset.open(str(folder))
    assert dataset.row_groups
    copy = pickle.loads(pickle.dumps(dataset))
    assert copy == dataset
    assert copy.row_groups == dataset.row_groups


def test_refuses_a_folder_that_is_no_dataset(tmp_path):
    with pytest.raises(UserError, match="no prepared dataset .manifest.json is missing.*recgpt prepare"):
        HistoryDataset.open(str(tmp_path))


def test_refuses_another_schema_version(folder):
    change_manifest(folder, schema_version=99)
    with pytest.raises(
        UserError, match="schema version 99, this release reads version 1; run `recgpt prepare`"
    ):
        HistoryDataset.open(str(folder))


def test_refuses_a_damaged_manifest(folder):
    change_manifest(folder, num_users="many")
    with pytest.raises(UserError, match="manifest.json: damaged, num_users"):
        HistoryDataset.open(str(folder))


def test_refuses_a_vocabulary_of_another_dataset(folder):
    Vocabulary(pa.array(["a", "c"]), np.array([3, 2])).save(str(folder))
    with pytest.raises(UserError, match="the vocabulary is not the manifest's"):
        HistoryDataset.open(str(folder)).vocabulary()


def test_names_a_part_file_that_is_missing_or_damaged(folder):
    dataset = HistoryDataset.open(str(folder))
    part = folder / "histories" / "part-00000.parquet"
    part.write_bytes(part.read_bytes()[:50])
    with pytest.raises(UserError, match="part-00000.parquet: damaged"):
        dataset.read_row_group(dataset.row_groups[0])
    part.unlink()
    with pytest.raises(UserError, match="part-00000.parquet: no such file"):
        dataset.read_row_group(dataset.row_groups[0])
