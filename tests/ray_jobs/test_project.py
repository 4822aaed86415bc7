"""`recgpt project`: what it leaves in its folder, and what it refuses."""

import json

import pytest
import yaml

from ray_jobs.project import app
from ray_jobs.runtime import run_command
from recgpt.scaling import projection
from recgpt.settings_reading import read_yaml, shipped_file


@pytest.fixture(autouse=True)
def few_points(monkeypatch):
    """Two numbers of GPUs and of items: more say nothing more of the command."""
    whole = projection.project
    monkeypatch.setattr(
        projection, "project", lambda settings, machine: whole(settings, machine, (8, 1024), (10**7, 10**9))
    )


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["project", *map(str, arguments)])
    try:
        run_command(app)
    except SystemExit as stop:
        return stop.code
    return 0


def test_a_folder_of_tables_json_and_plots(monkeypatch, capsys, tmp_path):
    output = tmp_path / "projection"
    options = (
        "--device",
        "h200",
        "--output",
        output,
        "--set",
        "model.width=64",
        "data.tokens_per_batch=4096",
    )
    assert run(monkeypatch, *options) == 0
    assert projection.NOTE in capsys.readouterr().out
    files = {"projection.md", "projection.json", "curves.png", "curves.svg", "choices.png", "choices.svg"}
    assert {file.name for file in output.iterdir()} == files
    told = json.loads((output / "projection.json").read_text())
    assert told["settings"]["model"]["width"] == 64
    assert told["tokens_per_gpu"] == 4096
    assert [point["gpus"] for point in told["points"]] == [8, 1024, 8, 1024]
    assert "# Projection for NVIDIA H200" in (output / "projection.md").read_text()
    assert run(monkeypatch, *options) == 2
    assert "already holds something" in capsys.readouterr().err


def test_a_gpu_too_small_for_anything_is_one_line(monkeypatch, capsys, tmp_path):
    device = tmp_path / "small.yaml"
    h100 = read_yaml(shipped_file("configs/machines", "h100", ".yaml"))
    device.write_text(yaml.safe_dump(h100 | {"memory_bytes": 2e9}))
    assert run(monkeypatch, "--device", device, "--output", tmp_path / "none") == 2
    assert "no table fits on any number of GPUs; try a smaller" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()
