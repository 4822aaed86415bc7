"""Runs side by side, read from their folders."""

import json

import pytest

from recgpt import storage
from recgpt.config import TrainSettings
from recgpt.errors import UserError
from recgpt.settings_reading import from_dict, to_dict
from recgpt.training.runs import differing, find_runs, flat, read_run


def write_run(folder, lines=(), finished=False, **told):
    folder.mkdir(parents=True)
    settings = to_dict(from_dict(TrainSettings, told, "test"))
    storage.write_json(str(folder / "settings.json"), {"settings": settings, "dataset_fingerprint": ""})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if finished:
        storage.write_json(str(folder / "manifest.json"), {})
    return str(folder)


def validation(epoch, value, stage="pretrain"):
    return {"kind": "validation", "stage": stage, "epoch": epoch, "step": 10 * epoch, "ndcg@10": value}


def test_nested_settings_by_dotted_key():
    assert flat({"a": {"b": 1, "c": {"d": [2]}}, "e": None}) == {"a.b": 1, "a.c.d": [2], "e": None}


def test_what_a_run_says_of_itself(tmp_path):
    lines = [validation(1, 0.1), validation(2, 0.3), validation(3, 0.2), validation(1, 0.25, "prompt_tune")]
    run = read_run(write_run(tmp_path / "a", lines, finished=True, seed=3, model={"width": 32}))
    assert (run.name, run.finished, run.metric) == ("a", True, "ndcg@10")
    assert run.best == {"pretrain": (0.3, 2), "prompt_tune": (0.25, 1)}
    assert run.last == {"validation": lines[-1]}
    assert run.told() == {"seed": 3, "model.width": 32}


def test_a_run_that_has_only_begun(tmp_path):
    folder = write_run(tmp_path / "a")
    (tmp_path / "a" / "metrics.jsonl").unlink()
    run = read_run(folder)
    assert (run.finished, run.last, run.best, run.told()) == (False, {}, {}, {})


def test_the_runs_of_a_folder_by_name(tmp_path):
    for name in ("b", "a"):
        write_run(tmp_path / name)
    (tmp_path / "other").mkdir()
    assert [run.name for run in find_runs(str(tmp_path))] == ["a", "b"]
    assert [run.name for run in find_runs(str(tmp_path / "a"))] == ["a"]


def test_where_no_run_is(tmp_path):
    with pytest.raises(UserError, match="no run here"):
        find_runs(str(tmp_path))
    with pytest.raises(UserError, match="no run here"):
        read_run(str(tmp_path))
    (tmp_path / "settings.json").write_text("{}")
    with pytest.raises(UserError, match="names no settings"):
        read_run(str(tmp_path))


def test_in_what_runs_differ(tmp_path):
    runs = [
        read_run(write_run(tmp_path / name, seed=seed, model={"width": 32}))
        for name, seed in (("a", 1), ("b", 2))
    ]
    assert differing(runs) == ["seed"]
