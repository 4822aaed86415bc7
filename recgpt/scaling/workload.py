"""What a step of a training holds: measured on the first steps of a dataset, without training."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from recgpt.config import TrainSettings
from recgpt.data.dataset import HistoryDataset
from recgpt.data.packing import LaneStep, PackedBatch, lane_steps
from recgpt.data.plan import epoch_units, read_unit
from recgpt.data.sequences import resolve_time_bounds
from recgpt.errors import UserError

_MOST_STEPS = 20
_MOST_LANES = 4
_MADE_UP_STEPS = 100


@dataclass(frozen=True)
class StepLoad:
    """Of one step, over all ranks, on average."""

    users: float
    tokens: float
    """Inputs of the GPT; as many targets."""
    attended_pairs: float
    """(token, token it attends to) in all histories."""
    distinct_items: float
    """Different items of each rank, summed over the ranks: rows that a sharded table sends."""


@dataclass(frozen=True)
class Workload:
    """A training on a dataset."""

    num_items: int
    num_users: int
    load: StepLoad
    steps_per_epoch: float
    imbalance: float = 1.0
    """Inputs of a step's largest rank, by those of the mean one: the others wait for it."""


def measure_workload(dataset: HistoryDataset, settings: TrainSettings) -> Workload:
    """Pack the first steps of an epoch, as ``settings.workers`` ranks would, and count.

    Raises ``UserError`` if no history has a training target.
    """
    loads = [
        _load(step.batch, sum(step.users.values()), settings.workers)
        for step in itertools.islice(steps_of_one_worker(dataset, settings), _MOST_STEPS)
        if len(step.batch.target_T)
    ]
    if not loads:
        raise UserError(f"{dataset.url}: no history has a training target; choose a log with longer ones")
    values = np.array([[load.users, load.tokens, load.attended_pairs, load.distinct_items] for load in loads])
    # The last step of a small dataset is not full; it is a step all the same.
    mean = StepLoad(*values.mean(0).tolist())
    return Workload(
        dataset.num_items,
        dataset.num_users,
        mean,
        dataset.num_users / mean.users,
        _imbalance(dataset, settings),
    )


def _imbalance(dataset: HistoryDataset, settings: TrainSettings) -> float:
    """Of made-up steps, whose lanes have each as much as some lane had in one of the first steps."""
    if settings.workers == 1:
        return 1.0
    of_a_lane = [
        len(step.batch.target_T)
        for lane in range(min(settings.data.lanes, _MOST_LANES))
        for step in itertools.islice(_steps(dataset, settings, [lane]), _MOST_STEPS)
    ]
    lanes_per_rank = -(-settings.data.lanes // settings.workers)
    draw = np.random.default_rng(settings.seed)
    ranks = draw.choice(of_a_lane, (_MADE_UP_STEPS, settings.workers, lanes_per_rank)).sum(2)
    return float((ranks.max(1) / ranks.mean(1)).mean())


def steps_of_one_worker(dataset: HistoryDataset, settings: TrainSettings) -> Iterator[LaneStep]:
    """Those of the first epoch, with the batches of all ranks together, as the trainer makes them."""
    return _steps(dataset, settings, list(range(settings.data.lanes)))


def _steps(dataset: HistoryDataset, settings: TrainSettings, lanes: list[int]) -> Iterator[LaneStep]:
    data = settings.data
    bounds = resolve_time_bounds(data.split, dataset.manifest)
    units = epoch_units(
        row_counts=[group.rows for group in dataset.row_groups],
        lanes=lanes,
        total_lanes=data.lanes,
        window_users=data.shuffle_window_users,
        shuffle=(settings.seed, 0),
        consumed=[0] * data.lanes,
    )
    tables = (read_unit(dataset, unit, data.split, bounds) for unit in units)
    budget = -(-data.tokens_per_batch // data.lanes)
    return lane_steps(tables, lanes, budget, settings.model.max_history)


def _load(batch: PackedBatch, users: int, workers: int) -> StepLoad:
    lengths = batch.offsets.diff().double()
    # Ranks take whole histories; equal parts of the tokens are close to that.
    parts = torch.tensor_split(batch.item_index_T, workers)
    return StepLoad(
        users=users,
        tokens=len(batch.item_index_T),
        attended_pairs=float((lengths * (lengths + 1) / 2).sum()),
        distinct_items=sum(len(part.unique()) for part in parts),
    )
