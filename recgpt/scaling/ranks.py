"""Measurements that several processes make together, one rank each, joined by gloo.

    python -m recgpt.scaling.ranks MODULE:FUNCTION FOLDER RANK WORLD_SIZE

is what ``run_ranks`` starts: it calls the function with the arguments in the folder and leaves there what
the function returns. Needs torch alone, so that a yardstick's own environment can run it too.
"""

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[2]
LINES_SHOWN = 30  # of the output of a rank that failed
SECONDS_BETWEEN_LOOKS = 0.05


def run_ranks(
    function: str, python: str = sys.executable, world_size: int = 2, threads: int = 1, **arguments: Any
) -> list[Any]:
    """Call ``MODULE:FUNCTION`` in fresh processes of ``threads`` each; returns what each rank returned.

    Arguments and results are JSON values. Raises ``RuntimeError`` with the output of a rank that failed.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "arguments.json").write_text(json.dumps(arguments))
        ranks = [_start(function, python, folder, rank, world_size, threads) for rank in range(world_size)]
        # A rank that fails leaves the others waiting for it: whoever fails first ends all.
        try:
            while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
                time.sleep(SECONDS_BETWEEN_LOOKS)
            failed = [number for number, rank in enumerate(ranks) if rank.poll()]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
        if failed:
            lines = (folder / f"output-{failed[0]}").read_text().splitlines()[-LINES_SHOWN:]
            raise RuntimeError("\n".join([f"{function}, rank {failed[0]} of {world_size} failed:", *lines]))
        return [json.loads((folder / f"result-{rank}").read_text()) for rank in range(world_size)]


def _start(
    function: str, python: str, folder: Path, rank: int, world_size: int, threads: int
) -> "subprocess.Popen[bytes]":
    environment = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "OMP_NUM_THREADS": str(threads),
        "LOCAL_RANK": str(rank),  # DeepSpeed asks for it
        "CUDA_VISIBLE_DEVICES": "",  # gloo joins CPUs
    }
    call = [python, "-m", "recgpt.scaling.ranks", function, str(folder), str(rank), str(world_size)]
    with open(folder / f"output-{rank}", "wb") as output:
        return subprocess.Popen(
            call, stdout=output, stderr=subprocess.STDOUT, env=environment, cwd=REPOSITORY
        )


def _run_rank(function: str, folder: Path, rank: int, world_size: int) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    module, name = function.split(":")
    call = getattr(importlib.import_module(module), name)
    store = f"file://{folder / 'store'}"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size)
    result = call(**json.loads((folder / "arguments.json").read_text()))
    (folder / f"result-{rank}").write_text(json.dumps(result))
    dist.barrier()
    # The result is safe; while the interpreter winds down, a thread of gloo can still abort the process.
    sys.stdout.flush()
    os._exit(0)


def step_seconds(seconds_of_ranks: Sequence[Sequence[float]]) -> float:
    """The median step; a step takes as long as its slowest rank."""
    return statistics.median(map(max, zip(*seconds_of_ranks, strict=True)))


if __name__ == "__main__":
    _run_rank(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
