"""An item table that is divided over Ray actors, for catalogues that do not fit one of them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray_jobs.actor_pool import actor_class, wait_for_room

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from recgpt.retrieval.sharded_index import Bounds, IndexShard, ShardedIndex

REQUEST_RETRIES = 5  # of a request whose actor dies; the actor is started again without end


class ShardHolder:
    """What one actor does: it holds the rows of one shard and answers requests about them.

    Args:
        bounds: its first item, and the one after its last.
        allowed: ascending indices of the items that may be found; None: all.
    """

    def __init__(
        self, model_url: str, bounds: "Bounds", block_items: int, allowed: "npt.NDArray[np.int64] | None"
    ):
        import torch

        torch.set_num_threads(1)
        self.model_url = model_url
        self.bounds = bounds
        self.block_items = block_items
        self.allowed = allowed
        self.shard: IndexShard | None = None

    def load(self) -> None:
        """Load the rows, once; not while the actor is made, where no error gets out whole."""
        import torch

        from recgpt.retrieval.index_loading import load_shard

        if self.shard is None:
            allowed = None if self.allowed is None else torch.tensor(self.allowed)
            self.shard = load_shard(self.model_url, self.bounds, self.block_items, allowed)

    def answer(self, method: str, *arguments: Any) -> Any:
        """What a method of the shard returns. Arrays go both ways in place of tensors: Ray hands them on as
        they are, where it would pack a tensor's bytes into others first."""
        import torch

        self.load()  # a no-op, unless the actor was started again after a crash
        # Ray's arrays are read-only, and lie anywhere in memory: see `open_item_table`.
        tensors = [value if isinstance(value, int) else torch.tensor(value) for value in arguments]
        answer = getattr(self.shard, method)(*tensors)
        return tuple(part.numpy() for part in answer) if isinstance(answer, tuple) else answer.numpy()


@dataclass(frozen=True)
class Shards:
    """The actors that hold an item table; can be sent to other actors."""

    bounds: "list[Bounds]"
    actors: list[Any]

    def index(self) -> "ShardedIndex":
        from recgpt.retrieval.sharded_index import ShardedIndex

        return ShardedIndex(self.bounds, self._ask)

    def _ask(self, method: str, arguments: Mapping[int, tuple[Any, ...]]) -> dict[int, Any]:
        import ray
        import torch

        requests = {
            shard: self.actors[shard].answer.remote(
                method, *(value if isinstance(value, int) else value.numpy() for value in values)
            )
            for shard, values in arguments.items()
        }
        answers = ray.get(list(requests.values()))

        def tensors(answer: Any) -> Any:
            return tuple(map(torch.tensor, answer)) if isinstance(answer, tuple) else torch.tensor(answer)

        return dict(zip(requests, map(tensors, answers), strict=True))


@contextmanager
def started_shards(
    model_url: str, block_items: int, shards: int, allowed: "npt.NDArray[np.int64] | None" = None
) -> Iterator[Shards]:
    """Actors that hold the item table of an exported model between them, one CPU each, while the block runs.

    Fewer than ``shards`` where there are fewer blocks of ``block_items`` items. An actor that dies is
    started again, loads again, and answers what it had been asked.
    """
    import ray
    import torch

    from recgpt.model.export import read_info
    from recgpt.retrieval.sharded_index import shard_bounds

    num_items = read_info(model_url).num_items
    bounds = shard_bounds(
        num_items, block_items, shards, None if allowed is None else torch.from_numpy(allowed)
    )
    holder = actor_class(ShardHolder, REQUEST_RETRIES)
    shared_allowed = None if allowed is None else ray.put(allowed)  # kept, for actors that start again
    actors = [holder.remote(model_url, part, block_items, shared_allowed) for part in bounds]
    try:
        wait_for_room(actors, len(actors), "index shards")
        ray.get([actor.load.remote() for actor in actors])
        yield Shards(bounds, actors)
    finally:
        for actor in actors:
            ray.kill(actor)
