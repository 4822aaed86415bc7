"""The work that two tables are given to do alike: ids, upstream gradients and initial rows, from seeds.

Shapes: T ids of a rank and step, D width. Needs numpy and torch alone: a yardstick imports it too.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

_SPREAD = 2_654_435_761  # a prime: numbers modulo anything smaller come back in another order
_CHUNK = 2**20


def draw_items(generator: torch.Generator, size: int, num_items: int) -> Tensor:
    """Items 1 to ``num_items``, int64 [size]; the k-th most popular comes up in proportion to log(1 + 1 / k).

    Popular items lie scattered over the table, as in a vocabulary ordered by hash.
    """
    uniform = torch.rand(size, generator=generator, dtype=torch.float64)
    rank = ((num_items + 1) ** uniform).long().clamp(1, num_items) - 1
    return _item_of_rank(rank, num_items)


def item_counts(num_items: int, mean: int = 10) -> Tensor:
    """How often each row occurs in a log with ``mean`` such draws per item, int64 [num_items + 1]."""
    counts = torch.zeros(num_items + 1, dtype=torch.int64)
    scale = mean * num_items / math.log(num_items + 1)
    for first in range(0, num_items, _CHUNK):
        rank = torch.arange(first, min(first + _CHUNK, num_items))
        expected = scale * torch.log1p(1 / (rank + 1).double())
        counts[_item_of_rank(rank, num_items)] = expected.ceil().long()
    return counts


def _item_of_rank(rank: Tensor, num_items: int) -> Tensor:
    assert math.gcd(_SPREAD, num_items) == 1
    return 1 + rank * _SPREAD % num_items


@dataclass
class LookupWorkload:
    """Steps of one rank: look up ids, get a gradient for the vectors, update the rows."""

    rank: int
    num_rows: int
    width: int
    tokens: int
    steps: int

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """Ids, int64 [T], and upstream gradient, float32 [T, D]."""
        generator = torch.Generator().manual_seed(step * 1000 + self.rank)
        ids = draw_items(generator, self.tokens, self.num_rows) - 1
        return ids, torch.randn(self.tokens, self.width, generator=generator)

    def rows(self, first: int, end: int) -> Tensor:
        """Initial rows ``first`` to ``end``, float32 [end - first, D]."""
        generator = np.random.default_rng(0)
        generator.bit_generator.advance(first * self.width)
        return torch.from_numpy(generator.random((end - first, self.width)).astype(np.float32))

    def measure(self, step: Callable[[Tensor, Tensor], None]) -> list[float]:
        """Seconds of each step; ids and gradient are made outside."""
        seconds = []
        for number in range(self.steps):
            batch = self.batch(number)
            dist.barrier()
            start = time.perf_counter()
            step(*batch)
            seconds.append(time.perf_counter() - start)
        return seconds

    def used(self) -> Tensor:
        """The distinct ids of all steps, ascending."""
        return torch.cat([self.batch(step)[0] for step in range(self.steps)]).unique()
