"""The verb that trains the ablations: what it runs, what it keeps, and what it leaves in its folder."""

import json
import sys
from dataclasses import replace

import pytest

from ray_jobs import ablate, evaluate, train
from ray_jobs.runtime import run_command
from recgpt import storage
from recgpt.errors import UserError
from recgpt.evaluation.metrics import metric_names
from recgpt.settings_reading import load_train_settings

SETTINGS = load_train_settings(None, ["model.user.kind=hashed", "loss.kind=full"])
# In the order of training; the second starts from the first.
RUNS = ["no-prompt-tuning", "full", "no-user-module", "the-papers-loss"]
VARIANTS = {
    "full",
    "no user module",
    "no prompt-tuning",
    "no autoregressive recall",
    "the paper's loss",
}


@pytest.fixture
def calls(monkeypatch):
    """The runs that were trained and measured, by name; nothing of that is really done."""
    calls = {"trained": [], "measured": []}

    def run_train(dataset, output, settings, *, start_from=None):
        calls["trained"].append((output, settings, start_from))

    def run_evaluate(run, dataset, *, actors, baselines):
        calls["measured"].append(run.rpartition("/")[2])
        served = dict.fromkeys(metric_names(), len(calls["measured"]) / 10)
        return {**served, "one_step": dict.fromkeys(metric_names(), 0.05)}

    monkeypatch.setattr(ablate, "start_ray", lambda min_cpus: None)
    monkeypatch.setattr(train, "run_train", run_train)
    monkeypatch.setattr(evaluate, "run_evaluate", run_evaluate)
    return calls


def test_what_is_trained_and_from_what(tmp_path, calls):
    ablate.run_ablate("dataset", str(tmp_path), SETTINGS, [7])
    runs = [f"{tmp_path}/runs/{name}-seed-7" for name in RUNS]
    assert [(output, start) for output, _, start in calls["trained"]] == [
        (runs[0], None),
        (runs[1], runs[0]),
        (runs[2], None),
        (runs[3], None),
    ]
    assert all(settings.seed == 7 for _, settings, _ in calls["trained"])


def test_what_is_written(tmp_path, calls):
    summary = ablate.run_ablate("dataset", str(tmp_path), SETTINGS, [0, 1])
    assert set(summary) == VARIANTS
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results) == VARIANTS
    assert results["full"]["1"]["ndcg@10"] == 0.6
    assert results["no autoregressive recall"]["1"]["ndcg@10"] == 0.05
    assert "| no user module | 0.5000 ± 0.2828 (+25.0 %) |" in (tmp_path / "table.md").read_text()
    assert (tmp_path / "ablation.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_measured_is_kept_and_more_seeds_are_added_on_more_workers(tmp_path, calls, monkeypatch):
    measure = evaluate.run_evaluate

    def fail_at_the_third(*arguments, **options):
        if len(calls["measured"]) == 2:
            raise UserError("the machine is gone")
        return measure(*arguments, **options)

    monkeypatch.setattr(evaluate, "run_evaluate", fail_at_the_third)
    with pytest.raises(UserError, match="machine"):
        ablate.run_ablate("dataset", str(tmp_path), SETTINGS, [0])
    assert calls["measured"] == [f"{name}-seed-0" for name in RUNS[:2]]
    monkeypatch.setattr(evaluate, "run_evaluate", measure)
    ablate.run_ablate("dataset", str(tmp_path), replace(SETTINGS, workers=2), [0, 1])
    assert calls["measured"] == [f"{name}-seed-{seed}" for seed in (0, 1) for name in RUNS]


def test_a_folder_that_is_not_an_ablations_is_refused_and_kept(tmp_path, calls):
    (tmp_path / "table.md").write_text("dear to me")
    with pytest.raises(UserError, match="not an ablation's"):
        ablate.run_ablate("dataset", str(tmp_path), SETTINGS, [0])
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


def test_other_settings_are_another_ablation(tmp_path, calls):
    ablate.run_ablate("dataset", str(tmp_path), SETTINGS, [0])
    with pytest.raises(UserError, match="other settings"):
        ablate.run_ablate(
            "dataset", str(tmp_path), replace(SETTINGS, prompts=replace(SETTINGS.prompts, last_items=2)), [0]
        )


@pytest.mark.ray
@pytest.mark.long
@pytest.mark.timeout(600)
def test_ablations_of_a_tiny_model(tmp_path, local_ray, write_dataset, monkeypatch, capfd):
    (tmp_path / "dataset").mkdir()
    histories = {f"user {user}": [f"item {(user + place) % 9}" for place in range(6)] for user in range(30)}
    dataset = write_dataset(tmp_path / "dataset", histories).url
    output = tmp_path / "ablation"
    settings = ["model.width=8", "model.layers=1", "model.max_history=8", "model.user.kind=hashed"]
    settings += ["pretrain.max_epochs=1", "prompt_tune.max_epochs=1", "recall.k=4", "recall.quotas=[3, 1]"]
    settings.append("loss.kind=binary")  # the paper's already: a training less
    variants, runs = VARIANTS - {"the paper's loss"}, RUNS[:-1]
    call = ["ablate", "--dataset", dataset, "--output", str(output), "--seeds", "1", "--set", *settings]
    monkeypatch.setattr(sys, "argv", call)
    run_command(ablate.app)
    first = capfd.readouterr()
    assert all(variant in first.out for variant in variants)
    results = json.loads((output / "results.json").read_text())
    assert set(results) == variants
    assert {path.name for path in (output / "runs").iterdir()} == {f"{name}-seed-0" for name in runs}
    started_from = storage.read_json(f"{output}/runs/full-seed-0/manifest.json")["started_from"]
    assert started_from["url"] == f"{output}/runs/no-prompt-tuning-seed-0/model"

    times = {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*")}
    run_command(ablate.app)
    assert {path: path.stat().st_mtime_ns for path in (output / "runs").rglob("*")} == times
    again = capfd.readouterr()
    assert again.out == first.out
    assert again.err.count("nothing is done") == len(runs)
    assert json.loads((output / "results.json").read_text()) == results
