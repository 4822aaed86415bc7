"""`recgpt evaluate` on a tiny dataset: against lists recalled by hand, its JSON, and what it refuses."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from ray_jobs.actor_pool import ActorRange
from ray_jobs.evaluate import command, measure_baselines, run_evaluate
from recgpt.config import ModelSettings, RecallSettings, SplitSettings, UserSettings
from recgpt.data.dataset import DatasetManifest, HistoryDataset, HistoryFile
from recgpt.data.vocabulary import Vocabulary
from recgpt.errors import UserError
from recgpt.evaluation.metrics import CUTOFFS
from recgpt.model.export import ModelInfo, load_model, save_model
from recgpt.model.gpt import GPT
from recgpt.retrieval.autoregressive import recommend_reference
from recgpt.storage import checksum

NUM_ITEMS = 40
METRICS = [*(f"hit_rate@{k}" for k in CUTOFFS), *(f"ndcg@{k}" for k in CUTOFFS), "mrr"]


def write_dataset(folder, histories, ids="item") -> str:
    vocabulary = Vocabulary(pa.array([f"{ids}-{i}" for i in range(NUM_ITEMS)]), np.ones(NUM_ITEMS, np.int64))
    vocabulary.save(str(folder))
    users = len(histories)
    table = pa.table(
        {
            "user_id": pa.array(range(users), pa.int64()),
            "user_hash": pa.array(range(users), pa.int64()),
            "item_indices": pa.array(histories, pa.list_(pa.int32())),
        }
    )
    (folder / "histories").mkdir()
    path = folder / "histories" / "part-00000.parquet"
    pq.write_table(table, path, row_group_size=7)
    row_groups = [min(7, users - first) for first in range(0, users, 7)]
    interactions = sum(map(len, histories))
    sha256 = checksum(str(path))
    files = [HistoryFile("histories/part-00000.parquet", users, interactions, sha256, row_groups)]
    manifest = DatasetManifest(
        schema_version=1,
        num_users=users,
        num_items=NUM_ITEMS,
        num_interactions=interactions,
        has_timestamps=False,
        time_unit=None,
        user_id_type="int64",
        item_id_type="string",
        vocabulary_fingerprint=vocabulary.fingerprint,
        time_quantiles=None,
        sources=[],
        settings={},
        dropped={},
        files=files,
    )
    (folder / "manifest.json").write_text(json.dumps(dataclasses.asdict(manifest)))
    return str(folder)


def write_model(
    folder, dataset: str, split=None, quotas=(18, 2), dataset_fingerprint="", keep_seen=False
) -> str:
    torch.manual_seed(0)
    settings = ModelSettings(width=8, members=1, max_history=8, user=UserSettings(kind="hashed", buckets=5))
    gpt = GPT(settings)
    for parameter in gpt.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    info = ModelInfo(
        NUM_ITEMS,
        HistoryDataset.open(dataset).manifest.vocabulary_fingerprint,
        settings,
        split or SplitSettings(),
        RecallSettings(k=20, quotas=quotas, keep_seen=keep_seen),
        dataset_fingerprint,
    )
    save_model(str(folder / "model"), info, gpt.state_dict(), [torch.randn(NUM_ITEMS + 1, 8)])
    return str(folder)


@pytest.fixture(scope="module")
def histories():
    generator = np.random.default_rng(0)
    return [generator.choice(np.arange(1, NUM_ITEMS + 1), n, False).tolist() for n in [1, 2, *range(3, 18)]]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, histories) -> str:
    return write_dataset(tmp_path_factory.mktemp("dataset"), histories)


@pytest.fixture(scope="module")
def run(tmp_path_factory, dataset) -> str:
    return write_model(tmp_path_factory.mktemp("run"), dataset)


def expected_metrics(run, histories, held_out, quotas, keep_seen=False, known_users=True) -> dict[str, float]:
    """From the slow twin of recall, user by user."""
    _, gpt, table_RD = load_model(run + "/model")
    if not known_users:
        gpt.user.weight.data[:] = gpt.user.weight[0].clone()
    settings = RecallSettings(k=sum(quotas), quotas=quotas, keep_seen=keep_seen)
    ranks = []
    for user, history in enumerate(histories):
        if len(history) < 3:
            continue
        seen, target = history[:-held_out], history[-held_out]
        offsets, user_hash = torch.tensor([0, len(seen)]), torch.tensor([user])
        served = recommend_reference(gpt, table_RD, settings, torch.tensor(seen), offsets, user_hash)
        items = served.item_index_BK[0].tolist()
        ranks.append(items.index(target) + 1 if target in items else np.inf)
    hits = {f"hit_rate@{k}": np.mean([rank <= k for rank in ranks]) for k in CUTOFFS}
    gains = {
        f"ndcg@{k}": np.mean([1 / np.log2(1 + rank) if rank <= k else 0 for rank in ranks]) for k in CUTOFFS
    }
    if settings.k not in CUTOFFS:
        hits[f"hit_rate@{settings.k}"] = np.mean([rank <= settings.k for rank in ranks])
    return {**hits, **gains, "mrr": np.mean([1 / rank for rank in ranks])}


@pytest.mark.ray
@pytest.mark.usefixtures("local_ray")
class TestInRay:
    def test_metrics_equal_those_of_the_slow_recall(self, run, dataset, histories, tmp_path):
        json_file = tmp_path / "deep" / "metrics.json"
        result = run_evaluate(run, dataset, json_file=str(json_file), actors=ActorRange(2, 2))
        one_step = expected_metrics(run, histories, 1, (20,))
        two_step = expected_metrics(run, histories, 1, (18, 2))
        assert {name: result["one_step"][name] for name in METRICS} == pytest.approx(one_step)
        assert {name: result["two_step"][name] for name in METRICS} == pytest.approx(two_step)
        assert {name: result[name] for name in METRICS} == pytest.approx(two_step)
        assert result["num_users"] == result["one_step"]["num_users"] == len(histories) - 2
        assert result["hit_rate@20"] > 0

        assert json.loads(json_file.read_text()) == result
        assert (result["split"], result["protocol"]) == ("test", "leave_one_out")
        assert (result["quotas"], result["one_step"]["quotas"]) == ([18, 2], [20])
        assert result["vocabulary_fingerprint"] == HistoryDataset.open(dataset).vocabulary().fingerprint
        assert list(result["baselines"]) == ["popularity", "markov"]
        assert list(result["baselines"]["markov"]) == METRICS
        assert (result["seen"], result["keep_seen"]) == ("mask", False)

        unknown = expected_metrics(run, histories, 1, (18, 2), known_users=False)
        assert {name: result["unknown_users"][name] for name in METRICS} == pytest.approx(unknown)
        assert list(result["difference"]) == ["hit_rate@20", "ndcg@10"]
        for name, interval in result["difference"].items():
            assert interval["mean"] == pytest.approx(two_step[name] - one_step[name])
            assert interval["low"] <= interval["mean"] <= interval["high"]

    def test_longer_lists_of_a_model_that_keeps_seen_items(self, dataset, histories, tmp_path):
        run = write_model(tmp_path, dataset, keep_seen=True)
        result = run_evaluate(run, dataset, k=30)
        expected = expected_metrics(run, histories, 1, (27, 3), keep_seen=True)
        assert {name: result[name] for name in expected} == pytest.approx(expected)
        assert (result["k"], result["quotas"], result["one_step"]["quotas"]) == (30, [27, 3], [30])
        assert (result["seen"], result["keep_seen"]) == ("keep", True)
        assert "hit_rate@30" in result["baselines"]["popularity"]
        assert "hit_rate@30" in result["difference"]

    def test_seen_items_at_zero_whatever_the_model_does(self, dataset, histories, tmp_path):
        run = write_model(tmp_path, dataset, keep_seen=True)
        result = run_evaluate(run, dataset, k=30, seen="zero", baselines=False)
        masked = expected_metrics(run, histories, 1, (30,))
        assert (result["seen"], result["keep_seen"]) == ("zero", False)
        assert result["one_step"]["hit_rate@30"] < masked["hit_rate@30"]
        assert result["one_step"]["hit_rate@5"] <= masked["hit_rate@5"]

    def test_the_command_prints_the_table_of_the_split(self, run, dataset, histories, capsys):
        command(run + "/model", dataset, split="valid", baselines=False)
        out = capsys.readouterr().out
        assert "valid split" in out
        assert f"{expected_metrics(run, histories, 2, (18, 2))['mrr']:.4f}" in out
        assert "Markov" not in out
        assert "served list against one step, hit_rate@20: " in out

    @pytest.mark.parametrize("same", [True, False])
    def test_another_preparation_of_the_log_is_warned_of(self, dataset, tmp_path, monkeypatch, capsys, same):
        monkeypatch.setattr("ray_jobs.evaluate.USERS_PER_STEP", 3)
        fingerprint = HistoryDataset.open(dataset).fingerprint if same else "0" * 64
        model = write_model(tmp_path, dataset, dataset_fingerprint=fingerprint)
        run_evaluate(model, dataset, baselines=False)
        assert ("another preparation of the log" in capsys.readouterr().err) != same

    def test_a_split_without_users_is_refused(self, tmp_path):
        (tmp_path / "dataset").mkdir()
        dataset = write_dataset(tmp_path / "dataset", [[1, 2], [3]])
        with pytest.raises(UserError, match="no user has an item held out in the test split"):
            run_evaluate(write_model(tmp_path / "run", dataset), dataset)


def test_baselines_use_the_training_part_alone(tmp_path):
    """Item 1 leads in training, together with 2. Item 9 stands only where it is held out."""
    dataset = write_dataset(tmp_path, [[1, 2, 3, 9], [1, 2, 3, 9], [2, 1, 4, 9], [5, 6, 7, 1]])
    metrics = measure_baselines(HistoryDataset.open(dataset), SplitSettings(), "test", RecallSettings())
    # The fourth user has to find 1, with which 2 ties. 9 has no count: it is the last of 37 items.
    assert metrics["popularity"]["hit_rate@20"] == pytest.approx(1 / 4)
    assert metrics["popularity"]["mrr"] == pytest.approx(1 / 4 * 1 / 2)


def test_a_list_without_candidates_is_refused_before_ray_starts(run, dataset):
    with pytest.raises(UserError, match="--k 0"):
        run_evaluate(run, dataset, k=0)


def test_another_vocabulary_is_refused_before_ray_starts(run, tmp_path):
    other = write_dataset(tmp_path, [[1, 2, 3]], ids="other")
    with pytest.raises(UserError, match="another vocabulary"):
        run_evaluate(run, other)


def test_a_time_split_without_timestamps_is_refused_before_ray_starts(dataset, tmp_path):
    model = write_model(tmp_path, dataset, split=SplitSettings(protocol="time"))
    with pytest.raises(UserError, match="no timestamps"):
        run_evaluate(model, dataset)


def test_a_folder_without_a_model_is_refused(dataset, tmp_path):
    with pytest.raises(UserError, match="no trained model"):
        run_evaluate(str(tmp_path), dataset)
