"""Ray's metrics of a training, and the dashboard that shows them."""

import json
import re
import time
import urllib.request
from dataclasses import fields

import pytest

from ray_jobs.train_board import TrainBoard
from ray_jobs.train_gauges import TrainGauges, gauge_name
from recgpt.config import TrainSettings
from recgpt.evaluation.metrics import metric_names
from recgpt.training.checkpoint_writer import Written
from recgpt.training.recorder import LOG_EVERY_STEPS, Recorder
from recgpt.training.state import TrainingState
from tests.conftest import REPOSITORY
from tests.training.test_recorder import figures_of


@pytest.fixture
def known(tmp_path) -> set[str]:
    """All gauges that a training can set."""
    lines = []
    recorder = Recorder(str(tmp_path), lines.append, lambda metrics: None)
    recorder.begin(TrainSettings(), num_items=10)
    recorder.restart(0)
    figures = figures_of(3, 1, loss=8.0)
    figures.table_learning_rate = figures.table_gradient_norm = 1.0
    recorder.step(TrainingState("pretrain", step=LOG_EVERY_STEPS), figures)
    (line,) = lines
    names = {gauge_name("train", name) for name in (*line, "model_flops_utilization")}
    names |= {gauge_name("checkpoint", field.name) for field in fields(Written)}
    return names | {gauge_name("validation", name) for name in metric_names(20)}


def test_the_dashboard_shows_what_there_is_and_most_of_it(known):
    dashboard = (REPOSITORY / "docs" / "grafana.json").read_text()
    shown = set(re.findall(r"ray_(recgpt_\w+)", dashboard))
    assert shown <= known
    left_out = {"recgpt_train_users", "recgpt_train_epoch", "recgpt_train_seconds", "recgpt_train_kind"}
    train = {name for name in known if name.startswith("recgpt_train_")} - left_out
    assert train - shown == {"recgpt_train_stage", "recgpt_train_tokens_per_second"}
    panels = json.loads(dashboard)["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)


@pytest.mark.ray
def test_what_a_training_tells_stands_at_rays_metrics_endpoint(local_ray):
    import ray

    board = ray.remote(TrainBoard).options(num_cpus=0).remote("mine")
    ray.get(board.show.remote({"kind": "train", "stage": "pretrain", "epoch": 1, "step": 20, "loss": 1234.5}))
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    ours = re.compile(r"^ray_recgpt_train_loss\{(.*)\} 1234\.5$", re.MULTILINE)
    deadline = time.monotonic() + 60
    while not (found := ours.search(metrics := urllib.request.urlopen(url, timeout=10).read().decode())):
        assert time.monotonic() < deadline, metrics
        time.sleep(0.2)  # workers report every few seconds
    assert 'run="mine"' in found[1]
    assert 'stage="pretrain"' in found[1]
    ray.kill(board)


def test_a_line_sets_the_gauges_of_its_numbers(monkeypatch):
    gauges = {}

    class Gauge:
        def __init__(self, name, description, tag_keys):
            assert tag_keys == ("run", "stage")
            self.name = name

        def set(self, value, tags):
            gauges[self.name] = value, tags

    monkeypatch.setattr("ray.util.metrics.Gauge", Gauge)
    board = TrainGauges("mine")
    board.show(
        {"kind": "validation", "stage": "pretrain", "epoch": 1, "step": 9, "ndcg@10": 0.5, "best": None}
    )
    board.show({"kind": "warning", "text": "beware"})
    tags = {"run": "mine", "stage": "pretrain"}
    assert gauges == {
        "recgpt_validation_epoch": (1, tags),
        "recgpt_validation_step": (9, tags),
        "recgpt_validation_ndcg_at_10": (0.5, tags),
    }
