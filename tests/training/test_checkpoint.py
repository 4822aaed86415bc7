"""Checkpoints: what is saved is loaded, on any number of ranks; damage and strangers' files are refused."""

import json
import pickle

import pytest
import torch

from recgpt.config import OptimizerSettings
from recgpt.distributed import collectives
from recgpt.distributed.sharded_item_table import ShardedItemTable, row_range
from recgpt.distributed.table_optimizer import RowAdamW
from recgpt.errors import UserError
from recgpt.storage import checksum_of
from recgpt.training import checkpoint
from recgpt.training.checkpoint import TableRows, checkpoint_name

NAME = checkpoint_name(7, 1)
STATE = {"stage": "pretrain", "step": 7, "consumed": [3, 4], "best_value": None, "finished_stages": {}}
DENSE = {"gpt.weight": torch.arange(6.0).reshape(2, 3), "gpt.bias": torch.tensor([0.1], dtype=torch.float64)}
OPTIMIZER = {"exp_avg/gpt.bias": torch.tensor([0.5]), "step": torch.tensor(7.0)}
NUM_ROWS = 11
ROWS = torch.arange(NUM_ROWS * 3.0).reshape(NUM_ROWS, 3)
STEPS = torch.arange(100, 100 + NUM_ROWS)


def table_rows(rank=0, world_size=1):
    first, end = row_range(NUM_ROWS, rank, world_size)
    return TableRows(NUM_ROWS, {"rows": ROWS[first:end], "steps": STEPS[first:end]})


def save(run, name=NAME, table=None, state=STATE):
    checkpoint.save(str(run), name, state, DENSE, OPTIMIZER, table)
    return run / "checkpoints" / name


def assert_equal(loaded, expected):
    assert loaded.keys() == expected.keys()
    for key, tensor in expected.items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key], tensor)


def assert_everything_is_loaded(run):
    assert checkpoint.newest(run) == NAME
    assert checkpoint.load_state(run, NAME) == STATE
    assert_equal(checkpoint.load_dense(run, NAME), DENSE)
    assert_equal(checkpoint.load_dense_optimizer(run, NAME), OPTIMIZER)


def assert_all_row_ranges_are_loaded(run):
    for first in range(NUM_ROWS):
        for end in range(first + 1, NUM_ROWS + 1):
            loaded = checkpoint.load_table_rows(run, NAME, first, end)
            assert_equal(loaded, {"rows": ROWS[first:end], "steps": STEPS[first:end]})


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path)
    assert_everything_is_loaded(str(tmp_path))


def test_table_rows_are_loaded_by_any_range(tmp_path):
    save(tmp_path, table=table_rows())
    assert_everything_is_loaded(str(tmp_path))
    assert_all_row_ranges_are_loaded(str(tmp_path))


def save_on_each_rank(run):
    """Twice under one name: rank 0 clears the folder while the other ranks are about to write."""
    for _ in range(2):
        table = table_rows(collectives.rank(), collectives.world_size())
        checkpoint.save(run, NAME, STATE, DENSE, OPTIMIZER, table)
    if collectives.rank() == 1:
        assert_everything_is_loaded(run)


@pytest.mark.distributed
def test_table_rows_of_several_ranks_are_loaded_by_any_range(tmp_path, run_ranks):
    run_ranks(save_on_each_rank, 3, str(tmp_path))
    assert_everything_is_loaded(str(tmp_path))
    assert_all_row_ranges_are_loaded(str(tmp_path))
    manifest = json.loads((tmp_path / "checkpoints" / NAME / "manifest.json").read_text())
    assert manifest["item_table"] == {"num_rows": NUM_ROWS, "shards": 3}
    assert len(manifest["files"]) == 6


def test_rows_that_are_not_contiguous_are_saved_as_they_are(tmp_path):
    save(tmp_path, table=TableRows(3, {"rows": ROWS.T}))
    assert torch.equal(checkpoint.load_table_rows(str(tmp_path), NAME, 1, 3)["rows"], ROWS.T[1:3])


def test_the_manifest_has_size_and_checksum_of_every_file(tmp_path):
    folder = save(tmp_path, table=table_rows())
    manifest = json.loads((folder / "manifest.json").read_text())
    files = {file.name: file.read_bytes() for file in folder.iterdir() if file.name != "manifest.json"}
    assert {entry["file"]: (entry["bytes"], entry["sha256"]) for entry in manifest["files"]} == {
        name: (len(data), checksum_of(data)) for name, data in files.items()
    }
    assert manifest["name"] == NAME


def test_without_checkpoints_there_is_no_newest(tmp_path):
    assert checkpoint.newest(str(tmp_path)) is None
    assert checkpoint.finished(str(tmp_path / "missing")) == []


def test_a_folder_without_a_manifest_is_not_finished(tmp_path):
    save(tmp_path)
    (save(tmp_path, checkpoint_name(8, 1)) / "manifest.json").unlink()
    (tmp_path / "checkpoints" / "notes").mkdir()
    (tmp_path / "checkpoints" / "notes" / "manifest.json").write_text("{}")
    assert checkpoint.finished(str(tmp_path)) == [NAME]
    assert checkpoint.newest(str(tmp_path)) == NAME


def test_checkpoints_are_in_the_order_of_their_steps(tmp_path):
    for step in (100, 9, 1_000_000_000, 20):
        save(tmp_path, checkpoint_name(step, 1))
    names = [checkpoint_name(step, 1) for step in (9, 20, 100, 1_000_000_000)]
    assert checkpoint.finished(str(tmp_path)) == names
    assert checkpoint.newest(str(tmp_path)) == names[-1]


def test_saving_again_replaces_the_whole_checkpoint(tmp_path):
    folder = save(tmp_path, table=table_rows())
    save(tmp_path, state={**STATE, "step": 8})
    assert checkpoint.load_state(str(tmp_path), NAME)["step"] == 8
    assert sorted(file.name for file in folder.iterdir()) == [
        "dense.safetensors",
        "dense_optimizer.safetensors",
        "manifest.json",
        "state.json",
    ]


@pytest.mark.parametrize("again", [save, lambda run: checkpoint.keep_only(str(run), [])])
def test_whoever_is_killed_while_removing_leaves_no_finished_checkpoint(tmp_path, monkeypatch, again):
    folder = save(tmp_path)
    remove = checkpoint.storage.remove

    def die_half_way_through_the_folder(url):
        if url != str(folder):
            return remove(url)
        (folder / "dense.safetensors").unlink()
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.storage, "remove", die_half_way_through_the_folder)
    with pytest.raises(KeyboardInterrupt):
        again(tmp_path)
    assert checkpoint.newest(str(tmp_path)) is None


def test_keep_only_removes_all_others_finished_or_not(tmp_path):
    names = [checkpoint_name(step, 1) for step in range(4)]
    for name in names:
        save(tmp_path, name)
    (tmp_path / "checkpoints" / names[3] / "manifest.json").unlink()
    (tmp_path / "checkpoints" / "notes").write_text("not ours")
    checkpoint.keep_only(str(tmp_path), [names[1], names[2], checkpoint_name(99, 1)])
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["notes", names[1], names[2]]


# Damage and strangers


LOADERS = {
    "dense.safetensors": checkpoint.load_dense,
    "dense_optimizer.safetensors": checkpoint.load_dense_optimizer,
    "item_table-00000.safetensors": lambda run, name: checkpoint.load_table_rows(run, name, 0, 1),
    "state.json": checkpoint.load_state,
}


@pytest.mark.parametrize("file", LOADERS)
def test_a_damaged_file_is_named(tmp_path, file):
    folder = save(tmp_path, table=table_rows())
    data = bytearray((folder / file).read_bytes())
    data[-3] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(UserError, match=rf"{file}: damaged \(wrong checksum\)"):
        LOADERS[file](str(tmp_path), NAME)


@pytest.mark.parametrize("file", LOADERS)
def test_a_missing_file_is_named(tmp_path, file):
    folder = save(tmp_path, table=table_rows())
    (folder / file).unlink()
    with pytest.raises(UserError, match=f"{file}: missing; remove the checkpoint folder"):
        LOADERS[file](str(tmp_path), NAME)


def test_a_damaged_manifest_is_named(tmp_path):
    folder = save(tmp_path)
    (folder / "manifest.json").write_text('{"files": [')
    with pytest.raises(UserError, match="manifest.json: not valid JSON"):
        checkpoint.load_dense(str(tmp_path), NAME)


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("file", [file for file in LOADERS if file.endswith("safetensors")])
def test_a_pickle_in_place_of_a_file_is_refused_and_not_executed(tmp_path, file, listed):
    """Also where the stranger has put its checksum into the manifest."""
    folder = save(tmp_path, table=table_rows())
    bomb = pickle.dumps(Bomb(tmp_path / "executed"))
    (folder / file).write_bytes(bomb)
    if listed:
        manifest = json.loads((folder / "manifest.json").read_text())
        for entry in manifest["files"]:
            entry["sha256"] = checksum_of(bomb) if entry["file"] == file else entry["sha256"]
        (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"{file}: (not safetensors|damaged)"):
        LOADERS[file](str(tmp_path), NAME)
    assert not (tmp_path / "executed").exists()
    pickle.loads(bomb)
    assert (tmp_path / "executed").exists(), "the bomb is none"


def test_the_state_of_the_row_optimizer_survives(tmp_path):
    """A checkpoint of a real table with its optimizer, after a step, into fresh ones."""
    settings = OptimizerSettings()

    def build(seed):
        table = ShardedItemTable(10, 4, seed, 4, torch.device("cpu"))
        return table, RowAdamW(table, settings)

    table, optimizer = build(seed=0)
    for targets in ([1, 2], [10]):
        vectors = table(torch.tensor(targets))
        table.loss_sum(vectors, torch.tensor(targets)).backward()
        optimizer.step(0.1)
    save(tmp_path, table=TableRows(table.num_rows, optimizer.tensors()))

    fresh_table, fresh = build(seed=1)
    loaded = checkpoint.load_table_rows(str(tmp_path), NAME, fresh_table.first, fresh_table.end)
    for key, tensor in fresh.tensors().items():
        tensor.copy_(loaded[key])
    assert_equal(fresh.tensors(), optimizer.tensors())
    assert fresh.tensors()["steps"].tolist() == [2] * 11
