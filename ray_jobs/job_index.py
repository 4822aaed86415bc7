"""Which index the actors of a job search: a table in each of them, a divided one, an approximate one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ray_jobs.index_shards import Shards, started_shards

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor

    from recgpt.retrieval.approximate_index import StoredIndex
    from recgpt.retrieval.index import Index


@dataclass(frozen=True)
class JobIndex:
    """The choice, which can be sent to actors; each then loads its own part of it."""

    model_url: str
    block_items: int
    shards: Shards | None
    approximate: "StoredIndex | None"

    def load(self, allowed: "Tensor | None" = None) -> "Index":
        """The index, for this process. ``allowed``: ascending indices of items to be found; None: all."""
        from recgpt.retrieval.index_loading import load_exact_index

        exact: Index
        if self.shards is None:
            exact = load_exact_index(self.model_url, self.block_items, allowed)
        else:
            exact = self.shards.index()
        return exact if self.approximate is None else self.approximate.load(exact, allowed)


@contextmanager
def job_index(
    model_url: str,
    block_items: int,
    shards: int = 0,
    approximate: "StoredIndex | None" = None,
    allowed: "npt.NDArray[np.int64] | None" = None,
) -> Iterator[JobIndex]:
    """The index of a job, whose shards run while the block does; ``shards`` 0: the table is not divided."""
    if not shards:
        yield JobIndex(model_url, block_items, None, approximate)
        return
    with started_shards(model_url, block_items, shards, allowed) as started:
        yield JobIndex(model_url, block_items, started, approximate)
