"""What is held out, how it is read in bounded ranges, and what recall has to find."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recgpt.config import ModelSettings, RecallSettings, SplitSettings
from recgpt.data.dataset import DatasetManifest, HistoryDataset, HistoryFile
from recgpt.data.vocabulary import Vocabulary
from recgpt.evaluation.protocol import (
    HeldOutUsers,
    ranks_of_recall,
    read_held_out,
    recall_variants,
    training_histories,
)
from recgpt.model.gpt import GPT
from recgpt.retrieval.autoregressive import AutoregressiveRecall
from recgpt.retrieval.index import ExactIndex
from recgpt.storage import checksum

LEAVE_ONE_OUT = SplitSettings()
HISTORIES = [[1, 2, 3, 4], [5, 1], [2, 5, 1], [3], [4, 4, 2]]


@pytest.fixture
def dataset(tmp_path) -> HistoryDataset:
    """Five users in two row groups of three and two; user u's i-th interaction is at time 10 * i."""
    vocabulary = Vocabulary(pa.array(list("abcde")), np.ones(5, np.int64))
    vocabulary.save(str(tmp_path))
    table = pa.table(
        {
            "user_id": pa.array(range(5), pa.int64()),
            "user_hash": pa.array(range(100, 105), pa.int64()),
            "item_indices": pa.array(HISTORIES, pa.list_(pa.int32())),
            "timestamps": pa.array(
                [[10 * i for i in range(len(h))] for h in HISTORIES], pa.list_(pa.int64())
            ),
        }
    )
    (tmp_path / "histories").mkdir()
    path = tmp_path / "histories" / "part-00000.parquet"
    pq.write_table(table, path, row_group_size=3)
    files = [HistoryFile("histories/part-00000.parquet", 5, 13, checksum(str(path)), [3, 2])]
    manifest = DatasetManifest(
        schema_version=1,
        num_users=5,
        num_items=5,
        num_interactions=13,
        has_timestamps=True,
        time_unit="seconds",
        user_id_type="int64",
        item_id_type="string",
        vocabulary_fingerprint=vocabulary.fingerprint,
        time_quantiles={"0.8": 10, "0.9": 20},
        sources=[],
        settings={},
        dropped={},
        files=files,
    )
    (tmp_path / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))
    return HistoryDataset.open(str(tmp_path))


def read_all(dataset, split, part, max_users):
    """(history, target) of all held-out users, in order."""
    found = []
    for row_group in dataset.row_groups:
        for _, held_out in read_held_out(dataset, row_group, split, part, max_users):
            histories = np.split(held_out.item_T, held_out.offsets[1:-1])
            targets = held_out.target_B
            found += [(history.tolist(), target) for history, target in zip(histories, targets, strict=False)]
    return found


def test_ranges_cover_a_row_group_and_it_is_read_once(dataset, monkeypatch):
    reads = []
    read = HistoryDataset.read_row_group
    monkeypatch.setattr(
        HistoryDataset,
        "read_row_group",
        lambda self, group, columns: reads.append((group.index, columns)) or read(self, group, columns),
    )
    ranges = list(read_held_out(dataset, dataset.row_groups[0], LEAVE_ONE_OUT, "test", 2))
    assert [(users, held_out.user_hash_B.tolist()) for users, held_out in ranges] == [(2, [100]), (1, [102])]
    assert reads == [(0, ["user_hash", "item_indices"])]


@pytest.mark.parametrize("max_users", [1, 2, 100])
def test_leave_one_out(dataset, max_users):
    test = [([1, 2, 3], 4), ([2, 5], 1), ([4, 4], 2)]
    valid = [([1, 2], 3), ([2], 5), ([4], 4)]
    assert read_all(dataset, LEAVE_ONE_OUT, "test", max_users) == test
    assert read_all(dataset, LEAVE_ONE_OUT, "valid", max_users) == valid


def test_time_split_by_the_quantiles_of_the_dataset(dataset):
    split = SplitSettings(protocol="time")
    assert read_all(dataset, split, "test", 2) == [([1, 2], 3), ([2, 5], 1), ([4, 4], 2)]
    assert read_all(dataset, split, "valid", 2) == [([1], 2), ([5], 1), ([2], 5), ([4], 4)]


def test_training_part(dataset):
    pieces = [
        [history.tolist() for history in np.split(items, offsets[1:-1])]
        for items, offsets in training_histories(dataset, LEAVE_ONE_OUT)
    ]
    assert pieces == [[[1, 2], [5, 1], [2]], [[3], [4]]]


def test_batch_is_a_part_of_the_users():
    users = HeldOutUsers(
        np.array([1, 2, 3, 4], np.int32), np.array([0, 1, 3, 4]), np.array([7, 8, 9]), np.array([5, 6, 1])
    )
    part = users.batch(1, 10)
    assert part.item_T.tolist() == [2, 3, 4]
    assert part.offsets.tolist() == [0, 2, 3]
    assert part.user_hash_B.tolist() == [8, 9]
    assert part.target_B.tolist() == [6, 1]


def test_ranks_are_those_of_the_served_list(dataset):
    """Each target's rank is its place in what ``recommend`` returns; seen items are out of reach."""
    torch.manual_seed(0)
    gpt = GPT(ModelSettings(width=8, max_history=8)).eval()
    table_RD = torch.randn(6, 8)
    settings = RecallSettings(k=4, quotas=(3, 1))
    recall = AutoregressiveRecall(gpt, ExactIndex(table_RD, 2), settings)
    ((_, users),) = read_held_out(dataset, dataset.row_groups[0], LEAVE_ONE_OUT, "test", 5)
    served = recall.recommend(
        torch.tensor([1, 2, 3, 2, 5]), torch.tensor([0, 3, 5]), torch.tensor([100, 102])
    )
    lists = served.item_index_BK.tolist()
    assert sorted(lists[0]) == [0, 0, 4, 5]  # only two items are left
    assert ranks_of_recall(recall, users).tolist() == [lists[0].index(4) + 1, lists[1].index(1) + 1]


def test_a_range_without_held_out_users_gives_no_ranks(dataset):
    (_, users), _ = read_held_out(dataset, dataset.row_groups[1], LEAVE_ONE_OUT, "test", 1)  # the fourth user
    gpt = GPT(ModelSettings(width=8, max_history=8)).eval()
    table_RD = torch.randn(6, 8)
    recall = AutoregressiveRecall(gpt, ExactIndex(table_RD, 2), RecallSettings(k=2, quotas=(2,)))
    assert ranks_of_recall(recall, users).tolist() == []


@pytest.mark.parametrize(
    ("quotas", "two_step"), [((18, 2), (18, 2)), ((15, 5), (15, 5)), ((20,), (18, 2)), ((16, 2, 2), (18, 2))]
)
def test_variants(quotas, two_step):
    variants = recall_variants(RecallSettings(k=20, quotas=quotas))
    assert {name: settings.quotas for name, settings in variants.items()} == {
        "served": quotas,
        "one_step": (20,),
        "two_step": two_step,
    }


def test_variants_of_a_list_of_one():
    assert {settings.quotas for settings in recall_variants(RecallSettings(k=1, quotas=(1,))).values()} == {
        (1,)
    }
