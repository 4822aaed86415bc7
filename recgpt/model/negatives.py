"""Drawn rows, with the weights that make sums over them right on average.

Shapes: N rows of a table or of one shard of it, M draws, S distinct rows drawn, A targets.

A sum over all rows, sum_n f(n), is estimated by a sum over draws of f(n) / E_n, where E_n is how often
row n is drawn on average, by all the ways in which it can be drawn together. That is unbiased for any
mixture (the balance heuristic of Veach & Guibas 1995); for the sum in a softmax it is the logQ
correction of sampled softmax (Bengio & Senecal 2008; Yi et al. 2019). The ways here are

    uniform draws         E_n = draws / N
    draws by popularity   E_n = draws x count_n^power / sum over these N rows of count^power
    other tokens' targets E_n = (A - 1) x count_n / sum over the whole table of count

Each shard draws from its own rows alone, so that a row's E_n is known where the row is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recgpt.config import LossSettings


@dataclass
class SampledRows:
    """Distinct rows that all targets are scored against."""

    row_S: Tensor  # int64, ascending
    log_weight_S: (
        Tensor  # float64; log(times drawn / expected times), -inf: not drawn, only somebody's target
    )


class NegativeSampler:
    """Draws rows of one shard, a part of them uniformly and a part by popularity.

    A draw costs the same whatever the number of rows: rows of equal count are equally likely, so a
    group of equal count is drawn first (there are few counts), then a row of it. It keeps 8 bytes
    per row.
    """

    def __init__(self, settings: LossSettings, count_N: Tensor, first: int, total_count: int):
        """
        Args:
            count_N: int64, how often each row occurs in the log.
            first: rows before it (padding) are never drawn.
            total_count: sum of counts over the whole table.
        """
        self.settings = settings
        self.first = first
        self.total_count = total_count
        self._count_N = count_N.clamp(max=torch.iinfo(torch.int32).max).to(torch.int32)
        order = self._count_N[first:].argsort(stable=True)
        counts, self._size_G = self._count_N[first:][order].unique_consecutive(return_counts=True)
        self._row_of_place = (order + first).to(torch.int32)
        self._place_G = self._size_G.cumsum(0) - self._size_G
        self._mass_end_G = (self._size_G * self._popularity(counts)).cumsum(0)

    def draw(self, draws: int) -> Tensor:
        """``draws`` rows with repetition, int64 [M]; as many by popularity in each call."""
        device = self._count_N.device
        by_popularity = self._draws_by_popularity(draws)
        uniform = torch.randint(self.first, len(self._count_N), (draws - by_popularity,), device=device)
        if not by_popularity:
            return uniform
        mass = torch.rand(by_popularity, dtype=torch.float64, device=device) * self._mass_end_G[-1]
        group = torch.searchsorted(self._mass_end_G, mass, right=True).clamp(max=len(self._size_G) - 1)
        size = self._size_G[group]
        inside = (torch.rand(by_popularity, dtype=torch.float64, device=device) * size).long()
        place = self._place_G[group] + torch.minimum(inside, size - 1)
        return torch.cat([uniform, self._row_of_place[place].long()])

    def sample(self, draws: int, target_row: Tensor, num_targets: int) -> SampledRows:
        """Negatives for all targets of a step together.

        Args:
            target_row: int64, the rows here that are targets of the step, with repetition; they are
                among the result, because each target is scored too.
            num_targets: A, targets of the step over all shards.
        """
        drawn = self.draw(draws)
        if self.settings.in_batch:
            drawn = torch.cat([drawn, target_row])
        row_S, place = torch.cat([drawn, target_row]).unique(return_inverse=True)
        times_S = torch.bincount(place[: len(drawn)], minlength=len(row_S))
        expected_S = self.expected_times(row_S, draws, num_targets)
        # What cannot be drawn can be a target: its weight is 0, not 0 / 0.
        expected_S.clamp_(min=torch.finfo(expected_S.dtype).tiny)
        return SampledRows(row_S, (times_S / expected_S).log())

    def expected_times(self, row_S: Tensor, draws: int, num_targets: int) -> Tensor:
        """How often each row is drawn on average, or is another token's target: float64 [S]."""
        by_popularity = self._draws_by_popularity(draws)
        count_S = self._count_N[row_S].double()
        expected_S = torch.full_like(count_S, (draws - by_popularity) / (len(self._count_N) - self.first))
        if by_popularity:
            expected_S += by_popularity * self._popularity(count_S) / self._mass_end_G[-1]
        if self.settings.in_batch:
            # What has been a target has been seen, whatever the counts say.
            expected_S += (num_targets - 1) * count_S.clamp(min=1) / self.total_count
        return expected_S

    def _popularity(self, count: Tensor) -> Tensor:
        return count.double() ** self.settings.popularity_power

    def _draws_by_popularity(self, draws: int) -> int:
        """None where no row of the shard has been seen."""
        if not len(self._mass_end_G) or not self._mass_end_G[-1]:
            return 0
        return round(draws * self.settings.popularity_share)
