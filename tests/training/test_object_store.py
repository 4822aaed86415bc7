"""A training whose dataset and run lie on an object store goes on where it was interrupted."""

import json

import pytest

from recgpt import storage
from recgpt.config import TrainSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.data.plan import read_unit
from recgpt.settings_reading import from_dict
from recgpt.training import checkpoint, run_folder
from recgpt.training.recorder import Recorder
from recgpt.training.trainer import train

SETTINGS = {
    "model": {
        "width": 8,
        "members": 1,
        "layers": 1,
        "heads": 1,
        "max_history": 6,
        "dropout": 0.2,
        "user": {"kind": "none"},
    },
    "item_table": {"placement": "sharded"},
    "data": {"tokens_per_batch": 24, "lanes": 1},
    "pretrain": {"max_epochs": 1},
    "prompt_tune": {"max_epochs": 1},
    "checkpoint_every_steps": 2,
}
HALF_WRITTEN = "step-0000009999-epoch-00009"


def train_here(dataset_url, run, stop_after=None):
    """Train; with ``stop_after``, until the process breaks off after that step."""
    dataset = HistoryDataset.open(dataset_url)
    settings = from_dict(TrainSettings, SETTINGS, "test")

    class Stops(Recorder):
        def step(self, state, figures):
            super().step(state, figures)
            if state.step == stop_after:
                raise KeyboardInterrupt

    def read(units):
        return (read_unit(dataset, unit, settings.data.split, None) for unit in units)

    recorder = Stops(run, report=lambda line: None, epoch_done=lambda metrics: None)
    train(settings, dataset, run, read, recorder)


def train_both(local_dataset, local_run, dataset, run):
    train_here(local_dataset, local_run)
    with pytest.raises(KeyboardInterrupt):
        train_here(dataset, run, stop_after=3)
    assert checkpoint.finished(run) == ["step-0000000002-epoch-00000"]
    storage.write_bytes(storage.join(run, checkpoint.FOLDER, HALF_WRITTEN, checkpoint.STATE_FILE), b"{")
    train_here(dataset, run)


def files(url):
    filesystem, path = storage.filesystem_and_path(url)
    return {name[len(path) + 1 :]: filesystem.cat_file(name) for name in filesystem.find(path)}


def validations(run):
    return [line for line in run_folder.read_metrics(run, until_step=10**9) if line["kind"] == "validation"]


@pytest.mark.distributed
def test_an_interrupted_run_ends_like_an_uninterrupted_local_one(
    write_dataset, run_ranks, tmp_path, s3_bucket
):
    histories = {user: [(user + place) % 9 for place in range(5)] for user in range(40)}
    (tmp_path / "dataset").mkdir()
    local_dataset = write_dataset(tmp_path / "dataset", histories).url
    local_run = str(tmp_path / "run")
    dataset, run = storage.join(s3_bucket, "dataset"), storage.join(s3_bucket, "run")
    for name, data in files(local_dataset).items():
        storage.write_bytes(storage.join(dataset, name), data)
    run_ranks(train_both, 1, local_dataset, local_run, dataset, run)
    model, local_model = (files(storage.join(some, "model")) for some in (run, local_run))
    assert "item_table-00000.safetensors" in model
    assert model == local_model
    metrics, local_metrics = (validations(some) for some in (run, local_run))
    assert len(metrics) == 2
    assert json.dumps(metrics) == json.dumps(local_metrics)
    assert storage.list_names(storage.join(run, checkpoint.FOLDER)) == checkpoint.finished(local_run)
