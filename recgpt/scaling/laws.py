"""A law of quality, L(N, D) = E + A N^-a + B D^-b, fitted to trainings of several sizes on shares of a log.

N weights, D targets (interactions to be predicted, each counted once however often it is trained on), L nats.
The form is that of Hoffmann et al. 2022 (arXiv 2203.15556, section 3.3), the fit least squares of relative
errors. Shapes: R runs.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from recgpt.scaling.fitting import FloatArray, fit_not_negative

EXPONENTS = (0.02, 2.0)
"""Where exponents are looked for: below, a power of the sizes here is hardly more than a constant."""
RESAMPLES = 200
INTERVAL = (2.5, 97.5)  # percentiles of the resampled fits
LARGE_RESIDUAL = 0.02  # of the loss
_GRID = 5  # places in each direction
_ZOOMS = 10  # each halves the range in which the exponents are


@dataclass(frozen=True)
class Run:
    """A training that is finished, and what it has reached."""

    width: int
    layers: int
    share: float
    """Of the users that may be trained on."""
    weights: int
    """N: those of the GPT and of the item table."""
    targets: int
    """D."""
    flops: float
    """Of the whole training, as ``recgpt.model.flops`` counts them."""
    loss: float
    """L: mean over all targets of users who were held out, nats."""


@dataclass(frozen=True)
class Law:
    """The fitted law; terms are in nats at the reference, where A N^-a is ``size_term`` itself."""

    irreducible: float
    """E."""
    size_term: float
    size_exponent: float
    """a."""
    data_term: float
    data_exponent: float
    """b."""
    reference: tuple[float, float]
    """N and D at which the terms are given: the geometric means of the runs."""

    def loss(self, weights: npt.ArrayLike, targets: npt.ArrayLike) -> FloatArray:
        """What the law says, nats, float64 in the shape of both."""
        size = np.asarray(weights) / self.reference[0]
        data = np.asarray(targets) / self.reference[1]
        return (
            self.irreducible
            + self.size_term * size**-self.size_exponent
            + self.data_term * data**-self.data_exponent
        )

    @property
    def size_coefficient(self) -> float:
        """A."""
        return self.size_term * self.reference[0] ** self.size_exponent

    @property
    def data_coefficient(self) -> float:
        """B."""
        return self.data_term * self.reference[1] ** self.data_exponent


PARAMETERS = {
    "E": "irreducible",
    "A": "size_coefficient",
    "a": "size_exponent",
    "B": "data_coefficient",
    "b": "data_exponent",
}


class Best(NamedTuple):
    """Where a budget of operations is spent best."""

    budget: float
    weights: float
    targets: float
    loss: float


@dataclass(frozen=True)
class Fit:
    """A law with what is known of its certainty."""

    runs: list[Run]
    law: Law
    resampled: list[Law]
    """Fitted to as many runs, drawn with repetition."""

    def interval(self, parameter: str) -> tuple[float, float]:
        """95 % of the resampled fits lie in it. ``parameter``: a key of ``PARAMETERS``."""
        values = [getattr(law, PARAMETERS[parameter]) for law in self.resampled]
        return _percentiles(values)

    def residuals(self) -> FloatArray:
        """Measured over predicted loss, less 1: float64 [R]."""
        weights_R, targets_R, loss_R = _columns(self.runs)
        return loss_R / self.law.loss(weights_R, targets_R) - 1

    @property
    def flops_per_weight_and_target(self) -> float:
        """Operations of a training, as a multiple of N D: the geometric mean of the runs."""
        multiples = [run.flops / (run.weights * run.targets) for run in self.runs]
        return float(np.exp(np.mean(np.log(multiples))))

    def best(self, budget: float) -> Best | None:
        """N and D of the least loss for a budget of operations; None if more of one is of no use."""
        return _best(self.law, budget, self.flops_per_weight_and_target)

    def best_weights_interval(self, budget: float) -> tuple[float, float] | None:
        """Of the best N, as ``interval``; None if in some resampled fit there is no best one."""
        found = [_best(law, budget, self.flops_per_weight_and_target) for law in self.resampled]
        certain = [best.weights for best in found if best is not None]
        return _percentiles(certain) if len(certain) == len(found) else None


def fit(runs: Sequence[Run], resamples: int = RESAMPLES, seed: int = 0) -> Fit:
    """Fit the law to runs of at least two sizes on at least two amounts of data."""
    weights_R, targets_R, loss_R = _columns(runs)
    generator = np.random.default_rng(seed)
    reference = (_geometric_mean(weights_R), _geometric_mean(targets_R))
    resampled = []
    for _ in range(resamples):
        drawn = generator.integers(len(runs), size=len(runs))
        resampled.append(fit_law(weights_R[drawn], targets_R[drawn], loss_R[drawn], reference))
    return Fit(list(runs), fit_law(weights_R, targets_R, loss_R, reference), resampled)


def fit_law(
    weights_R: FloatArray, targets_R: FloatArray, loss_R: FloatArray, reference: tuple[float, float]
) -> Law:
    """For each pair of exponents the rest is linear; pairs are tried on a grid that closes in on the best."""
    size_R, data_R = weights_R / reference[0], targets_R / reference[1]
    low, high = map(math.log, EXPONENTS)
    centre, span = ((low + high) / 2, (low + high) / 2), (high - low) / 2
    for _ in range(_ZOOMS):
        places = [np.linspace(max(middle - span, low), min(middle + span, high), _GRID) for middle in centre]
        pairs = itertools.product(*places)
        centre = min(pairs, key=lambda pair: _solve(size_R, data_R, loss_R, *np.exp(pair))[0])
        span /= 2
    size_exponent, data_exponent = np.exp(centre).tolist()
    _, (irreducible, size_term, data_term) = _solve(size_R, data_R, loss_R, size_exponent, data_exponent)
    return Law(irreducible, size_term, size_exponent, data_term, data_exponent, reference)


def _solve(
    size_R: FloatArray, data_R: FloatArray, loss_R: FloatArray, size_exponent: float, data_exponent: float
) -> tuple[float, list[float]]:
    """The sum of squared relative errors, and E and both terms, none of them negative."""
    features_R3 = np.stack([np.ones_like(size_R), size_R**-size_exponent, data_R**-data_exponent], axis=1)
    terms = fit_not_negative(features_R3, loss_R)
    return float(np.square(features_R3 @ terms / loss_R - 1).sum()), terms.tolist()


def _best(law: Law, budget: float, flops_per_weight_and_target: float) -> Best | None:
    """The least loss along N D = budget / flops: where both terms fall equally fast."""
    if not (law.size_term and law.data_term):
        return None
    a, b = law.size_exponent, law.data_exponent
    product = budget / flops_per_weight_and_target / (law.reference[0] * law.reference[1])
    size = (a * law.size_term / (b * law.data_term) * product**b) ** (1 / (a + b))
    weights, targets = size * law.reference[0], product / size * law.reference[1]
    return Best(budget, weights, targets, float(law.loss(weights, targets)))


def caveats(fitted: Fit, budgets: Sequence[float]) -> list[str]:
    """Where the law must not be trusted, a sentence each; none if nothing speaks against it."""
    return [
        *_caveats_of_parameters(fitted),
        *_caveats_of_runs(fitted),
        *(text for budget in budgets for text in _caveats_of_budget(fitted, budget)),
    ]


def _caveats_of_parameters(fitted: Fit) -> list[str]:
    found = []
    for name, term in (("a", "size_term"), ("b", "data_term")):
        low, high = fitted.interval(name)
        nothing = sum(not getattr(law, term) for law in fitted.resampled) / max(len(fitted.resampled), 1)
        what = "size" if name == "a" else "data"
        if not getattr(fitted.law, term):
            found.append(f"The fit gives {what} no influence; {name} means nothing.")
        elif nothing > (100 - INTERVAL[1]) / 100:
            found.append(f"In {100 * nothing:.0f} % of the resampled fits {what} has no influence.")
        if low <= EXPONENTS[0] * 1.01:
            found.append(
                f"The interval of {name} reaches the least that was tried: it cannot be told from 0."
            )
        if high >= EXPONENTS[1] * 0.99:
            found.append(f"The interval of {name} reaches the most that was tried, {EXPONENTS[1]:g}.")
    low, _ = fitted.interval("E")
    if low <= 0:
        found.append("The interval of E contains 0: what loss would remain is not known.")
    return found


def _caveats_of_runs(fitted: Fit) -> list[str]:
    found = []
    parameters = len(PARAMETERS)
    if len(fitted.runs) < 2 * parameters:
        found.append(f"{len(fitted.runs)} runs are few for {parameters} parameters.")
    residuals = fitted.residuals()
    worst = int(np.abs(residuals).argmax())
    if abs(residuals[worst]) > LARGE_RESIDUAL:
        run = fitted.runs[worst]
        found.append(
            f"The law misses width {run.width}, {run.layers} layers, share {run.share:g} "
            f"by {100 * residuals[worst]:+.1f} % of the loss."
        )
    for share in sorted({run.share for run in fitted.runs}):
        by_size = sorted((run for run in fitted.runs if run.share == share), key=lambda run: run.weights)
        least = min(by_size, key=lambda run: run.loss)
        if least is not by_size[-1]:
            found.append(
                f"On share {share:g} of the users width {least.width} with {least.layers} layers is better "
                "than larger models: the law, in which more weights never hurt, does not hold there."
            )
    return found


def _caveats_of_budget(fitted: Fit, budget: float) -> list[str]:
    best = fitted.best(budget)
    if best is None:
        return [f"For {budget:.3g} operations there is no best choice: one of size and data is of no use."]
    outside = [
        name
        for name, value, known in (
            ("N", best.weights, [run.weights for run in fitted.runs]),
            ("D", best.targets, [run.targets for run in fitted.runs]),
        )
        if not min(known) <= value <= max(known)
    ]
    if outside:
        return [f"The best choice for {budget:.3g} operations lies outside the runs ({', '.join(outside)})."]
    return []


def markdown(fitted: Fit, budgets: Sequence[float], where: str) -> str:
    """Runs, law, what it recommends and where it must not be trusted; ``where``: the data, in words."""
    lines = [f"# A law of quality on {where}", "", "## Runs", ""]
    lines += ["| width | layers | share of users | N weights | D targets | operations | L | law | off by |"]
    lines += ["|" + "---|" * 9]
    for run, residual in zip(fitted.runs, fitted.residuals(), strict=True):
        says = run.loss / (1 + residual)
        lines.append(
            f"| {run.width} | {run.layers} | {run.share:g} | {run.weights:,} | {run.targets:,} | "
            f"{run.flops:.3g} | {run.loss:.4f} | {says:.4f} | {100 * residual:+.2f} % |"
        )
    lines += [
        "",
        "## Law: L(N, D) = E + A N^-a + B D^-b",
        "",
        "| | fitted | 95 % interval |",
        "|---|---|---|",
    ]
    for name, attribute in PARAMETERS.items():
        low, high = fitted.interval(name)
        lines.append(f"| {name} | {getattr(fitted.law, attribute):.4g} | {low:.4g} to {high:.4g} |")
    lines += ["", f"A training takes {fitted.flops_per_weight_and_target:.3g} N D operations.", ""]
    lines += ["## Best choice for a budget of operations", ""]
    lines += ["| operations | N weights | its 95 % interval | D targets | L |", "|---|---|---|---|---|"]
    lines += [_budget_row(fitted, budget) for budget in budgets]
    lines += ["", "## Where the law must not be trusted", ""]
    lines += [f"- {text}" for text in caveats(fitted, budgets)] or [
        "Nothing was found that speaks against it."
    ]
    return "\n".join([*lines, ""])


def _budget_row(fitted: Fit, budget: float) -> str:
    best, interval = fitted.best(budget), fitted.best_weights_interval(budget)
    if best is None:
        return f"| {budget:.3g} | none | | | |"
    certain = "unknown" if interval is None else f"{interval[0]:,.0f} to {interval[1]:,.0f}"
    return f"| {budget:.3g} | {best.weights:,.0f} | {certain} | {best.targets:,.0f} | {best.loss:.4f} |"


def to_json(fitted: Fit, budgets: Sequence[float]) -> dict[str, object]:
    """Law, intervals, best choices and caveats; the runs are in a file of their own."""
    return {
        "law": {name: getattr(fitted.law, attribute) for name, attribute in PARAMETERS.items()},
        "intervals": {name: fitted.interval(name) for name in PARAMETERS},
        "flops_per_weight_and_target": fitted.flops_per_weight_and_target,
        "best": [best and best._asdict() for best in map(fitted.best, budgets)],
        "caveats": caveats(fitted, budgets),
        "runs": [dataclasses.asdict(run) for run in fitted.runs],
    }


def _columns(runs: Sequence[Run]) -> tuple[FloatArray, FloatArray, FloatArray]:
    return (
        np.array([run.weights for run in runs], float),
        np.array([run.targets for run in runs], float),
        np.array([run.loss for run in runs], float),
    )


def _geometric_mean(values: FloatArray) -> float:
    return float(np.exp(np.log(values).mean()))


def _percentiles(values: Sequence[float]) -> tuple[float, float]:
    low, high = np.percentile(values, INTERVAL).tolist()
    return low, high
