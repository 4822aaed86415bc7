"""`recgpt train` whose workers, driver and machines are taken away: real processes, real signals."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.process_tree import descendants
from recgpt.data.dataset import HistoryDataset
from recgpt.data.plan import read_unit
from recgpt.settings_reading import load_train_settings, to_dict
from recgpt.training.recorder import Recorder
from recgpt.training.run_folder import read_metrics
from recgpt.training.trainer import train
from tests.ray_jobs.lost_node import newest_step

SETTINGS = """
model: {width: 8, members: 1, layers: 1, heads: 1, max_history: 8}
item_table: {placement: sharded}
data: {tokens_per_batch: 64}
pretrain: {max_epochs: 3, patience: 9}
prompt_tune: {max_epochs: 1}
checkpoint_every_steps: 5
collective_timeout_seconds: 5
"""
STEPS = 340  # of the whole run, about; some 15 seconds
NUM_ITEMS = 50


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, write_dataset) -> str:
    draw = random.Random(0)
    histories = {}
    for user in range(1200):
        first = draw.randrange(NUM_ITEMS)
        histories[user] = [(first + place) % NUM_ITEMS for place in range(draw.randrange(3, 9))]
    return write_dataset(tmp_path_factory.mktemp("dataset"), histories, row_group_users=300).url


def train_undisturbed(dataset_url, run, settings_file):
    dataset, settings = HistoryDataset.open(dataset_url), load_train_settings(settings_file)
    Path(run).mkdir(exist_ok=True)

    def read(units):
        return (read_unit(dataset, unit, settings.data.split, None) for unit in units)

    train(settings, dataset, run, read, Recorder(run, lambda line: None, lambda metrics: None))


class Driver:
    """The command, in a process of its own."""

    def __init__(self, *arguments):
        call = [sys.executable, "-m", "ray_jobs.cli", "train", *arguments]
        self.process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    def workers(self):
        """Process ids of the training workers, once both are there."""
        while True:
            assert self.process.poll() is None, self.process.stderr.read()
            found = [pid for pid in descendants() if is_worker(pid)]
            if len(found) == 2:
                return sorted(found)
            time.sleep(0.1)

    def end(self):
        """(Exit status, stderr)."""
        stderr = self.process.communicate(timeout=180)[1]
        return self.process.returncode, stderr


def is_worker(pid):
    try:
        return b"ray::RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_for_step(run, step, driver):
    while newest_step(run) < step:
        assert driver.process.poll() is None, driver.process.stderr.read()
        time.sleep(0.1)


def model_of(run):
    return {file.name: file.read_bytes() for file in Path(run, "model").iterdir()}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(600)
def test_a_run_that_loses_everything_in_turn_ends_like_an_undisturbed_one(dataset, run_ranks, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text(SETTINGS)
    run_ranks(train_undisturbed, 2, dataset, f"{tmp_path}/undisturbed", str(settings))
    run = f"{tmp_path}/disturbed"
    command = ["--dataset", dataset, "--output", run, "--config", str(settings), "--workers", "2"]

    driver = Driver(*command)
    wait_for_step(run, 20, driver)
    os.kill(driver.workers()[1], signal.SIGKILL)  # a worker is lost
    wait_for_step(run, 60, driver)
    hung = driver.workers()[0]
    os.kill(hung, signal.SIGSTOP)  # a worker hangs
    wait_for_step(run, 120, driver)
    driver.process.terminate()  # the machine is about to be taken away
    status, stderr = driver.end()
    assert status == 128 + signal.SIGTERM, stderr
    assert f"(process {hung} on " in stderr, f"the message names who hangs: {stderr}"
    assert "waited in vain for the others at step" in stderr
    assert stderr.splitlines()[-1].endswith("; the same command goes on from there")

    driver = Driver(*command)
    wait_for_step(run, newest_step(run) + 20, driver)
    driver.process.kill()  # the driver is lost
    driver.end()

    status, stderr = Driver(*command).end()
    assert status == 0, stderr
    assert model_of(run) == model_of(f"{tmp_path}/undisturbed")
    status, stderr = Driver(*command).end()
    assert status == 0
    assert "is finished already" in stderr
    assert settings_of(run)["workers"] == 2


def settings_of(run):
    return json.loads(Path(run, "settings.json").read_text())["settings"]


def test_more_than_enough_workers_may_be_missing_but_not_all():
    settings = to_dict(load_train_settings(None, ["workers=4", "min_workers=2"]))
    assert (settings["min_workers"], settings["workers"]) == (2, 4)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_machine_that_is_lost_costs_its_worker_alone(dataset, tmp_path):
    """Two nodes with a worker each; one is killed, and the run goes on with one worker."""
    settings = tmp_path / "settings.yaml"
    settings.write_text(SETTINGS)
    call = [sys.executable, "-m", "tests.ray_jobs.lost_node", dataset, str(tmp_path / "run"), str(settings)]
    result = subprocess.run(call, capture_output=True, text=True, timeout=280)
    assert result.returncode == 0, result.stdout + result.stderr
    lines = read_metrics(str(tmp_path / "run"), until_step=10**9)
    last = [line for line in lines if line["kind"] == "validation"][-1]
    assert last["stage"] == "prompt_tune"
    manifests = sorted(Path(tmp_path, "run", "checkpoints").glob("*/manifest.json"))
    workers = [json.loads(manifest.read_text())["about"]["workers"] for manifest in manifests]
    assert workers[-1] == 1
