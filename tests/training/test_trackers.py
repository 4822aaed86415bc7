"""Weights & Biases and MLflow are told of a run's figures, each time as the same run."""

import json
import sys
from pathlib import Path

import pytest

from recgpt.errors import UserError
from recgpt.training import trackers
from recgpt.training.trackers import IDENTITY_FILE, TensorBoard, _identity, open_trackers

SETTINGS = {"model.width": 8, "trackers": ["mlflow"]}


def record(folder, name, figures, step):
    """What a process does that trains in the folder."""
    *_, tracker = open_trackers(str(folder), (name,), SETTINGS)
    tracker.restart(step - 1)
    tracker.record(figures, step)
    tracker.flush()
    tracker.close(finished=step == 40)


def test_a_run_that_goes_on_keeps_its_identity_and_one_that_begins_again_has_another(tmp_path):
    first = _identity(str(tmp_path))
    assert _identity(str(tmp_path)) == first
    (tmp_path / IDENTITY_FILE).unlink()
    assert _identity(str(tmp_path)) != first
    (tmp_path / IDENTITY_FILE).write_text("{}")
    with pytest.raises(UserError, match="names no id"):
        _identity(str(tmp_path))


def test_tensorboard_alone_if_nothing_else_is_asked_for(tmp_path):
    (tracker,) = open_trackers(str(tmp_path), (), SETTINGS)
    assert isinstance(tracker, TensorBoard)
    assert list(tmp_path.iterdir()) == []
    assert open_trackers("s3://bucket/run", (), SETTINGS) == []


def test_a_tracker_that_does_not_open_is_one_line(monkeypatch, tmp_path):
    def refuse(run):
        raise ConnectionError("no answer\nfrom there")

    monkeypatch.setitem(trackers.TRACKERS, "mlflow", refuse)
    with pytest.raises(UserError, match=r"trackers=\[mlflow\]: .*ConnectionError: no answer from there"):
        open_trackers(str(tmp_path), ("mlflow",), SETTINGS)


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_what_is_not_installed_is_one_line(monkeypatch, tmp_path, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"pip install 'recgpt\[{name}\]'"):
        open_trackers(str(tmp_path), (name,), SETTINGS)


def test_mlflow_has_one_run_with_settings_and_figures(monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    record(tmp_path / "run", "mlflow", {"train/loss": 3.0, "validation/ndcg@10": 0.25}, step=20)
    record(tmp_path / "run", "mlflow", {"train/loss": 2.0}, step=40)
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("recgpt")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_name == "run"
    assert run.info.status == "FINISHED"
    assert run.data.params["model.width"] == "8"
    assert run.data.metrics == {"train/loss": 2.0, "validation/ndcg_at_10": 0.25}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(20, 3.0), (40, 2.0)]


def test_wandb_is_told_and_nothing_leaves_the_machine_when_it_is_offline(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_SILENT", "true")
    record(tmp_path / "run", "wandb", {"train/loss": 3.0}, step=20)
    record(tmp_path / "run", "wandb", {"train/loss": 2.0}, step=40)
    identity = json.loads((tmp_path / "run" / IDENTITY_FILE).read_text())["id"]
    files = sorted((tmp_path / "wandb").glob(f"offline-run-*-{identity}/run-{identity}.wandb"))
    assert len(files) in (1, 2), "one per process; within a second they share a name"
    content = b"".join(file.read_bytes() for file in files)
    assert b"train/loss" in content
    assert b"model.width" in content
    for told_to_nobody in (sys.executable, str(Path.cwd()), "numpy=="):
        assert told_to_nobody.encode() not in content
