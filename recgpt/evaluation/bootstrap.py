"""Whether two lists of the same users differ by more than chance: a paired bootstrap.

Efron & Tibshirani 1993, chapter 13: users are drawn with replacement, as many as there are, and the mean
difference is taken anew each time; the interval is that of the percentiles.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Interval:
    """A mean difference and the interval in which it lies, with the confidence that was asked for."""

    mean: float
    low: float
    high: float


def paired_bootstrap(
    difference_U: npt.NDArray[np.floating], seed: int = 0, samples: int = 2000, confidence: float = 0.95
) -> Interval:
    """The interval of the mean of ``difference_U``: one value per user, [U], not empty, all finite."""
    assert len(difference_U), "no users to compare"
    # Users of one value are alike, so that a sample is a draw of how many have each: no [samples x users].
    value_D, count_D = np.unique(difference_U, return_counts=True)
    users = len(difference_U)
    drawn = np.random.default_rng(seed).multinomial(users, count_D / users, size=samples)
    tail = (1 - confidence) / 2
    low, high = np.quantile(drawn @ value_D / users, [tail, 1 - tail])
    return Interval(float(np.mean(difference_U)), float(low), float(high))
