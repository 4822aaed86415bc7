"""Hit rate, NDCG and MRR, from the rank of each user's one held-out item.

Over U users, with r_u the rank of the held-out item in the list that is served to user u
(1 = first; infinite if it is not in the list):

    hit_rate@k = 1/U * sum_u [r_u <= k]
    ndcg@k     = 1/U * sum_u [r_u <= k] / log2(1 + r_u)     (one relevant item: the ideal DCG is 1)
    mrr        = 1/U * sum_u 1 / r_u                        (over the whole served list)

"Recall" names the retrieval stage in this project, so the metric is called hit rate.

Shapes: B users of a batch, K places in a list, U users in all.
"""

import numpy as np
import numpy.typing as npt

from recgpt.evaluation.bootstrap import Interval, paired_bootstrap

CUTOFFS = (5, 10, 20)
COMPARED_NDCG = 10

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


def ranks_with_seen_at_zero(
    item_index_BK: npt.NDArray[np.int64],
    score_BK: npt.NDArray[np.floating],
    step_BK: npt.NDArray[np.int8],
    target_B: npt.NDArray[np.integer],
    num_seen_B: npt.NDArray[np.integer],
    target_seen_B: npt.NDArray[np.bool_],
) -> Ranks:
    """The ranks, float64 [B], if seen items had score 0 in every step, computed from lists without them.

    Args:
        num_seen_B: distinct items that the user has seen, the target included if it is one of them.
        target_seen_B: whether it is.

    Ties are broken against the model here, too:

    - A target with a score above 0 keeps its rank.
    - A target with a score of 0 or less falls behind all seen items: its rank grows by ``num_seen_B``.
    - A target that was seen has score 0 itself. It stands in the first step that has a place for it, the
      first whose list holds a score below 0 or is not full: behind all steps before, all scores of 0 or
      more in this one, and all other seen items.

    Ranks beyond K are infinite. For one step this is what ranking all items would give. With more steps, seen
    items count within the whole list, and not within the quota of a step.
    """
    rank_B = served_ranks(item_index_BK, score_BK, step_BK, target_B)
    found_BK = item_index_BK == target_B[:, None]
    overtaken_B = (found_BK & (score_BK <= 0)).any(1)
    below_BK = score_BK < 0
    ahead_B = np.where(below_BK.any(1), (~np.logical_or.accumulate(below_BK, axis=1)).sum(1), np.inf)
    rank_B = np.where(target_seen_B, ahead_B + num_seen_B, rank_B + overtaken_B * num_seen_B)
    return np.where(rank_B <= item_index_BK.shape[1], rank_B, np.inf)


def hit_rate_cutoffs(k: int | None) -> tuple[int, ...]:
    """Where hit rates are cut off for lists of ``k`` (None: of no certain length): also at their end."""
    return CUTOFFS if k is None or k in CUTOFFS else (*CUTOFFS, k)


def metric_names(k: int | None = None) -> tuple[str, ...]:
    """What ``rank_metrics`` computes for lists of ``k``."""
    hit_rates = (f"hit_rate@{cutoff}" for cutoff in hit_rate_cutoffs(k))
    return (*hit_rates, *(f"ndcg@{cutoff}" for cutoff in CUTOFFS), "mrr")


def rank_metrics(ranks: Ranks, k: int | None = None) -> dict[str, float]:
    """All metrics of a non-empty array of ranks (see above); keys like ``hit_rate@10``, ``mrr``.

    Lists of ``k`` have a hit rate at ``k``, too.
    """
    metrics = {f"hit_rate@{cutoff}": float(np.mean(ranks <= cutoff)) for cutoff in hit_rate_cutoffs(k)}
    metrics |= {f"ndcg@{cutoff}": float(np.mean(_gains(ranks, cutoff))) for cutoff in CUTOFFS}
    return metrics | {"mrr": float(np.mean(1.0 / ranks))}


def difference(ranks_U: Ranks, other_U: Ranks, k: int) -> dict[str, Interval]:
    """By how much lists of ``k`` are better than others of the same users: ``hit_rate@k`` and ``ndcg@10``."""
    hits_U = (ranks_U <= k).astype(np.float64) - (other_U <= k)
    gains_U = _gains(ranks_U, COMPARED_NDCG) - _gains(other_U, COMPARED_NDCG)
    return {
        f"hit_rate@{k}": paired_bootstrap(hits_U),
        f"ndcg@{COMPARED_NDCG}": paired_bootstrap(gains_U),
    }


def _gains(ranks: Ranks, cutoff: int) -> Ranks:
    return np.where(ranks <= cutoff, 1.0 / np.log2(1.0 + ranks), 0.0)
