"""The constants of the machine at hand, measured: products, memory, exchanges, and short trainings.

For CPUs, on which ranks are processes of one machine joined by gloo.
"""

import dataclasses
import importlib
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recgpt.config import LossSettings, ModelSettings, TrainSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.distributed import collectives
from recgpt.machines import Machine
from recgpt.model.flops import training_flops
from recgpt.peak_memory import peak_memory
from recgpt.scaling.costs import memory_per_rank, moved_bytes
from recgpt.scaling.fitting import fit_not_negative
from recgpt.scaling.made_up_histories import write_dataset
from recgpt.scaling.ranks import run_ranks, step_seconds
from recgpt.scaling.workload import measure_workload, steps_of_one_worker
from recgpt.settings_reading import to_dict

_SECONDS = 1.0  # of each measurement of a rate
_COPIED_BYTES = 64 << 20
_SENT_BYTES = 4 << 20
_PRODUCT = (512, 128, 1008)  # of a block of scores; other shapes are not much faster
_WARM_UP, _STEPS = 10, 40
# Trainings that differ in what dominates: (width, items, tokens of a step).
_TRIALS = ((32, 1_000, 512), (64, 12_000, 1024), (128, 2_000, 2048), (64, 40_000, 512), (128, 12_000, 1024))
_LENGTHS = np.array([3, 4, 5, 6, 8, 12, 20, 50])


def calibrate(threads: int = 1, also_loaded: Sequence[str] = ()) -> Machine:
    """Measure this machine's CPU; about a minute. Progress is for the caller to show.

    Args:
        threads: of each rank.
        also_loaded: modules that a training process has loaded besides the library's, for its memory.
    """
    (rates,) = run_ranks(
        "recgpt.scaling.calibration:rates", world_size=1, threads=threads, also_loaded=list(also_loaded)
    )
    exchange = run_ranks("recgpt.scaling.calibration:exchange", world_size=2, threads=threads)
    per_byte = max(rank["seconds_per_byte"] for rank in exchange)
    machine = Machine(
        device="cpu",
        matrix_flops=rates["matrix_flops"],
        memory_bytes=float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")),
        memory_bandwidth=rates["memory_bandwidth"],
        ranks_per_node=max((os.cpu_count() or 1) // threads, 1),
        node_bandwidth=1 / per_byte,
        network_bandwidth=1 / per_byte,  # no other machine to measure it with
        latency=max(rank["latency"] for rank in exchange),
        matrix_efficiency=1.0,
        memory_efficiency=1.0,
        step_overhead=1e-3,
        input_rate=1.0,
        storage_bandwidth=rates["storage_bandwidth"],
        host_bandwidth=rates["memory_bandwidth"] / 2,  # what is read is written
        process_bytes=1.0,
    )
    return _fitted_to_trainings(machine, threads, rates["also_loaded_bytes"])


def _fitted_to_trainings(machine: Machine, threads: int, also_loaded_bytes: int) -> Machine:
    """How much of the rates short trainings reach, what else a step takes, and what else a process holds."""
    features, seconds, besides, input_rates = [], [], [], []
    for width, num_items, tokens in _TRIALS:
        settings = TrainSettings(
            threads_per_worker=threads,
            model=ModelSettings(width=width, members=1),
            loss=LossSettings(kind="full"),
            stages=("pretrain",),
        )
        settings = dataclasses.replace(
            settings, data=dataclasses.replace(settings.data, tokens_per_batch=tokens)
        )
        with tempfile.TemporaryDirectory() as folder:
            dataset = write_dataset(Path(folder), 20_000, _LENGTHS, num_items=num_items)
            work = measure_workload(dataset, settings)
            input_rates.append(_input_rate(dataset, settings))
            (trial,) = run_ranks(
                "recgpt.scaling.trial:trial",
                world_size=1,
                threads=threads,
                dataset=dataset.url,
                settings=to_dict(settings),
                warm_up=_WARM_UP,
                steps=_STEPS,
            )
        load = work.load
        flops = training_flops(settings.model, load.tokens, load.attended_pairs, load.tokens, num_items)
        moved = moved_bytes(settings, work)
        features.append([flops / machine.matrix_flops, moved / machine.memory_bandwidth, 1.0])
        seconds.append(step_seconds([trial["seconds"]]))
        planned = memory_per_rank(settings, work, 1, machine)
        besides.append(trial["memory_bytes"] - planned.total + planned.checkpoint)  # none is written so early
    compute, memory, overhead = fit_not_negative(np.array(features), np.array(seconds))
    return dataclasses.replace(
        machine,
        matrix_efficiency=1 / max(compute, 1.0),
        memory_efficiency=1 / max(memory, 1.0),
        step_overhead=max(overhead, 1e-5),
        process_bytes=statistics.median(besides) + also_loaded_bytes,
        input_rate=statistics.median(input_rates),
    )


def _input_rate(dataset: HistoryDataset, settings: TrainSettings) -> float:
    """Tokens per second of reading and packing the dataset."""
    begun = time.perf_counter()
    tokens = sum(len(step.batch.target_T) for step in steps_of_one_worker(dataset, settings))
    return tokens / (time.perf_counter() - begun)


def rates(also_loaded: list[str]) -> dict[str, Any]:
    """Of one rank: products, copies, writes to a temporary file; memory that further modules take."""
    importlib.import_module("recgpt.training.trainer")
    before = peak_memory()
    for name in also_loaded:
        importlib.import_module(name)
    also_loaded_bytes = peak_memory() - before
    rows, inner, columns = _PRODUCT
    left, right = torch.randn(rows, inner), torch.randn(inner, columns)
    out = torch.empty(rows, columns)
    products = _per_second(lambda: torch.mm(left, right, out=out))
    source = torch.ones(_COPIED_BYTES // 4)
    target = torch.empty_like(source)
    copies = _per_second(lambda: target.copy_(source))
    return {
        "matrix_flops": 2 * rows * inner * columns * products,
        "memory_bandwidth": 2 * _COPIED_BYTES * copies,
        "storage_bandwidth": _storage_bandwidth(),
        "also_loaded_bytes": also_loaded_bytes,
    }


def exchange() -> dict[str, float]:
    """Of two ranks: seconds per byte that leaves a rank, and seconds of an exchange of next to nothing."""
    ranks = collectives.world_size()
    rows = torch.ones(_SENT_BYTES // 4)
    share = [len(rows) // ranks] * ranks
    nothing = torch.zeros(1)
    collectives.barrier()
    latency = 1 / _per_second(lambda: collectives.sum_over_ranks(nothing), times=200)
    whole = 1 / _per_second(lambda: collectives.exchange_rows(rows, share, share), times=50)
    leaves = _SENT_BYTES * (ranks - 1) / ranks
    return {"seconds_per_byte": max(whole - latency, 1e-6) / leaves, "latency": latency / ranks.bit_length()}


def _per_second(call: Any, times: int | None = None) -> float:
    """Calls per second: of ``times`` of them, which ranks must agree on, or of what fits ``_SECONDS``."""
    call()
    begun, done = time.perf_counter(), 0
    while done < times if times else time.perf_counter() - begun < _SECONDS:
        call()
        done += 1
    return done / (time.perf_counter() - begun)


def _storage_bandwidth() -> float:
    data = os.urandom(_COPIED_BYTES)
    with tempfile.NamedTemporaryFile() as file:
        begun = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return len(data) / (time.perf_counter() - begun)
