"""What the processes of the benchmark of the training input do."""

import itertools
import statistics
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

from benchmarks.attention_forms import FORMS
from recgpt.config import DataSettings, ModelSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.data.packing import lane_steps
from recgpt.data.plan import epoch_units
from recgpt.model import attention
from recgpt.model.attention import Layout
from recgpt.model.gpt import GPT
from recgpt.scaling.made_up_histories import lane_table, training_lengths

USERS_PER_LANE = 65_536
MAX_HISTORY = 50
PARTS_OF_EPOCH = 4


def attention_forms(log: str, tokens: int, repetitions: int) -> list[dict[str, Any]]:
    """Forward and backward of the GPT's body in each form: CPU seconds, tokens and positions of batches."""
    settings = ModelSettings(width=64, members=1, dropout=0.0, max_history=MAX_HISTORY)
    gpt = GPT(settings)
    table = lane_table(0, USERS_PER_LANE, training_lengths(Path(log)), np.random.default_rng(0))
    rows: dict[str, dict[str, Any]] = {
        name: {"form": name, "seconds": [], "tokens": 0, "positions": 0} for name in FORMS
    }
    steps = itertools.islice(lane_steps([table], [0], tokens, MAX_HISTORY), 1 + repetitions)
    for number, step in enumerate(steps):
        interest = []
        for name, form in FORMS.items():
            item_TD = torch.randn(
                len(step.batch.item_index_T),
                settings.vector_width,
                generator=torch.Generator().manual_seed(number),
            ).requires_grad_()
            begun = time.process_time()
            layout = Layout.from_offsets(step.batch.offsets)
            attend, positions = form(layout)
            with mock.patch.object(attention, "attend_by_length", attend):
                interest.append(gpt(item_TD, layout, torch.zeros_like(step.batch.user_hash_B)))
                interest[-1].square().sum().backward()
            seconds = time.process_time() - begun
            torch.testing.assert_close(interest[-1], interest[0], atol=1e-4, rtol=1e-4)
            if number:  # the first is a warm-up
                rows[name]["seconds"].append(seconds)
                rows[name]["tokens"] += len(item_TD)
                rows[name]["positions"] += positions
    return list(rows.values())


def packing(log: str, tokens: int, lanes: int, rounds: int) -> dict[str, float]:
    """From tables in memory to the batches of one worker: tokens per CPU second, tokens of a step."""
    generator = np.random.default_rng(0)
    lengths = training_lengths(Path(log))
    tables = [lane_table(lane, USERS_PER_LANE, lengths, generator) for lane in range(lanes)]
    rates = []
    for _ in range(rounds):
        total = steps = 0
        begun = time.process_time()
        for step in lane_steps(tables, range(lanes), tokens, MAX_HISTORY):
            total += len(step.batch.item_index_T)
            steps += 1
        rates.append(total / (time.process_time() - begun))
    return {"tokens_per_cpu_second": statistics.median(rates), "tokens_per_step": total / steps}


def stream(dataset: str, object_store_bytes: int, tokens: int, pause: float = 0.0) -> dict[str, Any]:
    """One epoch as one worker reads it, who does nothing for ``pause`` seconds after each step.

    Returns its tokens and users, the seconds until the first step was there, and when (by the system's
    monotonic clock) each quarter of the users had come, first the beginning of the first step.
    """
    from ray_jobs.runtime import configure_ray_data, guard_local_ray
    from ray_jobs.train import _stream

    guard_local_ray()
    import ray

    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=object_store_bytes,
        log_to_driver=False,
        logging_level="ERROR",
    )
    configure_ray_data()
    history_dataset, data = HistoryDataset.open(dataset), DataSettings(tokens_per_batch=tokens)
    units = epoch_units(
        row_counts=[group.rows for group in history_dataset.row_groups],
        lanes=range(data.lanes),
        total_lanes=data.lanes,
        window_users=data.shuffle_window_users,
        shuffle=(0, 0),
        consumed=[0] * data.lanes,
    )
    tables = _stream(history_dataset, units, data.split, None)
    total = users = 0
    begun = time.monotonic()
    times: list[float] = []
    for step in lane_steps(tables, range(data.lanes), tokens // data.lanes, MAX_HISTORY):
        if not times:
            times.append(time.monotonic())
        total += len(step.batch.item_index_T)
        users += sum(step.users.values())
        while len(times) <= users * PARTS_OF_EPOCH // history_dataset.num_users:
            times.append(time.monotonic())
        time.sleep(pause)
    ray.shutdown()
    return {"tokens": total, "users": users, "seconds_to_first": times[0] - begun, "quarters": times}
