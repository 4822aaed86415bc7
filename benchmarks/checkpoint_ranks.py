"""What each rank of the checkpoints' benchmark does; ``benchmarks.checkpoints`` starts the ranks."""

import shutil
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from benchmarks.table_ranks import Training
from recgpt.config import OptimizerSettings
from recgpt.distributed.table_optimizer import row_optimizer
from recgpt.training import checkpoint
from recgpt.training.checkpoint import Snapshot, TableRows
from recgpt.training.checkpoint_writer import CheckpointWriter
from recgpt.training.engine import init_process_group

TABLE = "item_table"


def checkpoints(
    folder: str, num_items: int, width: int, negatives: int, tokens: int, steps: int, rounds: int
) -> dict[str, Any]:
    """Seconds of steps, of pauses, of whole writings, and of a resume, on this rank, by way of writing."""
    init_process_group()
    training = Training(num_items, negatives, width)
    # As by default: with both moments of each row, three times the rows are written.
    training.row_optimizer = row_optimizer("adam", training.table, OptimizerSettings())
    batch = training.batch(tokens)
    for _ in range(3):
        training.step(batch)
    result: dict[str, Any] = {"alone": [_seconds(lambda: training.step(batch)) for _ in range(steps)]}
    for way in ("in background", "at once"):
        run = f"{folder}/{way}"
        with CheckpointWriter(run, lambda: set(), lambda: None, way == "in background") as writer:
            result[way] = [_checkpoint(training, batch, writer, steps) for _ in range(rounds)]
        if dist.get_rank() == 0:
            shutil.rmtree(run)
        dist.barrier()
    result["resume"] = [_resume(training, folder) for _ in range(rounds)]
    return result


def _checkpoint(training: Training, batch: Any, writer: CheckpointWriter, steps: int) -> dict[str, Any]:
    """One checkpoint, with steps while it is written."""
    dist.barrier()
    writer.save(lambda: _snapshot(training))
    during = [_seconds(lambda: training.step(batch)) for _ in range(steps)]
    written = writer.wait()
    assert written
    return {
        "pause": written.pause_seconds,
        "write": written.write_seconds,
        "bytes": written.bytes,
        "steps": during,
    }


def _resume(training: Training, folder: str) -> float:
    """Seconds to check a checkpoint and to load this rank's rows."""
    run = Path(folder, "resume")
    if not run.exists():
        checkpoint.write(str(run), _snapshot(training))
    dist.barrier()

    def load() -> None:
        name = checkpoint.newest_whole(str(run), print)
        assert name
        checkpoint.load_table_into(str(run), name, TABLE, training.table.first, _tensors(training))

    return _seconds(load)


def _snapshot(training: Training) -> Snapshot:
    rows = TableRows(training.table.num_rows, training.table.first, _tensors(training))
    weights, moments = training.engine.weights(), training.engine.optimizer_state()
    return Snapshot(checkpoint.checkpoint_name(1, 0), {"results": {}}, weights, moments, {TABLE: rows})


def _tensors(training: Training) -> dict[str, Any]:
    assert training.row_optimizer
    return {"rows": training.table.rows_in_use(), **training.row_optimizer.state}


def _seconds(work: Any) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun
