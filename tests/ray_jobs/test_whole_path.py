"""The whole path on a tiny log: users walk round a circle of twelve months; recall must walk on."""

import json
import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ray_jobs.evaluate import run_evaluate
from ray_jobs.generate import run_generate
from ray_jobs.prepare import run_prepare
from ray_jobs.train import run_train
from recgpt.config import TrainSettings
from recgpt.errors import UserError
from recgpt.settings_reading import from_dict

MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
# Each user starts somewhere and walks on for seven months; the log's rows come in no order.
WALKS = {f"user-{start:02}-{copy}": start for start in range(12) for copy in range(4)}
LENGTH = 7

SETTINGS = {
    "workers": 2,
    "model": {
        "width": 16,
        "members": 1,
        "layers": 1,
        "heads": 2,
        "max_history": 8,
        "dropout": 0.0,
        "user": {"kind": "none"},
    },
    "data": {"tokens_per_batch": 64, "lanes": 2},
    "pretrain": {"max_epochs": 20, "patience": 20, "optimizer": {"learning_rate": 0.02, "warmup_steps": 10}},
    "prompt_tune": {"max_epochs": 2, "optimizer": {"learning_rate": 0.002, "warmup_steps": 0}},
    "validation": {"every_epochs": 10},
    "recall": {"k": 4, "quotas": [3, 1]},
}


def walk(start: int, length: int) -> list[str]:
    return [MONTHS[(start + place) % 12] for place in range(length)]


@pytest.fixture(scope="module")
def paths(tmp_path_factory, local_ray):
    """The folders that prepare, train and generate wrote."""
    folder = tmp_path_factory.mktemp("path")
    events = [
        (user, item, 1_700_000_000 + 86_400 * day)
        for user, start in WALKS.items()
        for day, item in enumerate(walk(start, LENGTH))
    ]
    random.Random(0).shuffle(events)
    lines = [",".join(map(str, event)) for event in events]
    (folder / "log.csv").write_text("\n".join(["user_id,item_id,timestamp", *lines]) + "\n")
    names = ("log.csv", "dataset", "run", "candidates")
    log, dataset, run, candidates = (str(folder / name) for name in names)
    run_prepare([log], dataset)
    run_train(dataset, run, from_dict(TrainSettings, SETTINGS, "test"))
    run_generate(run, dataset, candidates)
    return dataset, run, candidates


@pytest.mark.ray
@pytest.mark.slow
def test_candidates_row_by_row(paths):
    _, _, candidates = paths
    rows = {row["user_id"]: row for row in pq.read_table(candidates).to_pylist()}
    assert sorted(rows) == sorted(WALKS)
    for user, start in WALKS.items():
        row = rows[user]
        seen = walk(start, LENGTH)
        assert len(set(row["item_ids"])) == 4
        assert not set(row["item_ids"]) & set(seen)
        assert row["item_ids"][0] == MONTHS[(start + LENGTH) % 12], "the first candidate is the next month"
        assert row["steps"] == [1, 1, 1, 2]
        assert row["scores"][:3] == sorted(row["scores"][:3], reverse=True)


@pytest.mark.ray
@pytest.mark.slow
def test_evaluate_finds_the_next_month(paths, tmp_path):
    dataset, run, _ = paths
    result = run_evaluate(run, dataset, json_file=str(tmp_path / "metrics.json"))
    assert json.loads((tmp_path / "metrics.json").read_text()) == result
    assert result["num_users"] == len(WALKS)
    assert result["hit_rate@5"] == 1.0
    assert result["ndcg@10"] > 0.95
    assert result["two_step"]["quotas"] == [3, 1]
    assert set(result["one_step"]) >= {
        "hit_rate@5",
        "hit_rate@10",
        "hit_rate@20",
        "ndcg@5",
        "ndcg@10",
        "ndcg@20",
        "mrr",
    }


@pytest.mark.ray
@pytest.mark.slow
def test_what_the_run_folder_holds(paths):
    run = Path(paths[1])
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["stages"]["pretrain"]["epochs"] == 20
    assert manifest["stages"]["prompt_tune"]["ndcg@10"] > 0.95
    assert json.loads((run / "settings.json").read_text())["settings"]["model"]["width"] == 16
    kinds = {json.loads(line)["kind"] for line in (run / "metrics.jsonl").read_text().splitlines()}
    assert kinds == {"train", "validation", "checkpoint"}
    assert list((run / "tensorboard").glob("events.*"))
    assert len(list((run / "checkpoints").iterdir())) in (2, 3)


@pytest.mark.ray
@pytest.mark.slow
def test_a_finished_run_is_not_replaced_unasked(paths):
    dataset, run, _ = paths
    before = Path(run, "manifest.json").read_text()
    assert run_train(dataset, run, from_dict(TrainSettings, SETTINGS, "test")) == json.loads(before)
    with pytest.raises(UserError, match="--restart"):
        run_train(dataset, run, from_dict(TrainSettings, {**SETTINGS, "seed": 9}, "test"))
    assert Path(run, "manifest.json").read_text() == before
