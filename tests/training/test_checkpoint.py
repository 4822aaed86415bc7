"""Checkpoints: what is saved is loaded, on any number of ranks; damage and strangers' files are refused."""

import json
import pickle
import resource
import time

import pytest
import torch

from recgpt.config import OptimizerSettings
from recgpt.distributed import collectives
from recgpt.distributed.sharded_table import ShardedTable, row_range
from recgpt.distributed.table_optimizer import row_optimizer
from recgpt.errors import UserError
from recgpt.storage import checksum_of
from recgpt.training import checkpoint
from recgpt.training.checkpoint import Snapshot, TableRows, checkpoint_name

NAME = checkpoint_name(7, 1)
STATE = {"stage": "pretrain", "step": 7, "consumed": [3, 4], "best_value": None, "finished_stages": {}}
ABOUT = {"dataset_fingerprint": "items-1"}
DENSE = {"gpt.weight": torch.arange(6.0).reshape(2, 3), "gpt.bias": torch.tensor([0.1], dtype=torch.float64)}
OPTIMIZER = {
    f"{moment}/{name}": weight / 3 + number
    for number, moment in enumerate(checkpoint.MOMENTS)
    for name, weight in DENSE.items()
} | {"step": torch.tensor(7.0)}
NUM_ROWS = {"item_table": 11, "user_table": 6}
ITEMS = {
    "rows": torch.arange(33.0).reshape(11, 3).bfloat16(),
    "mean": torch.arange(33.0).reshape(11, 3) / 7,
    "steps": torch.arange(11) + 2**60,
}
USERS = {"rows": torch.arange(12.0).reshape(6, 2) - 5}
TABLES = {"item_table": ITEMS, "user_table": USERS}


@pytest.fixture(autouse=True)
def few_rows_per_file(monkeypatch):
    monkeypatch.setattr(checkpoint, "ROWS_PER_FILE", 4)


def table_rows(table, rank=0, world_size=1):
    first, end = row_range(NUM_ROWS[table], rank, world_size)
    return TableRows(NUM_ROWS[table], first, {key: value[first:end] for key, value in TABLES[table].items()})


def both_tables(rank=0, world_size=1):
    return {table: table_rows(table, rank, world_size) for table in TABLES}


def save(run, name=NAME, tables=None, state=STATE):
    checkpoint.write(str(run), Snapshot(name, state, DENSE, OPTIMIZER, tables or {}, ABOUT))
    return run / "checkpoints" / name


def load_rows(run, table, first, end, keys=None):
    """Into tensors full of ones."""
    wanted = {key: TABLES[table][key] for key in keys or TABLES[table]}
    tensors = {key: torch.ones_like(value[first:end]) for key, value in wanted.items()}
    checkpoint.load_table_into(str(run), NAME, table, first, tensors)
    return tensors


def assert_equal(loaded, expected):
    assert loaded.keys() == expected.keys()
    for key, tensor in expected.items():
        assert loaded[key].dtype == tensor.dtype
        assert torch.equal(loaded[key], tensor)


def assert_everything_is_loaded(run):
    assert checkpoint.newest(run) == NAME
    assert checkpoint.load_state(run, NAME) == STATE
    assert_equal(checkpoint.load_dense(run, NAME, DENSE), DENSE)
    assert_equal(checkpoint.load_dense_optimizer(run, NAME, DENSE), OPTIMIZER)
    assert checkpoint.read_manifest(run, NAME).about == ABOUT


def assert_all_row_ranges_are_loaded(run):
    for table, tensors in TABLES.items():
        for first in range(NUM_ROWS[table]):
            for end in range(first + 1, NUM_ROWS[table] + 1):
                expected = {key: value[first:end] for key, value in tensors.items()}
                assert_equal(load_rows(run, table, first, end), expected)


def test_what_is_saved_is_loaded(tmp_path):
    save(tmp_path)
    assert_everything_is_loaded(str(tmp_path))


def test_table_rows_are_loaded_by_any_range(tmp_path):
    save(tmp_path, tables=both_tables())
    assert_everything_is_loaded(str(tmp_path))
    assert_all_row_ranges_are_loaded(str(tmp_path))


def test_only_what_is_asked_for_is_loaded(tmp_path):
    """A fresh optimizer goes on with the rows alone; nothing beyond the range is touched."""
    save(tmp_path, tables=both_tables())
    assert_equal(load_rows(tmp_path, "item_table", 3, 9, ["rows"]), {"rows": ITEMS["rows"][3:9]})
    whole = torch.ones(9, 3)
    checkpoint.load_table_into(str(tmp_path), NAME, "item_table", 3, {"rows": whole[2:5]})
    assert whole.eq(1).all(1).tolist() == [True] * 2 + [False] * 3 + [True] * 4
    assert torch.equal(whole[2:5], ITEMS["rows"][3:6].float())


def test_the_rows_of_a_table_come_in_order_as_float32(tmp_path):
    save(tmp_path, tables=both_tables())
    pieces = list(checkpoint.table_row_ranges(str(tmp_path), NAME, "item_table"))
    assert [len(piece) for piece in pieces] == [4, 4, 3]
    assert_equal({"rows": torch.cat(pieces)}, {"rows": ITEMS["rows"].float()})
    (users, more) = checkpoint.table_row_ranges(str(tmp_path), NAME, "user_table")
    assert torch.equal(torch.cat([users, more]), USERS["rows"])


def save_on_each_rank(run):
    """Twice under one name: rank 0 is still clearing the folder while the other ranks are about to write."""
    checkpoint.ROWS_PER_FILE = 2
    remove = checkpoint.storage.remove

    def remove_late(url):
        time.sleep(0.2)
        remove(url)

    checkpoint.storage.remove = remove_late
    for _ in range(2):
        tables = both_tables(collectives.rank(), collectives.world_size())
        checkpoint.write(run, Snapshot(NAME, STATE, DENSE, OPTIMIZER, tables, ABOUT))
    if collectives.rank() == 1:
        assert_everything_is_loaded(run)


def load_on_each_rank(run):
    for table, tensors in TABLES.items():
        first, end = row_range(NUM_ROWS[table], collectives.rank(), collectives.world_size())
        expected = {key: value[first:end] for key, value in tensors.items()}
        assert_equal(load_rows(run, table, first, end), expected)


@pytest.mark.distributed
def test_table_rows_of_three_ranks_are_loaded_by_two_and_by_one(tmp_path, run_ranks):
    run_ranks(save_on_each_rank, 3, str(tmp_path))
    run_ranks(load_on_each_rank, 2, str(tmp_path))
    assert_everything_is_loaded(str(tmp_path))
    assert_all_row_ranges_are_loaded(str(tmp_path))
    manifest = json.loads((tmp_path / "checkpoints" / NAME / "manifest.json").read_text())
    assert manifest["tables"] == NUM_ROWS
    ranges = [(e["first_row"], e["rows"]) for e in manifest["files"] if e.get("table") == "item_table"]
    # Three ranks begin at rows 0, 3 and 7; a file holds two rows at most.
    assert ranges == [(0, 2), (2, 1), (3, 2), (5, 2), (7, 2), (9, 2)]


def test_a_load_reads_only_the_files_that_hold_its_rows(tmp_path):
    folder = save(tmp_path, tables=both_tables())
    (folder / "item_table-rows-000000000000.safetensors").unlink()
    (folder / "item_table-rows-000000000008.safetensors").unlink()
    assert torch.equal(load_rows(tmp_path, "item_table", 4, 8)["rows"], ITEMS["rows"][4:8])
    with pytest.raises(UserError, match="rows-000000000008"):
        load_rows(tmp_path, "item_table", 4, 9)


def save_and_load_a_large_shard(run):
    """A shard of 100 MB in files of 2 MB: saving and loading it take no memory of its order."""
    checkpoint.ROWS_PER_FILE = 4_000
    tensors = {"rows": torch.ones(200_000, 64), "mean": torch.ones(200_000, 64)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tables = {"item_table": TableRows(200_000, 0, tensors)}
    checkpoint.write(run, Snapshot(NAME, STATE, DENSE, OPTIMIZER, tables, ABOUT))
    checkpoint.load_table_into(run, NAME, "item_table", 0, tensors)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024  # it counts in KiB
    shard = 2 * tensors["rows"].nbytes
    assert grown < shard / 4, f"{grown} bytes more for a shard of {shard}"


@pytest.mark.distributed
def test_a_shard_is_never_doubled(tmp_path, run_ranks):
    run_ranks(save_and_load_a_large_shard, 1, str(tmp_path))


def test_rows_that_are_not_contiguous_are_saved_as_they_are(tmp_path):
    transposed = ITEMS["rows"][:3].T.repeat(2, 1).T.float()
    assert not transposed.is_contiguous()
    save(tmp_path, tables={"item_table": TableRows(3, 0, {"rows": transposed})})
    (loaded,) = checkpoint.table_row_ranges(str(tmp_path), NAME, "item_table")
    assert torch.equal(loaded, transposed)


def test_a_checkpoint_in_which_rows_are_missing_is_not_finished(tmp_path):
    part = table_rows("item_table", rank=0, world_size=2)
    with pytest.raises(AssertionError, match="hold 5 rows of item_table"):
        save(tmp_path, tables={"item_table": part})
    assert checkpoint.newest(str(tmp_path)) is None


def test_the_manifest_has_size_and_checksum_of_every_file(tmp_path):
    folder = save(tmp_path, tables=both_tables())
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
    folder = save(tmp_path, tables=both_tables())
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
    "dense_optimizer.safetensors": lambda run, name: checkpoint.load_dense_optimizer(run, name, DENSE),
    "item_table-rows-000000000004.safetensors": lambda run, name: load_rows(run, "item_table", 0, 11),
    "user_table-rows-000000000000.safetensors": lambda run, name: list(
        checkpoint.table_row_ranges(run, name, "user_table")
    ),
    "state.json": checkpoint.load_state,
}


@pytest.mark.parametrize("file", LOADERS)
def test_a_damaged_file_is_named(tmp_path, file):
    folder = save(tmp_path, tables=both_tables())
    data = bytearray((folder / file).read_bytes())
    data[-3] ^= 1
    (folder / file).write_bytes(data)
    with pytest.raises(UserError, match=rf"{file}: damaged \(wrong checksum\)"):
        LOADERS[file](str(tmp_path), NAME)


@pytest.mark.parametrize("file", LOADERS)
def test_a_missing_file_is_named(tmp_path, file):
    folder = save(tmp_path, tables=both_tables())
    (folder / file).unlink()
    with pytest.raises(UserError, match=f"{file}: missing; bring the file back"):
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
    folder = save(tmp_path, tables=both_tables())
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


# Tables and their optimizers


def test_a_table_that_was_not_saved_is_named(tmp_path):
    save(tmp_path, tables={"item_table": table_rows("item_table")})
    with pytest.raises(UserError, match="holds no sharded user_table"):
        load_rows(tmp_path, "user_table", 0, 1)


def test_the_state_of_another_table_optimizer_is_refused(tmp_path):
    save(tmp_path, tables=both_tables())
    wanted = {"rows": torch.ones(11, 3), "square_sum": torch.ones(11)}
    with pytest.raises(UserError, match="item_table was saved without square_sum, by another table optim"):
        checkpoint.load_table_into(str(tmp_path), NAME, "item_table", 0, wanted)


@pytest.mark.parametrize("kind", ["adam", "adagrad", "sgd"])
def test_a_table_and_its_optimizer_survive(tmp_path, kind):
    """Saved after some steps and loaded into fresh ones, they go on as those that never stopped."""

    def build(seed):
        table = ShardedTable(11, 3, seed, torch.device("cpu"))
        return table, row_optimizer(kind, table, OptimizerSettings())

    def train(table, optimizer):
        for ids in ([1, 2], [10, 2]):
            table(torch.tensor(ids)).square().sum().backward()
            optimizer.step(*table.take_gradient(), 0.1)

    table, optimizer = build(seed=0)
    train(table, optimizer)
    rows = {"rows": table.rows_in_use(), **optimizer.state}
    save(tmp_path, tables={"item_table": TableRows(11, 0, rows)})

    fresh_table, fresh = build(seed=1)
    fresh_rows = {"rows": fresh_table.rows, **fresh.state}
    checkpoint.load_table_into(str(tmp_path), NAME, "item_table", 0, fresh_rows)
    assert_equal(fresh_rows, rows)
    train(table, optimizer)
    train(fresh_table, fresh)
    assert_equal({"rows": fresh_table.rows_in_use()}, {"rows": table.rows_in_use()})
    assert_equal(fresh.state, optimizer.state)
