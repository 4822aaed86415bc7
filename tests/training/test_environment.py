"""Where a run was trained."""

import os

import torch

from recgpt import storage
from recgpt.config import TrainSettings
from recgpt.training.environment import ENVIRONMENT_FILE, commit, write_environment


def test_versions_machine_and_commit_are_kept(tmp_path):
    write_environment(str(tmp_path), TrainSettings(seed=3), "abc+changes")
    kept = storage.read_json(str(tmp_path / ENVIRONMENT_FILE))
    assert (kept["seed"], kept["commit"], kept["workers"]) == (3, "abc+changes", 1)
    assert kept["torch"] == torch.__version__
    assert kept["cpus"] == os.cpu_count()
    assert kept["memory_bytes"] > 2**30
    assert kept["device"]


def test_the_commit_is_that_of_the_code_or_unknown(monkeypatch):
    name = commit()
    assert name is None or len(name.removesuffix("+changes")) == 40
    monkeypatch.setenv("PATH", "")
    assert commit() is None


def test_nothing_of_the_environments_variables_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("SOME_TOKEN", "planted")
    write_environment(str(tmp_path), TrainSettings(), None)
    assert "planted" not in (tmp_path / ENVIRONMENT_FILE).read_text()
