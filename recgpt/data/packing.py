"""Token-budget batches of whole histories laid end to end: cost follows interactions, not padding.

Shapes: T tokens of B histories. A history of n items gives n - 1 inputs and n - 1 targets (at most
``max_history``, the newest): input x_t has target x_{t+1}, so no target crosses two users.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from recgpt.data.arrow import offsets_of
from recgpt.data.plan import LANE
from recgpt.data.sequences import history_lists
from recgpt.schema import USER_HASH


@dataclass
class PackedBatch:
    """Histories laid end to end, with the next item of each as target."""

    item_index_T: Tensor  # int64
    target_T: Tensor  # int64
    offsets: Tensor  # int64 [B + 1]
    user_hash_B: Tensor  # int64

    def split(self, parts: int) -> list["PackedBatch"]:
        """Whole histories, in order, in ``parts`` batches of about equal size, some perhaps empty."""
        if parts == 1:
            return [self]
        ends = torch.arange(1, parts + 1) * len(self.item_index_T) // parts
        bounds = [0, *torch.searchsorted(self.offsets, ends).tolist()]
        return [self._histories(start, end) for start, end in itertools.pairwise(bounds)]

    def _histories(self, start: int, end: int) -> "PackedBatch":
        first, last = int(self.offsets[start]), int(self.offsets[end])
        return PackedBatch(
            self.item_index_T[first:last],
            self.target_T[first:last],
            self.offsets[start : end + 1] - first,
            self.user_hash_B[start:end],
        )


@dataclass
class Histories:
    """Histories of several users: list ``values[offsets[i]:offsets[i + 1]]`` is that of user i."""

    values: np.ndarray  # int32
    offsets: np.ndarray  # int64 [B + 1]
    user_hash: np.ndarray  # int64 [B]

    @classmethod
    def from_table(cls, table: pa.Table) -> "Histories":
        values, offsets = history_lists(table)
        return cls(values, offsets, table[USER_HASH].to_numpy())

    @classmethod
    def empty(cls) -> "Histories":
        return cls(np.empty(0, np.int32), np.zeros(1, np.int64), np.empty(0, np.int64))

    @classmethod
    def concatenate(cls, parts: Sequence["Histories"]) -> "Histories":
        if not parts:
            return cls.empty()
        lengths = np.concatenate([np.diff(part.offsets) for part in parts])
        return cls(
            np.concatenate([part.values for part in parts]),
            offsets_of(lengths),
            np.concatenate([part.user_hash for part in parts]),
        )

    def __len__(self) -> int:
        return len(self.user_hash)

    def slice(self, start: int, end: int) -> "Histories":
        offsets = self.offsets[start : end + 1]
        values = self.values[offsets[0] : offsets[-1]]
        return Histories(values, offsets - offsets[0], self.user_hash[start:end])

    def select(self, users: np.ndarray) -> "Histories":
        """The histories of the given users (positions), in that order."""
        lengths = np.diff(self.offsets)[users]
        offsets = offsets_of(lengths)
        source = np.arange(offsets[-1]) + np.repeat(self.offsets[:-1][users] - offsets[:-1], lengths)
        return Histories(self.values[source], offsets, self.user_hash[users])

    def num_tokens(self, max_history: int) -> np.ndarray:
        """Inputs that each history gives, int64 [B]."""
        return np.clip(np.diff(self.offsets) - 1, 0, max_history)


def pack(histories: Histories, max_history: int) -> PackedBatch:
    """One batch of all the histories; those of fewer than two items give nothing."""
    tokens = histories.num_tokens(max_history)
    kept = tokens > 0
    tokens = tokens[kept]
    offsets = offsets_of(tokens)
    first_input = histories.offsets[1:][kept] - 1 - tokens
    inputs = np.arange(offsets[-1]) + np.repeat(first_input - offsets[:-1], tokens)
    return PackedBatch(
        torch.from_numpy(histories.values[inputs].astype(np.int64)),
        torch.from_numpy(histories.values[inputs + 1].astype(np.int64)),
        torch.from_numpy(offsets),
        torch.from_numpy(histories.user_hash[kept].astype(np.int64)),
    )


class LaneBatches:
    """Cuts the histories of one lane into batches of at most ``budget`` tokens (at least one history)."""

    def __init__(self, budget: int, max_history: int):
        self._budget = budget
        self._max_history = max_history
        self._histories = Histories.empty()
        self._tokens_before = np.zeros(1, np.int64)  # [B + 1], tokens in the histories before each one
        self._taken = 0  # of the histories, those that batches have had

    def add(self, histories: Histories) -> None:
        waiting = self._histories.slice(self._taken, len(self._histories))
        self._histories = Histories.concatenate([waiting, histories])
        self._tokens_before = offsets_of(self._histories.num_tokens(self._max_history))
        self._taken = 0

    def has_full_batch(self) -> bool:
        """True if what follows cannot change the next batch."""
        return self._tokens_before[-1] - self._tokens_before[self._taken] > self._budget

    def next_batch(self) -> Histories:
        """The next batch; empty if nothing is waiting."""
        # A batch costs what it holds, however much is waiting: nothing here goes over all of it.
        limit = self._tokens_before[self._taken] + self._budget
        first, end = self._taken, int(np.searchsorted(self._tokens_before, limit, side="right")) - 1
        self._taken = min(max(end, first + 1), len(self._histories))
        return self._histories.slice(first, self._taken)


@dataclass
class LaneStep:
    """What a rank does in one step: its batch, and how many users of each lane it took."""

    batch: PackedBatch
    users: dict[int, int]  # lane -> users consumed


def lane_steps(
    tables: Iterable[pa.Table], lanes: Sequence[int], budget: int, max_history: int
) -> Iterator[LaneStep]:
    """Steps of one rank over its lanes until all are exhausted.

    Args:
        tables: the lanes' histories as ``read_unit`` gives them, in reading order.
        lanes: the lanes of this rank.
        budget: tokens per step and lane.
    """
    source = iter(tables)
    batches = {lane: LaneBatches(budget, max_history) for lane in lanes}
    exhausted = False
    while True:
        while not exhausted and not all(lane.has_full_batch() for lane in batches.values()):
            table = next(source, None)
            exhausted = table is None
            for lane, part in _by_lane(table) if table is not None else ():
                batches[lane].add(part)
        taken = {lane: lane_batches.next_batch() for lane, lane_batches in batches.items()}
        users = {lane: len(histories) for lane, histories in taken.items()}
        if not any(users.values()):
            return
        yield LaneStep(pack(Histories.concatenate(list(taken.values())), max_history), users)


def empty_step(lanes: Sequence[int]) -> LaneStep:
    """What a rank contributes to a step after its lanes are exhausted."""
    return LaneStep(pack(Histories.empty(), 1), dict.fromkeys(lanes, 0))


def _by_lane(table: pa.Table) -> Iterator[tuple[int, Histories]]:
    """Consecutive rows of the same lane; a table may hold several."""
    lane = table[LANE].to_numpy()
    bounds = np.concatenate([[0], np.flatnonzero(np.diff(lane)) + 1, [len(lane)]])
    for start, end in zip(bounds[:-1], bounds[1:], strict=True):
        if start < end:
            yield int(lane[start]), Histories.from_table(table.slice(start, end - start))
