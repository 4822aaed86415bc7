"""Checkpoints written beside the training, and which one a resume takes: the newest that is whole."""

import errno
import json
import os
import shutil
import threading
import time
from datetime import timedelta

import pytest
import torch

from recgpt.distributed import collectives
from recgpt.distributed.sharded_table import row_range
from recgpt.errors import UserError
from recgpt.training import checkpoint, checkpoint_writer
from recgpt.training.checkpoint import Snapshot, TableRows, checkpoint_name
from recgpt.training.checkpoint_writer import CheckpointWriter

NAMES = [checkpoint_name(step, 0) for step in (1, 2, 3)]
NUM_ROWS = 7


def snapshot(step, rank=0, world_size=1):
    """A table whose rows all hold the number of the step."""
    first, end = row_range(NUM_ROWS, rank, world_size)
    tables = {"item_table": TableRows(NUM_ROWS, first, {"rows": torch.full((end - first, 2), float(step))})}
    state = {"step": step, "results": {}}
    return Snapshot(checkpoint_name(step, 0), state, {"weight": torch.tensor([step / 2])}, {}, tables)


def writer(run, keep=2, in_background=True, check_may_write=lambda: None):
    return CheckpointWriter(
        str(run), lambda: set(checkpoint.finished(str(run))[-keep:]), check_may_write, in_background
    )


def write_all(run):
    for step in (1, 2, 3):
        checkpoint.write(str(run), snapshot(step))


def rows_of(run, name):
    return torch.cat(list(checkpoint.table_row_ranges(str(run), name, "item_table")))


@pytest.mark.parametrize("in_background", [True, False])
def test_what_is_written_is_as_it_was_when_it_was_taken(tmp_path, in_background):
    taken = snapshot(1)
    rows = taken.tables["item_table"].tensors["rows"]
    with writer(tmp_path, in_background=in_background) as checkpoints:
        assert checkpoints.save(lambda: taken) is None
        rows.add_(100.0)  # the next step of the training
        written = checkpoints.save(lambda: snapshot(2))
        assert written.name == NAMES[0]
        assert written.bytes == sum(
            file.bytes for file in checkpoint.read_manifest(str(tmp_path), NAMES[0]).files
        )
    assert rows_of(tmp_path, NAMES[0]).eq(1).all()
    assert rows_of(tmp_path, NAMES[1]).eq(2).all()


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    may_go_on = threading.Event()
    write = checkpoint.write

    def write_slowly(*arguments):
        assert may_go_on.wait(30)
        return write(*arguments)

    monkeypatch.setattr(checkpoint_writer.checkpoint, "write", write_slowly)
    with writer(tmp_path) as checkpoints:
        checkpoints.save(lambda: snapshot(1))
        assert checkpoint.finished(str(tmp_path)) == []
        may_go_on.set()
    assert checkpoint.finished(str(tmp_path)) == NAMES[:1]


def test_older_ones_go_when_the_new_one_is_whole(tmp_path):
    with writer(tmp_path, keep=1) as checkpoints:
        for step in (1, 2):
            checkpoints.save(lambda step=step: snapshot(step))
            checkpoints.wait()
            assert checkpoint.finished(str(tmp_path)) == [checkpoint_name(step, 0)]


def disk_is_full(url, data, **options):
    raise OSError(errno.ENOSPC, "No space left on device", url)


def test_a_checkpoint_that_cannot_be_written_is_an_error_and_the_older_one_stays(tmp_path, monkeypatch):
    checkpoints = writer(tmp_path)
    checkpoints.save(lambda: snapshot(1))
    checkpoints.wait()
    monkeypatch.setattr(checkpoint.storage, "write_bytes", disk_is_full)
    checkpoints.save(lambda: snapshot(2))
    with pytest.raises(OSError, match="No space left"):
        checkpoints.wait()
    assert checkpoint.finished(str(tmp_path)) == NAMES[:1]


def test_who_has_lost_the_run_to_another_writes_nothing(tmp_path):
    def taken_over():
        raise UserError("another run has taken over")

    with (
        pytest.raises(UserError, match="taken over"),
        writer(tmp_path, check_may_write=taken_over) as checkpoints,
    ):
        checkpoints.save(lambda: snapshot(1))
    assert not (tmp_path / "checkpoints").exists()


def save_where_one_rank_fails(run):
    """The second rank cannot write: nobody hangs, everybody hears of it, and the older checkpoint stays."""
    rank, world_size = collectives.rank(), collectives.world_size()
    checkpoints = writer(run)
    checkpoints.save(lambda: snapshot(1, rank, world_size))
    checkpoints.wait()
    if rank == 1:
        checkpoint.storage.write_bytes = disk_is_full
    checkpoints.save(lambda: snapshot(2, rank, world_size))
    with pytest.raises((OSError, RuntimeError), match="No space left"):
        checkpoints.wait()
    assert checkpoint.newest(run) == NAMES[0]


@pytest.mark.distributed
def test_a_disk_that_is_full_on_one_rank_is_an_error_on_all(tmp_path, run_ranks):
    run_ranks(save_where_one_rank_fails, 3, str(tmp_path))


def wait_for_a_rank_that_hangs(run):
    """Rank 0 stands still while it writes: the other gives up after the time that its collectives have."""
    collectives.give_up_after(timedelta(seconds=5))
    stands_still = threading.Event()
    checkpoints = CheckpointWriter(run, lambda: stands_still.wait(60) and set(), lambda: None, True)
    checkpoints.save(lambda: snapshot(1, collectives.rank(), collectives.world_size()))
    if collectives.rank() == 0:
        time.sleep(15)
        os._exit(0)
    begun = time.monotonic()
    with pytest.raises(RuntimeError, match=r"[Tt]ime|[Cc]losed"):
        checkpoints.wait()
    assert time.monotonic() - begun < 30, "not the hours that a slow store is given"
    os._exit(0)  # without the barrier at the end


@pytest.mark.distributed
def test_a_rank_that_hangs_while_it_writes_is_found_out(tmp_path, run_ranks):
    run_ranks(wait_for_a_rank_that_hangs, 2, str(tmp_path))


def wait_for_a_slow_store(run):
    """Longer than a collective may take: it is waited for, as long as all ranks show that they wait."""
    collectives.give_up_after(timedelta(seconds=5))
    keep = lambda: time.sleep(8) or set()  # noqa: E731
    checkpoints = CheckpointWriter(run, keep, lambda: None, True)
    checkpoints.save(lambda: snapshot(1, collectives.rank(), collectives.world_size()))
    assert checkpoints.wait().name == NAMES[0]


@pytest.mark.distributed
def test_a_slow_store_is_waited_for(tmp_path, run_ranks):
    run_ranks(wait_for_a_slow_store, 2, str(tmp_path))


# Which one is taken


def flip_a_bit(folder):
    file = next(folder.glob("item_table*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "a flipped bit": flip_a_bit,
    "a missing file": lambda folder: (folder / "state.json").unlink(),
    "half a manifest": lambda folder: (folder / "manifest.json").write_text('{"name": "step'),
    "another's manifest": lambda folder: shutil.copy(
        folder.parent / NAMES[0] / "manifest.json", folder / "manifest.json"
    ),
    "an empty manifest": lambda folder: (folder / "manifest.json").write_text("{}"),
    "a manifest of nothing": lambda folder: (folder / "manifest.json").write_text("[]"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_reported_and_removed_later(tmp_path, damage):
    write_all(tmp_path)
    DAMAGES[damage](tmp_path / "checkpoints" / NAMES[2])
    warnings = []
    assert checkpoint.newest_whole(str(tmp_path), warnings.append) == NAMES[1]
    assert len(warnings) == 1
    assert NAMES[2] in warnings[0]
    assert checkpoint.finished(str(tmp_path)) == NAMES[:2], "it is marked"
    with writer(tmp_path) as checkpoints:
        checkpoints.save(lambda: snapshot(4))
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == [NAMES[1], checkpoint_name(4, 0)]


def test_an_unfinished_checkpoint_is_reported(tmp_path):
    write_all(tmp_path)
    (tmp_path / "checkpoints" / NAMES[2] / "manifest.json").unlink()
    warnings = []
    assert checkpoint.newest_whole(str(tmp_path), warnings.append) == NAMES[1]
    assert [NAMES[2] in warning for warning in warnings] == [True]


def test_where_none_is_whole_nothing_begins_anew_by_itself(tmp_path):
    write_all(tmp_path)
    for name in NAMES:
        flip_a_bit(tmp_path / "checkpoints" / name)
    for _ in range(2):  # also when all are marked
        with pytest.raises(UserError, match="no checkpoint is whole; begin again with --restart"):
            checkpoint.newest_whole(str(tmp_path), lambda text: None)


def test_without_checkpoints_none_is_taken(tmp_path):
    assert checkpoint.newest_whole(str(tmp_path), pytest.fail) is None


def take_the_newest_whole(run):
    assert checkpoint.newest_whole(run, lambda text: None) == NAMES[1]


@pytest.mark.distributed
def test_ranks_share_the_looking_and_agree(tmp_path, run_ranks):
    write_all(tmp_path)
    flip_a_bit(tmp_path / "checkpoints" / NAMES[2])
    run_ranks(take_the_newest_whole, 3, str(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda manifest: manifest["files"][0].update(file="../../secret"), "is not a file of a checkpoint"),
        (lambda manifest: manifest["files"][0].update(file="/etc/passwd"), "is not a file of a checkpoint"),
        (lambda manifest: manifest["files"][0].update(bytes="many"), "files.0.bytes"),
        (lambda manifest: manifest["files"].pop(), "does not hold the 7 rows"),
        (lambda manifest: manifest["tables"].update(item_table=8), "does not hold the 8 rows"),
        (lambda manifest: manifest.update(schema_version=99), "another release"),
    ],
)
def test_a_strangers_manifest_is_refused_in_one_line(tmp_path, change, message):
    write_all(tmp_path)
    file = tmp_path / "checkpoints" / NAMES[0] / "manifest.json"
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=message) as error:
        checkpoint.load_state(str(tmp_path), NAMES[0])
    assert "\n" not in str(error.value)
