"""Measurements that several Ray actors make together, one rank each, joined by torch.distributed.

What ``recgpt.scaling.ranks`` does with processes of one machine, on all machines of a cluster.
"""

import importlib
import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ray_jobs.runtime import user_message
from recgpt.errors import UserError

if TYPE_CHECKING:
    import torch.distributed as dist

SECONDS_FOR_OTHER_FAILURES = 3.0


class RanksFailed(UserError):
    """A measurement that came to nothing, and why."""


class Rank:
    """One rank, in a process of its own, which makes one measurement and then ends."""

    def __init__(self) -> None:
        self._store: dist.Store | None = None

    def meeting_place(self) -> tuple[str, int]:
        """Rank 0: open the store through which the ranks find each other; returns its host and port."""
        import ray
        import torch.distributed as dist

        self._store = dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        return ray.util.get_node_ip_address(), self._store.port

    def measure(
        self,
        function: str,
        rank: int,
        world_size: int,
        place: tuple[str, int],
        backend: str,
        arguments: dict[str, Any],
    ) -> Any:
        """Join the others, and call ``MODULE:FUNCTION``."""
        import torch
        import torch.distributed as dist

        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        store = self._store or dist.TCPStore(*place, is_master=False)
        dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
        module, name = function.split(":")
        return getattr(importlib.import_module(module), name)(**arguments)


def run_rank_actors(
    function: str, world_size: int, threads: int, timeout_seconds: float, **arguments: Any
) -> list[Any]:
    """Call ``MODULE:FUNCTION`` in fresh processes of ``threads`` CPUs each; returns what each rank returned.

    Each has a GPU, if the cluster has that many. All processes are killed when this returns.
    Raises ``RanksFailed`` with the reason if a rank fails or dies, or if they take too long.
    """
    import ray

    deadline = time.monotonic() + timeout_seconds
    with_gpu = ray.cluster_resources().get("GPU", 0) >= world_size
    # DeepSpeed asks for a local rank: each process sees no GPU but its own.
    environment = {"OMP_NUM_THREADS": str(threads), "LOCAL_RANK": "0"}
    if not with_gpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""  # Ray would leave all of them to see
    kind = ray.remote(num_cpus=threads, num_gpus=int(with_gpu), runtime_env={"env_vars": environment})(Rank)
    ranks = [kind.remote() for _ in range(world_size)]
    try:
        up = [rank.__ray_ready__.remote() for rank in ranks]
        started, _ = ray.wait(up, num_returns=world_size, timeout=timeout_seconds)
        if len(started) < world_size:
            cpus = ray.cluster_resources().get("CPU", 0)
            raise RanksFailed(
                f"{len(started)} of {world_size} processes of {threads} CPUs started within "
                f"{timeout_seconds:g} s; the cluster has {cpus:g} CPUs"
            )
        (place,) = _results([ranks[0].meeting_place.remote()], deadline)
        backend = "nccl" if with_gpu else "gloo"
        calls = [
            rank.measure.remote(function, number, world_size, place, backend, arguments)
            for number, rank in enumerate(ranks)
        ]
        return _results(calls, deadline)
    finally:
        for rank in ranks:
            ray.kill(rank)


def _results(calls: Sequence[Any], deadline: float) -> list[Any]:
    """What the calls return, in their order; as soon as one fails, all have failed."""
    import ray

    waiting = list(calls)
    while waiting:
        done, waiting = ray.wait(waiting, num_returns=1, timeout=max(deadline - time.monotonic(), 0))
        if not done:
            raise RanksFailed(f"{len(waiting)} of {len(calls)} ranks were not ready in time")
        error = _error(done[0])
        if error is None:
            continue
        errors = {calls.index(done[0]): error}
        # Of a process that died, the others may be the first to tell, as of a broken connection.
        others, _ = ray.wait(waiting, num_returns=len(waiting), timeout=SECONDS_FOR_OTHER_FAILURES)
        errors |= {calls.index(call): other for call in others if (other := _error(call)) is not None}
        died = [number for number, error in errors.items() if _is_death(error)]
        number = (died or list(errors))[0]
        raise RanksFailed(f"rank {number} of {len(calls)}: {_reason(errors[number])}")
    return ray.get(list(calls))


def _error(call: Any) -> Exception | None:
    import ray

    try:
        ray.get(call)
    except Exception as error:
        return error
    return None


def _is_death(error: Exception) -> bool:
    import ray

    return isinstance(error, ray.exceptions.RayActorError)


def _reason(error: Exception) -> str:
    if _is_death(error):
        return f"its process died, perhaps for want of memory ({' '.join(str(error).split())[:300]})"
    # What Ray raises ends with the last line of the traceback in the other process.
    return user_message(error) or str(error).strip().splitlines()[-1]
