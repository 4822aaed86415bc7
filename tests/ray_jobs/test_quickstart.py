"""The quickstart: which stages run, which are kept, and what counts as beating the baselines."""

import pytest

from ray_jobs import evaluate, generate, prepare, quickstart, train
from recgpt import storage
from recgpt.config import TrainSettings
from recgpt.data.synthetic import SyntheticSettings
from recgpt.errors import UserError

LOG = SyntheticSettings(num_users=20, num_items=30, mean_length=5, num_clusters=2)
METRICS = {"hit_rate@10": 0.3, "ndcg@10": 0.2}


@pytest.fixture
def stages_run(monkeypatch):
    """The names of the stages that ran; each writes just what shows it to be finished."""
    names = []

    def stage(name, file):
        def run(*arguments, **options):
            output = options.get("json_file") or storage.join(arguments[place[name]], file)
            assert not storage.exists(output), f"{name} would run into {output}"
            names.append(name)
            storage.write_json(output, METRICS)

        return run

    place = {"prepare": 1, "train": 1, "generate": 2, "evaluate": 1}
    monkeypatch.setattr(quickstart, "start_ray", lambda cpus: names.append("ray"))
    monkeypatch.setattr(prepare, "run_prepare", stage("prepare", "manifest.json"))
    monkeypatch.setattr(train, "run_train", stage("train", "manifest.json"))
    monkeypatch.setattr(generate, "run_generate", stage("generate", "_SUCCESS"))
    monkeypatch.setattr(evaluate, "run_evaluate", stage("evaluate", ""))
    return names


def run(folder, settings=None):
    return quickstart.run_quickstart(str(folder), LOG, settings or TrainSettings())


def test_all_stages_run_in_order_with_one_ray(tmp_path, stages_run):
    assert run(tmp_path / "q") == METRICS
    assert stages_run == ["ray", "prepare", "train", "generate", "evaluate"]
    assert len(list((tmp_path / "q" / "log").glob("*.parquet"))) == quickstart.LOG_FILES


def test_the_command_runs_twice_in_the_same_folder(tmp_path, stages_run, monkeypatch, capsys):
    """Its default output is a folder of the name of its settings."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("recgpt.data.synthetic.SyntheticSettings", lambda: LOG)
    monkeypatch.setattr(quickstart, "_show_examples", lambda console, output: None)
    baselines = {name: dict.fromkeys(quickstart.SHOWN_METRICS, 0.1) for name in ("popularity", "markov")}
    monkeypatch.setitem(METRICS, "baselines", baselines)
    monkeypatch.setitem(METRICS, "mrr", 0.1)
    monkeypatch.setitem(METRICS, "num_users", 20)
    quickstart.command()
    assert stages_run == ["ray", "prepare", "train", "generate", "evaluate"]
    quickstart.command()
    assert stages_run == ["ray", "prepare", "train", "generate", "evaluate"]
    assert capsys.readouterr().out.count("kept from an earlier run") == 5


def test_a_second_run_keeps_everything_and_starts_no_ray(tmp_path, stages_run):
    run(tmp_path)
    stages_run.clear()
    assert run(tmp_path) == METRICS
    assert stages_run == []


def test_a_missing_stage_and_what_was_made_from_it_run_again(tmp_path, stages_run):
    run(tmp_path)
    stages_run.clear()
    (tmp_path / "run" / "manifest.json").unlink()
    run(tmp_path)
    assert stages_run == ["ray", "train", "generate", "evaluate"]


def test_other_settings_make_everything_anew(tmp_path, stages_run):
    run(tmp_path)
    stages_run.clear()
    run(tmp_path, TrainSettings(seed=1))
    assert stages_run == ["ray", "prepare", "train", "generate", "evaluate"]


def test_a_folder_that_is_not_a_quickstarts_is_refused_and_kept(tmp_path, stages_run):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "weights").write_text("dear to me")
    with pytest.raises(UserError, match="not a quickstart's"):
        run(tmp_path)
    assert stages_run == []
    assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == ["weights"]


@pytest.mark.parametrize(
    ("popularity", "markov", "ahead"),
    [
        ((0.1, 0.1), (0.2, 0.1), []),
        ((0.1, 0.1), (0.3, 0.1), ["markov at hit_rate@10"]),
        ((0.4, 0.1), (0.2, 0.3), ["popularity at hit_rate@10", "markov at ndcg@10"]),
    ],
)
def test_the_model_must_beat_both_baselines_at_both_metrics(popularity, markov, ahead):
    baselines = {
        "popularity": dict(zip(quickstart.MUST_WIN, popularity, strict=True)),
        "markov": dict(zip(quickstart.MUST_WIN, markov, strict=True)),
    }
    assert quickstart.rivals_ahead({**METRICS, "baselines": baselines}) == ahead
