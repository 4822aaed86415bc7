"""The verb that trains for a law: what it runs, what it keeps, and what it leaves in its folder."""

import json
import re
from functools import partial
from pathlib import Path

import pytest

from ray_jobs import laws, train
from ray_jobs.runtime import run_command
from recgpt.data.dataset import HistoryDataset
from recgpt.errors import UserError
from recgpt.scaling import law_runs
from recgpt.scaling import laws as law
from tests.ray_jobs.random_model import save_random_model

EXPERIMENT = """
sizes: [{width: 8, layers: 1}, {width: 16, layers: 1}]
shares: [0.5, 1]
held_out: 0.3
budgets: [1.0e+9]
settings: {pretrain: {max_epochs: 2}}
"""
RUNS = [f"width-{width}-layers-1-share-{share}" for width in (8, 16) for share in ("0.5", "1")]


@pytest.fixture
def dataset(tmp_path, write_dataset):
    (tmp_path / "dataset").mkdir()
    histories = {f"user {user}": [(user + place) % 9 for place in range(6)] for user in range(60)}
    return write_dataset(tmp_path / "dataset", histories).url


@pytest.fixture
def experiment(tmp_path):
    (tmp_path / "mine.yaml").write_text(EXPERIMENT)
    return str(tmp_path / "mine.yaml")


@pytest.fixture
def trained(monkeypatch):
    """The runs that were trained, as (name, users, epochs); each exports random weights."""
    trained = []

    def run_train(url, output, settings):
        histories = HistoryDataset.open(url)
        trained.append((Path(output).name, histories.num_users, settings.pretrain.max_epochs))
        save_random_model(Path(output), histories, seed=len(trained))
        return {"stages": {"pretrain": {"epochs": 2}}}

    monkeypatch.setattr(laws, "start_ray", lambda min_cpus: None)
    monkeypatch.setattr(train, "run_train", run_train)
    monkeypatch.setattr(law, "fit", partial(law.fit, resamples=2))
    return trained


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["laws", *map(str, arguments)])
    run_command(laws.app)


def test_a_law_of_a_dataset(monkeypatch, capsys, tmp_path, dataset, experiment, trained):
    output = tmp_path / "law"
    run(monkeypatch, "--experiment", experiment, "--output", output, "--dataset", dataset)
    assert "## Law: L(N, D) = E + A N^-a + B D^-b" in capsys.readouterr().out
    assert [name for name, _, _ in trained] == RUNS
    users = {name: users for name, users, _ in trained}
    assert users[RUNS[0]] < users[RUNS[1]] < 60
    assert [epochs for _, _, epochs in trained] == [4, 2, 4, 2]
    runs = json.loads((output / "runs.json").read_text())
    assert list(runs) == RUNS
    assert runs[RUNS[0]]["loss"] == pytest.approx(
        law_runs.held_out_loss(str(output / "runs" / RUNS[0]), HistoryDataset.open(dataset), 0.3)
    )
    assert set(json.loads((output / "law.json").read_text())) >= {"law", "intervals", "caveats"}
    assert re.search(r"\| 8 \| 1 \| 0\.5 \|", (output / "law.md").read_text())
    assert (output / "law.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "law.svg").exists()


def test_what_was_measured_is_kept(monkeypatch, tmp_path, dataset, experiment, trained):
    measure = law_runs.held_out_loss

    def fail_at_the_third(*arguments):
        if len(trained) == 3:
            raise UserError("the machine is gone")
        return measure(*arguments)

    monkeypatch.setattr(law_runs, "held_out_loss", fail_at_the_third)
    chosen = law_runs.load_experiment(experiment)
    with pytest.raises(UserError, match="machine"):
        laws.run_laws(chosen, str(tmp_path / "law"), dataset)
    monkeypatch.setattr(law_runs, "held_out_loss", measure)
    laws.run_laws(chosen, str(tmp_path / "law"), dataset)
    assert [name for name, _, _ in trained] == [*RUNS[:3], RUNS[2], RUNS[3]]


def test_a_folder_that_is_not_a_laws_is_refused_and_kept(tmp_path, dataset, experiment, trained):
    (tmp_path / "law").mkdir()
    (tmp_path / "law" / "law.md").write_text("dear to me")
    with pytest.raises(UserError, match="not a law's"):
        laws.run_laws(law_runs.load_experiment(experiment), str(tmp_path / "law"), dataset)
    assert [path.name for path in (tmp_path / "law").iterdir()] == ["law.md"]
    assert trained == []


def test_another_experiment_or_dataset_is_another_law(tmp_path, dataset, experiment, trained):
    laws.run_laws(law_runs.load_experiment(experiment), str(tmp_path / "law"), dataset)
    with pytest.raises(UserError, match="another experiment or dataset"):
        laws.run_laws(law_runs.load_experiment("laws"), str(tmp_path / "law"), dataset)


def test_without_a_dataset_a_log_is_made_up_and_prepared_once(
    monkeypatch, tmp_path, dataset, experiment, trained
):
    prepared = []

    def run_prepare(inputs, output):
        prepared.append(inputs)
        Path(output).parent.mkdir()
        Path(dataset).rename(output)

    monkeypatch.setattr("ray_jobs.prepare.run_prepare", run_prepare)
    chosen = law_runs.load_experiment(experiment)
    for _ in range(2):
        laws.run_laws(chosen, str(tmp_path / "law"))
    (files,) = prepared
    assert all(Path(file).is_file() for file in files)
    assert [name for name, _, _ in trained] == RUNS
