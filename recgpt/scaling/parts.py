"""Where the time of a training step goes: exclusive parts, which sum to the step.

A part is entered where this process begins something and left where that ends; inside of it another may be
entered, and time counts for the innermost part alone: what a lookup waits for in an exchange is exchange.
"""

import contextlib
import functools
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from recgpt.distributed import collectives
from recgpt.distributed.sharded_item_table import ShardedItemTable
from recgpt.distributed.sharded_table import ShardedTable
from recgpt.distributed.table_optimizer import RowOptimizer
from recgpt.model.item_table import ItemTable
from recgpt.training.engine import DenseEngine

PARTS = {
    "data_wait": "until the batch of the step is there",
    "agreement": "exchanges of a few numbers (what the step holds, whether it is finite), and in them the "
    "wait for slower ranks",
    "lookup": "rows of the items in the batch, without exchanges",
    "all_to_all": "ids, rows and their gradients between the ranks of a sharded table",
    "forward": "the GPT's forward pass",
    "loss": "the loss's forward pass, without exchanges",
    "loss_exchange": "interest vectors gathered, sums and gradients of the loss summed, with a sharded table",
    "backward": "the backward pass of all, without exchanges",
    "dense_exchange": "DeepSpeed's collectives: gradients reduced, weights gathered",
    "dense_update": "the engine's optimizer",
    "table_update": "gradients of sharded tables added up, and their optimizers",
    "rest": "all else: key of the random numbers, batch to tensors, the loop itself",
}
"""What counts as each part, in the order in which they are shown."""

_PLACES: tuple[tuple[type, str, str], ...] = (
    (ItemTable, "forward", "lookup"),
    (ShardedTable, "__call__", "lookup"),
    (DenseEngine, "__call__", "forward"),
    (ItemTable, "loss_sum", "loss"),
    (ShardedItemTable, "loss_sum", "loss"),
    (DenseEngine, "backward", "backward"),
    (DenseEngine, "step", "dense_update"),
    (ShardedTable, "take_gradient", "table_update"),
    (RowOptimizer, "step", "table_update"),
)


class PartTimer:
    """A stopwatch whose time goes to one part at a time.

    Args:
        clock: seconds.
        synchronize: called at each border; waits for what a device has been asked to do.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.perf_counter,
        synchronize: Callable[[], None] = lambda: None,
    ):
        self._clock = clock
        self._synchronize = synchronize
        self._inside: list[str] = []
        self.restart()

    def restart(self) -> None:
        """Forget all time so far; a part that is under way goes on."""
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._since = self._clock()

    def read(self) -> dict[str, float]:
        """Seconds of each of ``PARTS`` since the last ``restart``; their sum is all time since then."""
        self._charge()
        return {part: self._seconds[part] for part in PARTS}

    @property
    def innermost(self) -> str:
        return self._inside[-1] if self._inside else "rest"

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """What runs in this block counts as ``name``, except for parts entered inside of it."""
        self._charge()
        self._inside.append(name)
        try:
            yield
        finally:
            self._charge()
            self._inside.pop()

    def _charge(self) -> None:
        self._synchronize()
        now = self._clock()
        self._seconds[self.innermost] += now - self._since
        self._since = now


def device_timer() -> PartTimer:
    """A timer that waits for the GPU at each border, if there is one: without that, time would be charged
    where a result is waited for and not where it is computed. It makes steps a little slower."""
    if torch.cuda.is_available():
        return PartTimer(synchronize=torch.cuda.synchronize)
    return PartTimer()


@contextlib.contextmanager
def parts_charged_to(timer: PartTimer) -> Iterator[None]:
    """In this block the training of this process enters and leaves its parts on ``timer``."""
    counted = collectives.counted
    originals = [(owner, name, vars(owner)[name]) for owner, name, _ in _PLACES]

    @contextlib.contextmanager
    def timed(kind: str, *tensors: Tensor) -> Iterator[None]:
        with timer.part(_exchange(kind, timer.innermost)), counted(kind, *tensors):
            yield

    for owner, name, part in _PLACES:
        setattr(owner, name, _timed_call(vars(owner)[name], timer, part))
    collectives.counted = timed
    try:
        yield
    finally:
        collectives.counted = counted
        for owner, name, original in originals:
            setattr(owner, name, original)


def _timed_call(call: Callable[..., Any], timer: PartTimer, part: str) -> Callable[..., Any]:
    @functools.wraps(call)
    def timed(*arguments: Any, **named: Any) -> Any:
        with timer.part(part):
            return call(*arguments, **named)

    return timed


def _exchange(kind: str, inside: str) -> str:
    """The part of a collective: its kind as ``collectives.counted`` knows it, and the part that makes it."""
    if kind == "dense":
        return "dense_exchange"
    if kind == "all_to_all" or inside == "lookup":
        return "all_to_all"
    return "loss_exchange" if inside in ("loss", "backward") else "agreement"
