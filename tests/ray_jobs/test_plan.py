"""`recgpt plan`: the command, from constants in a file."""

import json

import numpy as np
import pytest
import yaml

from ray_jobs import plan as verb
from ray_jobs.plan import app
from ray_jobs.runtime import run_command
from recgpt.scaling.made_up_histories import write_dataset

SMALL_MACHINE = {"device": "cpu", "ranks_per_node": 1, "memory_bytes": 4.5e9}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dataset")
    return write_dataset(folder, 2_000, np.array([4, 8, 20]), num_items=1_000_000).url


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["plan", *map(str, arguments)])
    try:
        run_command(app)
    except SystemExit as stop:
        return stop.code
    return 0


def h100(folder, **changed):
    from recgpt.settings_reading import read_yaml, shipped_file

    file = folder / "mine.yaml"
    file.write_text(yaml.safe_dump(read_yaml(shipped_file("configs/machines", "h100", ".yaml")) | changed))
    return file


def test_all_that_was_asked_for_is_told(monkeypatch, capsys, tmp_path, dataset):
    told = tmp_path / "plan.json"
    options = ("--dataset", dataset, "--device", "h100", "--workers", 4, "--json", told)
    assert run(monkeypatch, *options, "--price-per-hour", 2) == 0
    output = capsys.readouterr().out
    for words in ("memory of a worker", "table_exchange", "a checkpoint", "candidate lists per hour", "USD"):
        assert words in output
    plan = json.loads(told.read_text())
    assert plan["fits"]
    assert plan["cost"] == pytest.approx(2 * 4 * plan["run_seconds"] / 3600)
    parts = {name: size for name, size in plan["memory"].items() if name != "total"}
    assert plan["memory"]["total"] == pytest.approx(sum(parts.values()))


def test_what_cannot_fit_is_refused_with_the_smallest_change(monkeypatch, capsys, tmp_path, dataset):
    device = h100(tmp_path, **SMALL_MACHINE)
    given = ("--dataset", dataset, "--device", device, "--set", "model.members=1")
    assert run(monkeypatch, *given) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "and may use 3.8; try --set checkpoint_in_background=false" in error
    change = error.partition("; try --set ")[2].split()
    assert run(monkeypatch, *given, *change) == 0


def test_this_machine_is_measured_and_kept(monkeypatch, capsys, tmp_path, dataset):
    from recgpt.machines import load_machine

    measured = load_machine("h100")
    monkeypatch.setattr("recgpt.scaling.calibration.calibrate", lambda threads, also_loaded: measured)
    kept = tmp_path / "kept.yaml"
    assert run(monkeypatch, "--dataset", dataset, "--device", verb.MEASURED, "--save-device", kept) == 0
    assert "measuring this machine" in capsys.readouterr().err
    assert load_machine(str(kept)) == measured


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("h999", "no shipped file has that name; shipped are h100, h200"),
        ("{folder}/mine.yaml", "unknown setting matrix_flop; the nearest known one is matrix_flops"),
    ],
)
def test_a_device_that_is_unknown_is_one_line(monkeypatch, capsys, tmp_path, dataset, device, message):
    h100(tmp_path, matrix_flop=1)
    assert run(monkeypatch, "--dataset", dataset, "--device", device.format(folder=tmp_path)) == 2
    assert message in capsys.readouterr().err
