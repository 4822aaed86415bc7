"""The floor under recall: a matrix product and the best k of each step, and nothing else.

By torch in blocks, and by faiss. Needs numpy, torch and, for its part, faiss alone: ``faiss_seconds`` runs in
an environment of its own.

Shapes: B interest vectors, D width, V items, N items in a block, K items found.
"""

import time

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

FloatArray = npt.NDArray[np.float32]


def random_rows(count: int, width: int, seed: int) -> FloatArray:
    """Standard normal vectors, [count, width], made in place: no memory besides theirs is taken."""
    rows = np.empty((count, width), np.float32)
    np.random.default_rng(seed).standard_normal(out=rows, dtype=np.float32)
    return rows


class BlockSearch:
    """Products block by block, the best of each block, and the best of these."""

    def __init__(self, item_VD: Tensor, batch: int, block_items: int):
        self.item_VD = item_VD
        self.block_items = min(block_items, len(item_VD))
        self.buffer = torch.empty(batch * self.block_items)

    @torch.inference_mode()
    def search(self, interest_BD: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores [B, K], the best first, and places in the table, int64 [B, K]."""
        scores, items = [], []
        for start in range(0, len(self.item_VD), self.block_items):
            block_ND = self.item_VD[start : start + self.block_items]
            score_BN = self.buffer[: len(interest_BD) * len(block_ND)].view(len(interest_BD), -1)
            torch.mm(interest_BD, block_ND.T, out=score_BN)
            score_BK, place_BK = score_BN.topk(min(k, len(block_ND)), dim=1)
            scores.append(score_BK)
            items.append(place_BK + start)
        score_BK, place_BK = torch.cat(scores, 1).topk(k, dim=1)
        return score_BK, torch.cat(items, 1).gather(1, place_BK)


def faiss_seconds(
    num_items: int,
    width: int,
    quotas: list[int],
    batch_users: int,
    blocks: list[int],
    batches: int,
    turns: int,
) -> dict[str, list[float]]:
    """Seconds that each turn takes with faiss: ``batches`` of users, a search for each quota.

    Each of ``blocks`` is a side of its own: the items that faiss scores at a time. It takes as
    many threads as OMP_NUM_THREADS allows.
    """
    import faiss

    # Matrix products from so many queries on: faiss 1.15 otherwise goes through a batch of 256 one by one.
    faiss.cvar.distance_compute_blas_threshold = 20
    index = faiss.IndexFlatIP(width)
    index.add(random_rows(num_items, width, seed=0))
    interest_BD = random_rows(batch_users, width, seed=1)
    seconds: dict[str, list[float]] = {}
    for block_items in blocks:
        faiss.cvar.distance_compute_blas_database_bs = block_items
        taken = seconds.setdefault(f"faiss, {block_items:,} items at a time", [])
        for _ in range(1 + turns):
            begun = time.perf_counter()
            for quota in quotas * batches:
                index.search(interest_BD, quota)
            taken.append(time.perf_counter() - begun)
    return {side: taken[1:] for side, taken in seconds.items()}  # the first is a warm-up
