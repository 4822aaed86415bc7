"""Least squares with coefficients that cannot be negative, such as seconds per byte."""

import itertools

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]


def fit_not_negative(features_NF: FloatArray, values_N: FloatArray) -> FloatArray:
    """Coefficients float64 [F] >= 0 that make the relative errors of ``features @ coefficients`` small.

    Args:
        features_NF: float64 [N, F], few features: all subsets of them are tried, as the best solution is
            the unconstrained one of the features that it uses.
        values_N: float64 [N], positive.
    """
    relative_NF = features_NF / values_N[:, None]
    best, least = np.zeros(features_NF.shape[1]), np.inf
    for used in itertools.product((False, True), repeat=features_NF.shape[1]):
        chosen = np.flatnonzero(used)
        found, *_ = np.linalg.lstsq(relative_NF[:, chosen], np.ones(len(values_N)), rcond=None)
        error = np.square(relative_NF[:, chosen] @ found - 1).sum()
        if (found >= 0).all() and error < least - 1e-12:
            best, least = np.zeros(features_NF.shape[1]), error
            best[chosen] = found
    return best
