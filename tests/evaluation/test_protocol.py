"""What is held out, how it is read in bounded ranges, and what recall has to find."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from recgpt.config import ModelSettings, RecallSettings, SplitSettings, UserSettings
from recgpt.data.dataset import DatasetManifest, HistoryDataset, HistoryFile
from recgpt.data.vocabulary import Vocabulary
from recgpt.evaluation.metrics import rank_metrics
from recgpt.evaluation.protocol import (
    HeldOutUsers,
    ranks_of_recall,
    read_held_out,
    recall_variants,
    training_histories,
    without_users,
)
from recgpt.model.gpt import GPT
from recgpt.model.users import KnownUsers, UserVectors
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
    gpt = GPT(ModelSettings(width=8, members=1, max_history=8)).eval()
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
    gpt = GPT(ModelSettings(width=8, members=1, max_history=8)).eval()
    table_RD = torch.randn(6, 8)
    recall = AutoregressiveRecall(gpt, ExactIndex(table_RD, 2), RecallSettings(k=2, quotas=(2,)))
    assert ranks_of_recall(recall, users).tolist() == []


def users_of(*histories_and_targets) -> HeldOutUsers:
    histories, targets = zip(*histories_and_targets, strict=True)
    items = np.array([item for history in histories for item in history], np.int32)
    offsets = np.cumsum([0, *map(len, histories)])
    return HeldOutUsers(items, offsets, np.arange(len(targets)), np.array(targets))


def test_what_users_have_seen():
    users = users_of(([5, 5, 1], 5), ([2], 5), ([1, 2, 1], 3))
    num_seen, target_seen = users.seen()
    assert num_seen.tolist() == [2, 1, 2]
    assert target_seen.tolist() == [True, False, False]
    nobody = users.batch(0, 0)
    assert [len(values) for values in nobody.seen()] == [0, 0]


SCORES = {1: 3.0, 2: 2.0, 3: 2.0, 4: 0.0, 5: -1.0, 6: -2.0}
USERS = [
    ([5, 5], 2),  # items 2 and 3 tie; item 5 recurs
    ([1, 2, 1], 5),  # two distinct items of three are seen
    ([1, 2, 3], 4),  # more is seen than the model's input holds; a score of 0
    ([3, 1, 3], 3),  # the target stands in the history
    ([6, 5, 6], 6),
]


def recall_of_scores(quotas, keep_seen=False) -> AutoregressiveRecall:
    """A model whose interest vector is always (1, 0, 0, 0), and whose items have their score in front."""
    gpt = GPT(ModelSettings(width=4, members=1, max_history=2)).eval()
    gpt.final_norm.weight.data.zero_()
    gpt.final_norm.bias.data = torch.tensor([1.0, 0.0, 0.0, 0.0])
    table_RD = torch.zeros(7, 4)
    table_RD[list(SCORES), 0] = torch.tensor(list(SCORES.values()))
    settings = RecallSettings(k=sum(quotas), quotas=quotas, keep_seen=keep_seen)
    return AutoregressiveRecall(gpt, ExactIndex(table_RD, 3), settings)


def test_ranks_when_seen_items_are_masked():
    ranks = ranks_of_recall(recall_of_scores((4,)), users_of(*USERS))
    # of 1 2 3 4; 3 4 5 6; 4 5 6; 2 4 5 6; 1 2 3 4
    assert ranks.tolist() == [3, 3, 1, np.inf, np.inf]


def test_ranks_when_seen_items_are_kept():
    ranks = ranks_of_recall(recall_of_scores((4,), keep_seen=True), users_of(*USERS))
    # all of 1 2 3 4
    assert ranks.tolist() == [3, np.inf, 4, 3, np.inf]


def test_ranks_when_seen_items_are_at_zero():
    ranks = ranks_of_recall(recall_of_scores((4,)), users_of(*USERS), seen_at_zero=True)
    # Above 0; 3 + 2 is beyond the list; 1 + 3; behind 2, 4 and 1; behind 1 2 3 4 already.
    assert ranks.tolist() == [3, np.inf, 4, 4, np.inf]


def test_ranks_over_two_steps():
    users = users_of(([1], 3), ([1], 4), ([2], 4), ([1, 2], 1))
    recall = recall_of_scores((2, 2))
    # 2 3, then 4 5 twice; 1 3, then 4 5; 3 4, then 5 6
    assert ranks_of_recall(recall, users).tolist() == [2, 3, 3, np.inf]
    assert ranks_of_recall(recall, users, seen_at_zero=True).tolist() == [2, 4, 4, 4]


def test_metrics_of_the_protocol():
    ranks = ranks_of_recall(recall_of_scores((4,)), users_of(*USERS))
    metrics = rank_metrics(ranks, k=4)
    assert metrics["hit_rate@4"] == metrics["hit_rate@5"] == pytest.approx(3 / 5)
    assert metrics["ndcg@5"] == metrics["ndcg@20"] == pytest.approx((1 / 2 + 1 / 2 + 1) / 5)
    assert metrics["mrr"] == pytest.approx((1 / 3 + 1 / 3 + 1) / 5)


@pytest.mark.parametrize("kind", ["hashed", "table"])
def test_without_users_all_are_shown_as_unknown(kind):
    gpt = GPT(
        ModelSettings(width=4, members=1, max_history=4, user=UserSettings(kind=kind, buckets=3))
    ).eval()
    if kind == "table":
        gpt.known_users = KnownUsers(torch.arange(3))
        gpt.user = UserVectors(torch.randn(4, 4))
    impersonal = without_users(gpt)
    hashes = torch.arange(3)
    assert impersonal.user_rows(hashes).tolist() == [0, 0, 0]
    assert gpt.user_rows(hashes).tolist() == [1, 2, 3]
    assert impersonal.user is gpt.user
    assert impersonal.position.weight.data_ptr() == gpt.position.weight.data_ptr()

    table_RD = torch.randn(6, 4)
    history, offsets = torch.tensor([1, 2, 3] * 3), torch.tensor([0, 3, 6, 9])
    recall = AutoregressiveRecall(impersonal, ExactIndex(table_RD, 2), RecallSettings(k=2, quotas=(1, 1)))
    served = recall.recommend(history, offsets, hashes)
    torch.testing.assert_close(served.score_BK, served.score_BK[:1].expand(3, 2))


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


def test_a_personal_model_is_also_measured_on_unknown_users():
    served = RecallSettings(k=20, quotas=(15, 5))
    variants = recall_variants(served, personal=True)
    assert list(variants) == ["served", "one_step", "two_step", "unknown_users"]
    assert variants["unknown_users"] == served
