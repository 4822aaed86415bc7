"""Which step quotas serve best: what is tried, on whom, and how one is chosen.

Quotas that sum to the same k are compared by hit_rate@k, the share of users whose held-out item is in the
list, wherever in it. Shapes: U users.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.table import Table

from recgpt.data.dataset import HistoryDataset, RowGroup
from recgpt.data.hashing import uniform
from recgpt.evaluation.bootstrap import Interval
from recgpt.evaluation.metrics import Ranks, difference, rank_metrics
from recgpt.retrieval.recall_model import scale_quotas
from recgpt.schema import ITEM_INDICES, TIMESTAMPS, USER_HASH

MOST_STEPS_TRIED = 3  # with a step more, the combinations would be too many to measure
_DRAW_TUNED = 0  # recall's own draws have the number of a step, from 1

Quotas = tuple[int, ...]


def quota_grid(k: int, steps: int) -> list[Quotas]:
    """The quotas to try for lists of ``k``: by number of steps, then by the first steps; no two are the same.

    One step; two steps, the first with 10 %, 20 % ... 90 % or 95 % of the list; three steps, the first with
    20 %, 40 %, 60 % or 80 %, the second with a multiple of 10 %. Each takes at least 1 candidate.
    ``steps``: at most so many, 1 to ``MOST_STEPS_TRIED``.
    """
    assert 1 <= steps <= MOST_STEPS_TRIED
    two = [(first, 100 - first) for first in (*range(10, 100, 10), 95)]
    three = [
        (first, second, 100 - first - second)
        for first in range(20, 100, 20)
        for second in range(10, 100 - first, 10)
    ]
    shares = [(100,), *two, *three]
    tried = {scale_quotas(share, k) for share in shares if len(share) <= steps}
    return sorted(tried, key=lambda quotas: (len(quotas), quotas))


@dataclass(frozen=True)
class DrawnUsers(HistoryDataset):
    """A dataset in which all users but about ``share`` of them have an empty history: nothing is held out.

    A user is drawn by the hash of the user's id, so always the same ones.
    """

    share: float

    def read_row_group(self, row_group: RowGroup, columns: list[str] | None = None) -> pa.Table:
        """As of the whole dataset; the user's hash is among the columns."""
        table = super().read_row_group(row_group, columns)
        drawn = pa.array(uniform(table[USER_HASH].to_numpy(), _DRAW_TUNED) < self.share)
        for place, name in enumerate(table.column_names):
            if name in (ITEM_INDICES, TIMESTAMPS):
                kept = pc.if_else(drawn, table[name], pa.scalar([], table[name].type))
                table = table.set_column(place, name, kept)
        return table


def draw_users(dataset: HistoryDataset, max_users: int | None) -> HistoryDataset:
    """The dataset with about ``max_users`` of its users; None: with all."""
    if max_users is None or max_users >= dataset.num_users:
        return dataset
    return DrawnUsers(dataset.url, dataset.manifest, max_users / dataset.num_users)


@dataclass(frozen=True)
class Measured:
    """What lists of k made with these quotas find."""

    quotas: Quotas
    hit_rate: float
    """At k."""
    ndcg: float
    """At k."""
    ndcg_at_10: float
    difference: Interval
    """Of the hit rate from that of one step, with 95 % confidence."""

    def as_dict(self) -> dict[str, Any]:
        k = sum(self.quotas)
        return {
            "quotas": list(self.quotas),
            f"hit_rate@{k}": self.hit_rate,
            f"ndcg@{k}": self.ndcg,
            "ndcg@10": self.ndcg_at_10,
            "difference": asdict(self.difference),
        }


def measure(ranks: dict[Quotas, Ranks]) -> list[Measured]:
    """Measure quotas by the ranks of held-out items, float64 [U], of the same users in the same order.

    A rank is infinite where the item is not in the list. U is not 0, and one step is among the quotas.
    """
    (one_step_U,) = (rank_U for quotas, rank_U in ranks.items() if len(quotas) == 1)
    return [_measured(quotas, rank_U, one_step_U) for quotas, rank_U in ranks.items()]


def _measured(quotas: Quotas, rank_U: Ranks, one_step_U: Ranks) -> Measured:
    k = sum(quotas)
    metrics = rank_metrics(rank_U, k)
    return Measured(
        quotas=quotas,
        hit_rate=metrics[f"hit_rate@{k}"],
        # Sorted, so that the same ranks give the same sum to the last bit, whichever users have them.
        ndcg=float(np.mean(1 / np.log2(1 + np.sort(rank_U)))),
        ndcg_at_10=metrics["ndcg@10"],
        difference=difference(rank_U, one_step_U, k)[f"hit_rate@{k}"],
    )


def choose(measured: list[Measured]) -> Measured:
    """The one with the highest hit rate, of equal ones the highest NDCG; of those still equal the first.

    In the order of ``quota_grid`` the first is the one with the fewest steps.
    """
    return max(measured, key=lambda one: (one.hit_rate, one.ndcg))


def quotas_table(result: dict[str, Any]) -> Table:
    """One row per quotas, the chosen ones marked; ``ray_jobs.tune_quotas`` says what is in the result."""
    hit_rate = f"hit_rate@{result['k']}"
    title = f"{result['split']} split, {result['protocol']}, {result['num_users']:,} users"
    table = Table("quotas", hit_rate, "difference to one step, 95 %", "ndcg@10", "", title=title)
    for row in result["tried"]:
        chosen = row["quotas"] == result["chosen"]
        table.add_row(
            quotas_text(row["quotas"]),
            f"{row[hit_rate]:.4f}",
            _difference_text(row),
            f"{row['ndcg@10']:.4f}",
            "chosen" if chosen else "",
            style="bold" if chosen else None,
        )
    return table


def _difference_text(row: dict[str, Any]) -> str:
    if len(row["quotas"]) == 1:
        return ""
    interval = row["difference"]
    return f"{interval['mean']:+.4f} ({interval['low']:+.4f} to {interval['high']:+.4f})"


def quotas_text(quotas: Sequence[int]) -> str:
    """As ``--quotas`` takes them."""
    return ",".join(map(str, quotas))


def print_quotas(result: dict[str, Any]) -> None:
    """Print the table on stdout."""
    Console().print(quotas_table(result))
