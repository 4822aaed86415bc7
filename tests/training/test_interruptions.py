"""What happens to a training on real ranks that is stopped, moved, poisoned with NaN, or left waiting."""

import os
import random
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from recgpt.config import TrainSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.data.plan import epoch_units, read_unit
from recgpt.distributed import collectives
from recgpt.errors import Stopped, UserError
from recgpt.settings_reading import from_dict
from recgpt.training import checkpoint
from recgpt.training import recorder as recorder_module
from recgpt.training.model import NextItemModel
from recgpt.training.recorder import Recorder
from recgpt.training.run_folder import read_metrics
from recgpt.training.trainer import Trainer, train

NUM_ITEMS = 30
SETTINGS = {
    "model": {"width": 8, "members": 1, "layers": 1, "heads": 2, "max_history": 6, "dropout": 0.3},
    "item_table": {"placement": "sharded"},
    "data": {"tokens_per_batch": 24, "lanes": 4, "shuffle_window_users": 16},
    "pretrain": {"max_epochs": 2, "optimizer": {"learning_rate": 0.01, "warmup_steps": 5}},
    "prompt_tune": {"max_epochs": 1, "optimizer": {"learning_rate": 0.01}},
    "keep_checkpoints": 3,
}
STOP_AFTER = 7
FORWARD = NextItemModel.forward


@pytest.fixture(scope="module")
def dataset(tmp_path_factory, write_dataset) -> str:
    draw = random.Random(0)
    histories = {
        user: [(draw.randrange(NUM_ITEMS) + place) % NUM_ITEMS for place in range(draw.randrange(1, 12))]
        for user in range(60)
    }
    histories[60] = list(range(NUM_ITEMS))
    return write_dataset(tmp_path_factory.mktemp("dataset"), histories, row_group_users=9).url


def train_here(dataset_url, run, stop_wanted=lambda: False, read=None, **overrides):
    """Returns the lines that were reported."""
    recorder_module.LOG_EVERY_STEPS = 1
    dataset = HistoryDataset.open(dataset_url)
    settings = from_dict(TrainSettings, {**SETTINGS, **overrides}, "test")

    def read_all(units):
        return (read_unit(dataset, unit, settings.data.split, None) for unit in units)

    Path(run).mkdir(exist_ok=True)
    lines = []
    recorder = Recorder(run, lines.append, lambda metrics: None)
    train(settings, dataset, run, read or read_all, recorder, stop_wanted=stop_wanted)
    return lines


def losses_of(run):
    lines = read_metrics(run, until_step=10**9)
    return {line["step"]: line["loss"] for line in lines if line["kind"] == "train"}


def tensors_of(run, name):
    """Everything in a checkpoint, tables whole."""
    parts = {}
    for entry in checkpoint.read_manifest(run, name).files:
        if entry.file.endswith("safetensors"):
            loaded = safetensors.torch.load_file(Path(run, checkpoint.FOLDER, name, entry.file))
            for key, tensor in loaded.items():
                parts.setdefault((entry.table or "dense", key), []).append(tensor)
    return {
        (table, key): tensors[0] if table == "dense" else torch.cat(tensors)
        for (table, key), tensors in parts.items()
    }


# Stopped


class AskedToStop:
    """Says yes on one rank, after some steps."""

    def __init__(self, after, rank):
        self.asked, self.after, self.rank = 0, after, rank

    def __call__(self):
        self.asked += 1
        return self.asked > self.after and collectives.rank() == self.rank


def stop_and_go_on(dataset_url, folder):
    train_here(dataset_url, f"{folder}/whole")
    run = f"{folder}/stopped"
    for _ in range(4):  # in both stages
        with pytest.raises(Stopped, match="stopped at step .* checkpoint step-"):
            train_here(dataset_url, run, AskedToStop(STOP_AFTER, rank=1))
    train_here(dataset_url, run)


@pytest.mark.distributed
def test_asked_on_one_rank_all_stop_with_a_checkpoint_and_nothing_is_lost(dataset, run_ranks, tmp_path):
    run_ranks(stop_and_go_on, 2, dataset, str(tmp_path))
    assert losses_of(f"{tmp_path}/stopped") == losses_of(f"{tmp_path}/whole")
    models = [
        {file.name: file.read_bytes() for file in Path(tmp_path, run, "model").iterdir()}
        for run in ("stopped", "whole")
    ]
    assert models[0] == models[1]


# Moved to another number of workers


def stop_in_the_first_epoch(dataset_url, run, order):
    note_who_is_learned(order)
    with pytest.raises(Stopped):
        train_here(dataset_url, run, AskedToStop(STOP_AFTER, rank=0))


def stop_at_once(dataset_url, run, order):
    """Resumed and stopped before a step: what is written again must be what was read."""
    with pytest.raises(Stopped):
        train_here(dataset_url, run, AskedToStop(0, rank=0))
    note_who_is_learned(order)
    train_here(dataset_url, run, stages=["pretrain"], pretrain={**SETTINGS["pretrain"], "max_epochs": 1})


def note_who_is_learned(order):
    """Write down whose histories each step takes, on every rank."""
    optimize = Trainer._optimize

    def noting(trainer, packed, *counts):
        with Path(f"{order}-{collectives.rank()}").open("a") as file:
            file.writelines(f"{user}\n" for user in packed.user_hash_B.tolist())
        return optimize(trainer, packed, *counts)

    Trainer._optimize = noting


@pytest.mark.distributed
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 4), (4, 3)])
def test_another_number_of_workers_has_the_same_state(dataset, run_ranks, tmp_path, before, after):
    run, order = str(tmp_path / "run"), str(tmp_path / "users")
    run_ranks(stop_in_the_first_epoch, before, dataset, run, order)
    name = checkpoint.newest(run)
    assert name == checkpoint.checkpoint_name(STOP_AFTER, 0)
    expected = tensors_of(run, name)
    assert {table for table, _ in expected} == {"dense", "item_table"}
    state = checkpoint.load_state(run, name)
    run_ranks(stop_at_once, after, dataset, run, order)
    assert checkpoint.read_manifest(run, name).about["workers"] == after
    assert checkpoint.load_state(run, name) == state
    found = tensors_of(run, name)
    assert found.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key
    users = [int(user) for file in tmp_path.glob("users-*") for user in file.read_text().split()]
    assert len(users) == len(set(users)), "a history was seen twice in the epoch"
    assert users_with_targets(dataset) <= set(users), "a history was left out"


def users_with_targets(dataset_url):
    histories, settings = HistoryDataset.open(dataset_url), from_dict(TrainSettings, SETTINGS, "test")
    units = epoch_units([group.rows for group in histories.row_groups], [0], 1, 100, (0, 0), [0])
    rows = [
        row for unit in units for row in read_unit(histories, unit, settings.data.split, None).to_pylist()
    ]
    return {row["user_hash"] for row in rows if len(row["item_indices"]) > 1}


# Not a number


def poison(steps, rank):
    """From now on the loss of these calls of the model, counted from 1, is NaN on one rank."""
    calls = 0

    def poisoned(model, batch):
        nonlocal calls
        loss = FORWARD(model, batch)
        calls += model.training
        return loss * float("nan") if calls in steps and collectives.rank() == rank else loss

    NextItemModel.forward = poisoned


def leave_out_a_step(dataset_url, folder):
    """The third step changes nothing, on no rank: what is in the checkpoints around it is the same."""
    for zero in ("zero1", "zero2", "zero3"):
        for placement in ("sharded", "replicated"):
            run = f"{folder}/{zero}-{placement}"
            settings = {
                "item_table": {"placement": placement},
                "deepspeed": zero,
                "stages": ["pretrain"],
                "checkpoint_every_steps": 1,
                "keep_checkpoints": 100,
                "not_finite": "skip",
            }
            poison({3}, rank=1)
            lines = train_here(dataset_url, run, **settings)
            if collectives.rank() == 0:
                (warning,) = [line["text"] for line in lines if line["kind"] == "warning"]
                assert "a step was left out" in warning
                assert "step 3 of the run (pretrain, epoch 1; histories: " in warning


@pytest.mark.distributed
def test_a_step_that_is_not_finite_is_left_out_on_all_ranks(dataset, run_ranks, tmp_path):
    run_ranks(leave_out_a_step, 2, dataset, str(tmp_path))
    runs = sorted(tmp_path.glob("zero*-*"))
    assert len(runs) == 6
    for run in runs:
        two, three, four = (checkpoint.checkpoint_name(step, 0) for step in (2, 3, 4))
        before, after, later = (tensors_of(str(run), name) for name in (two, three, four))
        for key, tensor in before.items():
            assert torch.equal(after[key], tensor), f"{run.name}: {key}"
        assert any(not torch.equal(later[key], after[key]) for key in after), "the next step learns"
        assert all(tensor.isfinite().all() for tensor in later.values())
        lines = read_metrics(str(run), until_step=10**9)
        (left_out,) = [line for line in lines if line["kind"] == "left out"]
        assert left_out["step"] == 3
        assert sum(users for _, users in left_out["lanes"].values()) > 0
        assert 3 not in losses_of(str(run))


def be_poisoned(dataset_url, folder):
    poison({5}, rank=1)
    with pytest.raises(UserError, match=r"diverged: .*step 5 of the run .*--set not_finite=skip"):
        train_here(dataset_url, f"{folder}/stop")
    poison(set(range(1, 1000)), rank=0)
    with pytest.raises(UserError, match=r"diverged: .*step 10 of the run"):
        train_here(dataset_url, f"{folder}/skip", not_finite="skip")


@pytest.mark.distributed
def test_the_run_stops_on_all_ranks_if_it_shall_or_if_nothing_else_comes(dataset, run_ranks, tmp_path):
    run_ranks(be_poisoned, 2, dataset, str(tmp_path))


# Waiting in vain


def wait_for_a_rank_that_hangs(dataset_url, run):
    """The second rank reads its data for ever; the first gives up."""
    given_up = Path(f"{run}-given-up")

    def hang(units):
        while not given_up.exists():
            time.sleep(0.1)
        os._exit(0)

    if collectives.rank() == 1:
        train_here(dataset_url, run, read=hang, collective_timeout_seconds=2)
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match="Timed out waiting|Application timeout"):
        train_here(dataset_url, run, collective_timeout_seconds=2)
    assert time.monotonic() - begun < 60
    given_up.touch()
    os._exit(0)  # the other one is not there any more for a goodbye


@pytest.mark.distributed
def test_nobody_waits_for_ever_for_a_rank_that_hangs(dataset, run_ranks, tmp_path):
    run_ranks(wait_for_a_rank_that_hangs, 2, dataset, str(tmp_path / "run"))
    assert (tmp_path / "run-given-up").exists()
