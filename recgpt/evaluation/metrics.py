"""Hit rate, NDCG and MRR, from the rank of each user's one held-out item.

Over U users, with r_u the rank of the held-out item in the list that is served to user u
(1 = first; infinite if it is not in the list):

    hit_rate@k = 1/U * sum_u [r_u <= k]
    ndcg@k     = 1/U * sum_u [r_u <= k] / log2(1 + r_u)     (one relevant item: the ideal DCG is 1)
    mrr        = 1/U * sum_u 1 / r_u                        (over the whole served list)

"Recall" names the retrieval stage in this project, so the metric is called hit rate.
"""

import numpy as np
import numpy.typing as npt

CUTOFFS = (5, 10, 20)

Ranks = npt.NDArray[np.float64]


def served_ranks(
    item_index_BK: npt.NDArray[np.int64],
    score_BK: npt.NDArray[np.floating],
    step_BK: npt.NDArray[np.int8],
    target_B: npt.NDArray[np.integer],
) -> Ranks:
    """The rank of each target in its served list, float64 [B]; infinite where it is not in the list.

    Ties are broken against the model: candidates of the same step with a score equal to the
    target's count as ahead of it, wherever they stand. Scores of different steps are not compared.
    """
    found_BK = item_index_BK == target_B[:, None]
    rows = np.arange(len(target_B))
    place_B = found_BK.argmax(1) if found_BK.size else np.zeros(len(target_B), np.int64)
    behind_BK = np.arange(item_index_BK.shape[1]) > place_B[:, None]
    tied_BK = (score_BK == score_BK[rows, place_B][:, None]) & (step_BK == step_BK[rows, place_B][:, None])
    rank_B = place_B + 1 + (behind_BK & tied_BK).sum(1)
    return np.where(found_BK.any(1), rank_B, np.inf)


def rank_metrics(ranks: Ranks) -> dict[str, float]:
    """All metrics of a non-empty array of ranks (see above); keys like ``hit_rate@10``, ``mrr``."""
    gains = 1.0 / np.log2(1.0 + ranks)
    metrics = {f"hit_rate@{k}": float(np.mean(ranks <= k)) for k in CUTOFFS}
    metrics |= {f"ndcg@{k}": float(np.mean(np.where(ranks <= k, gains, 0.0))) for k in CUTOFFS}
    return metrics | {"mrr": float(np.mean(1.0 / ranks))}
