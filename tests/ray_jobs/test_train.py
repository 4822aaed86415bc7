"""`recgpt train`: histories arrive in the plan's order, and bad input is refused in one line."""

import json
import subprocess
import sys

import pytest

from ray_jobs.train import _stream
from ray_jobs.train_board import validation_text
from recgpt.config import SplitSettings
from recgpt.data.plan import epoch_units, read_unit


@pytest.fixture(scope="module")
def dataset(write_dataset, tmp_path_factory):
    histories = {user: [user % 7, (user + 1) % 7, (user + 3) % 7, user % 5] for user in range(100)}
    return write_dataset(tmp_path_factory.mktemp("dataset"), histories, row_group_users=8)


def run_command_line(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "ray_jobs.train", *arguments], capture_output=True, text=True, timeout=120
    )


@pytest.mark.ray
def test_ray_data_streams_what_the_library_reads(dataset, local_ray):
    rows = [group.rows for group in dataset.row_groups]
    units = epoch_units(rows, [1, 3], 4, 10, shuffle=(0, 5), consumed=[0, 2, 0, 0])
    assert len(units) > 4
    split = SplitSettings()
    streamed = [row for table in _stream(dataset, units, split, None) for row in table.to_pylist()]
    read = [row for unit in units for row in read_unit(dataset, unit, split, None).to_pylist()]
    assert streamed == read
    assert list(_stream(dataset, [], split, None)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "model.widht=3"], "unknown setting model.widht; the nearest known one is model.width"),
        (["--set", "workers=9"], "data.lanes=4 is less than workers=9"),
        (["--set", "deepspeed=zero9"], "zero9: no such file"),
        (["--config", "nowhere"], "nowhere: no such file"),
        (["--stages", "pretrain,tune"], "stages"),
        (["--start-from", "nowhere"], "nowhere: no trained model here"),
        (["--set", "data.split.protocol=time"], "no timestamps"),
    ],
)
def test_bad_input_is_one_line_and_status_2(dataset, tmp_path, arguments, message):
    run = tmp_path / "run"
    result = run_command_line("--dataset", dataset.url, "--output", str(run), *arguments)
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not run.exists()


def test_an_unfinished_run_with_other_settings_is_refused(dataset, tmp_path):
    from recgpt.config import TrainSettings
    from recgpt.settings_reading import to_dict

    settings = to_dict(TrainSettings())
    settings["model"]["width"] = 32
    identity = {"settings": settings, "dataset_fingerprint": dataset.fingerprint}
    (tmp_path / "settings.json").write_text(json.dumps(identity))
    (tmp_path / "checkpoints" / "step-0000000001-epoch-00000").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-0000000001-epoch-00000" / "manifest.json").write_text("{}")
    result = run_command_line("--dataset", dataset.url, "--output", str(tmp_path))
    assert result.returncode == 2
    assert "holds a run with another settings.model.width" in result.stderr


def test_validation_line():
    line = {
        "stage": "pretrain",
        "epoch": 3,
        "step": 12,
        "ndcg@10": 0.12345,
        "hit_rate@10": 0.2,
        "num_users": 9.0,
    }
    assert validation_text(line) == "pretrain after epoch 3, step 12: ndcg@10 0.1235 hit_rate@10 0.2000"
