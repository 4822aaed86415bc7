"""What each rank of the item table's benchmark does; ``benchmarks.item_table`` starts the ranks.

Shapes: T tokens of a rank and step, D width.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.yardsticks.lookup_workload import LookupWorkload, draw_items, item_counts
from recgpt.config import LossSettings, ModelSettings, OptimizerSettings
from recgpt.distributed import collectives
from recgpt.distributed.sharded_item_table import ShardedItemTable
from recgpt.distributed.sharded_table import ShardedTable
from recgpt.distributed.table_optimizer import row_optimizer
from recgpt.model.gpt import GPT
from recgpt.model.item_table import ItemTable
from recgpt.peak_memory import peak_memory
from recgpt.training.engine import DenseEngine, init_process_group, read_deepspeed_config
from recgpt.training.model import NextItemModel, TrainingBatch

CPU = torch.device("cpu")
HISTORY_TOKENS = 32  # of every history
WARM_UP_STEPS = 3
TABLE_OPTIMIZER = "adagrad"


class Training:
    """A GPT under DeepSpeed and its item table, with what the trainer does in a step."""

    def __init__(
        self,
        num_items: int,
        negatives: int,
        width: int = 64,
        placement: Literal["sharded", "replicated"] = "sharded",
        deepspeed: str = "zero1",
        row_dtype: str = "float32",
    ):
        self.num_items = num_items
        self.generator = torch.Generator().manual_seed(dist.get_rank())
        loss = LossSettings(kind="sampled", negatives=negatives)
        settings = OptimizerSettings()
        self.learning_rate = settings.learning_rate
        counts = item_counts(num_items)
        if placement == "sharded":
            dtype = getattr(torch, row_dtype)
            self.table = ShardedItemTable(num_items, width, 0, loss, counts, CPU, dtype)
            self.row_optimizer = row_optimizer(TABLE_OPTIMIZER, self.table, settings)
        else:
            self.table = ItemTable(num_items, width, 0, loss, counts)
            self.row_optimizer = None
        gpt = GPT(ModelSettings(width=width, members=1, max_history=HISTORY_TOKENS))
        self.engine = DenseEngine(NextItemModel(gpt, self.table), settings, read_deepspeed_config(deepspeed))
        self.updated_rows = 0
        """Of this rank, in the last step."""

    def batch(self, tokens: int) -> TrainingBatch:
        """A new one each time; every position has a target."""
        assert tokens % HISTORY_TOKENS == 0
        inputs, targets = draw_items(self.generator, 2 * tokens, self.num_items).chunk(2)
        histories = tokens // HISTORY_TOKENS
        return TrainingBatch(
            item_index_T=inputs,
            target_T=targets,
            segment_T=torch.zeros_like(inputs),
            position_T=torch.arange(HISTORY_TOKENS).repeat(histories),
            offsets=torch.arange(histories + 1) * HISTORY_TOKENS,
            user_row_B=torch.zeros(histories, dtype=torch.int64),
        )

    def step(self, batch: TrainingBatch) -> None:
        """The whole step: lookup, GPT, loss, backward, engine, table optimizer."""
        # All ranks have as many targets, and the engine takes the mean over ranks.
        self.engine.backward(self.engine(batch) / len(batch.target_T))
        if self.row_optimizer is None:
            self.engine.step(self.learning_rate)
            return
        rows, gradient = self.table.take_gradient()
        self.engine.step(self.learning_rate)
        self.row_optimizer.step(rows, gradient, self.learning_rate)
        self.updated_rows = len(gradient)

    def table_step(self, batch: TrainingBatch) -> None:
        """The table's own part: lookup, loss, backward, table optimizer, as if the GPT were the identity."""
        vector_TD = self.table(batch.item_index_T)
        (self.table.loss_sum(vector_TD, batch.target_T) / len(batch.target_T)).backward()
        rows, gradient = self.table.take_gradient()
        self.row_optimizer.step(rows, gradient, self.learning_rate)


def growing_table(
    num_items: int, compared_items: int, tokens: list[int], steps: int, **settings: Any
) -> dict[str, Any]:
    """Peak memory with one table; then the steps of this one and of another, taking turns.

    ``steps`` holds an entry for each number of tokens: seconds of whole steps and of the table's part,
    first those with ``num_items``, then those with ``compared_items``; and the rows that a step updates.
    """
    init_process_group()
    table = Training(num_items, **settings)
    timed_in_turns([table], Training.step, tokens[0], 0)
    peak = peak_memory()
    pair = [table, Training(compared_items, **settings)]
    timings = []
    for number in tokens:
        timings.append(
            {
                "whole": timed_in_turns(pair, Training.step, number, steps),
                "table": timed_in_turns(pair, Training.table_step, number, steps),
                "updated_rows": [training.updated_rows for training in pair],
            }
        )
    return {"peak": peak, "steps": timings}


def table_in_its_place(
    num_items: int, small_items: int, tokens: list[int], steps: int, **settings: Any
) -> dict[str, Any]:
    """Peak memory with a small table and with the one asked for; its seconds for each number of tokens."""
    init_process_group()
    timed_in_turns([Training(small_items, **settings)], Training.step, tokens[0], 0)
    small_peak = peak_memory()
    training = Training(num_items, **settings)
    timed_in_turns([training], Training.step, tokens[0], 0)
    peak = peak_memory()
    seconds = [timed_in_turns([training], Training.step, number, steps)[0] for number in tokens]
    return {"small_peak": small_peak, "peak": peak, "seconds": seconds}


def lookup_steps(
    num_rows: int, width: int, tokens: int, steps: int, learning_rate: float, epsilon: float, vectors: str
) -> list[float]:
    """Seconds of each step of the lookup workload; see ``benchmarks.yardsticks.torchrec_table``."""
    workload = LookupWorkload(dist.get_rank(), num_rows, width, tokens, steps)
    table = ShardedTable(num_rows, width, 0, CPU)
    table.rows.copy_(workload.rows(table.first, table.end))
    optimizer = row_optimizer(TABLE_OPTIMIZER, table, OptimizerSettings(epsilon=epsilon))

    def step(ids: Tensor, gradient: Tensor) -> None:
        table(ids).backward(gradient)
        optimizer.step(*table.take_gradient(), learning_rate)

    seconds = workload.measure(step)
    np.save(f"{vectors}-{dist.get_rank()}.npy", table(workload.used()).detach().numpy())
    return seconds


def bytes_of_steps(tables: list[tuple[int, str]], tokens: int, **settings: Any) -> list[dict[str, int]]:
    """For tables of (items, type of row): bytes that this rank hands over in a whole step, by collective.

    And ``unique_ids``: those that it looks up.
    """
    init_process_group()
    result = []
    for num_items, row_dtype in tables:
        training = Training(num_items, row_dtype=row_dtype, **settings)
        batch = training.batch(tokens)
        collectives.traffic.clear()
        training.step(batch)
        result.append({"unique_ids": len(batch.item_index_T.unique()), **collectives.traffic})
    return result


def timed_in_turns(
    trainings: Sequence[Training],
    step: Callable[[Training, TrainingBatch], None],
    tokens: int,
    count: int,
) -> list[list[float]]:
    """Seconds of ``count`` steps of each, after some to warm up; batches are made outside."""
    seconds: list[list[float]] = [[] for _ in trainings]
    for _ in range(WARM_UP_STEPS + count):
        for training, mine in zip(trainings, seconds, strict=True):
            batch = training.batch(tokens)
            dist.barrier()
            start = time.perf_counter()
            step(training, batch)
            mine.append(time.perf_counter() - start)
    return [mine[WARM_UP_STEPS:] for mine in seconds]
