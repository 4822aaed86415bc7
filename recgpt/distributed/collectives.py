"""The collectives that the sharded parts need, behind one interface; without a process group, no-ops.

Every call is collective: all ranks must make it, in the same order, also those with nothing to send.
``traffic`` and ``seconds`` count the bytes that this rank hands over to each kind of call, and the time
that it spends in them.
"""

import contextlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Outcome = TypeVar("Outcome")

traffic: Counter[str] = Counter()
"""Bytes handed over by this rank since the start (or the last ``traffic.clear()``), by collective: the
size of what goes in, the share that stays on the rank included."""
seconds: defaultdict[str, float] = defaultdict(float)
"""Time in calls, likewise, waiting for other ranks included. With CUDA, calls return before they are done,
so that it is only what the process itself waits."""

_side_groups: list[dist.ProcessGroup] = []


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def side_group(timeout: timedelta) -> dist.ProcessGroup | None:
    """A group of all ranks for small things on the CPU, in a thread beside the training. Collective."""
    if world_size() == 1:
        return None
    group = dist.new_group(backend="gloo", timeout=timeout)
    _side_groups.append(group)
    return group


def give_up_after(timeout: timedelta) -> None:
    """Make collectives fail once they have waited that long, in all groups that there are but side groups."""
    if dist.is_initialized():
        for group in set(dist.distributed_c10d._pg_map).difference(_side_groups):
            dist.distributed_c10d._set_pg_timeout(timeout, group)


def barrier(group: dist.ProcessGroup | None = None) -> None:
    if world_size() > 1:
        dist.barrier(group)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Elementwise sum; in place, and returned."""
    if world_size() > 1:
        with counted("all_reduce", tensor):
            dist.all_reduce(tensor, dist.ReduceOp.SUM)
    return tensor


def max_over_ranks(tensor: Tensor) -> Tensor:
    """Elementwise maximum; in place, and returned."""
    if world_size() > 1:
        with counted("all_reduce", tensor):
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor


def gather_objects(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """``value``, something small, of every rank, in rank order."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size()
    dist.all_gather_object(values, value, group)
    return values


def on_every_rank(work: Callable[[], Outcome], group: dist.ProcessGroup | None = None) -> list[Outcome]:
    """What ``work()`` gives on each rank, something small, in rank order.

    If it raises on one rank, all ranks raise: nobody waits for a rank that has failed.
    """
    problem: Exception | None = None
    try:
        outcome: Any = work()
    except Exception as error:
        problem, outcome = error, None
    text = problem and f"{type(problem).__name__}: {problem}"
    outcomes = gather_objects((outcome, text), group)
    if problem is not None:
        raise problem
    for number, (_, text) in enumerate(outcomes):
        if text is not None:
            raise RuntimeError(f"rank {number} has failed: {text}")
    return [outcome for outcome, _ in outcomes]


def gather_sizes(size: int, device: torch.device) -> list[int]:
    """``size`` of every rank, in rank order."""
    if world_size() == 1:
        return [size]
    sizes = torch.empty(world_size(), dtype=torch.int64, device=device)
    mine = torch.tensor([size], device=device)
    with counted("sizes", mine):
        dist.all_gather_into_tensor(sizes, mine)
    return sizes.tolist()


def gather_rows(rows: Tensor, sizes: list[int]) -> Tensor:
    """The rows [n_r, ...] of all ranks, concatenated in rank order; ``sizes`` from ``gather_sizes``."""
    if world_size() == 1:
        return rows
    largest = max(sizes)
    padded = rows.new_zeros(largest, *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = rows.new_empty(world_size() * largest, *rows.shape[1:])
    with counted("all_gather", padded):
        dist.all_gather_into_tensor(gathered, padded)
    return torch.cat([gathered[r * largest : r * largest + size] for r, size in enumerate(sizes)])


def exchange_sizes(send_sizes: Tensor) -> Tensor:
    """How many rows each rank will send to this one: int64 [W] from int64 [W]."""
    if world_size() == 1:
        return send_sizes
    receive_sizes = torch.empty_like(send_sizes)
    with counted("sizes", send_sizes):
        dist.all_to_all_single(receive_sizes, send_sizes)
    return receive_sizes


def exchange_rows(rows: Tensor, send_sizes: list[int], receive_sizes: list[int]) -> Tensor:
    """All-to-all of rows [sum(send_sizes), ...], ordered by destination; returned ordered by source."""
    if world_size() == 1:
        return rows
    received = rows.new_empty(sum(receive_sizes), *rows.shape[1:])
    with counted("all_to_all", rows):
        dist.all_to_all_single(received, rows.contiguous(), receive_sizes, send_sizes)
    return received


@contextlib.contextmanager
def counted(kind: str, *tensors: Tensor) -> Iterator[None]:
    """Count a call that hands over ``tensors``."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        seconds[kind] += time.perf_counter() - begun
        traffic[kind] += sum(tensor.numel() * tensor.element_size() for tensor in tensors)
