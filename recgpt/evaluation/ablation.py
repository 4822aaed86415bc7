"""The paper's ablations: what is trained for them, and how the results become a table and a plot.

The model is that of Zhang et al. 2024 (arXiv 2404.08675). Each variant leaves out or puts back one part of
it; all are trained with several seeds, because on small datasets seeds differ by as much as variants do.
"""

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from rich.table import Table

from recgpt import storage
from recgpt.config import STAGES, TrainSettings
from recgpt.errors import UserError
from recgpt.evaluation.metrics import metric_names
from recgpt.settings_reading import from_dict

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FULL = "full"
NO_USER_MODULE = "no user module"
WITH_USER_MODULE = "with user module"
NO_PROMPT_TUNING = "no prompt-tuning"
NO_AUTOREGRESSIVE_RECALL = "no autoregressive recall"
PAPERS_LOSS = "the paper's loss"
VARIANTS = (
    FULL,
    NO_USER_MODULE,
    WITH_USER_MODULE,
    NO_PROMPT_TUNING,
    NO_AUTOREGRESSIVE_RECALL,
    PAPERS_LOSS,
)  # in the order in which they are shown

SHOWN_METRICS = ("hit_rate@10", "ndcg@10", "hit_rate@20")
NOTE = "Test split: mean ± standard deviation over the seeds {seeds}; in brackets the difference to full."

_COLOUR = "#3f86c8"

Metrics = dict[str, float]
Results = dict[str, dict[int, Metrics]]
"""By variant and seed."""


@dataclass(frozen=True)
class Training:
    """One model to train, named after the variant that it is trained for."""

    name: str
    settings: TrainSettings
    """All but the seed."""
    starts_from: str | None = None
    """The training, of the same seed, from whose model it begins."""


class Cell(NamedTuple):
    """A metric of a variant over the seeds."""

    mean: float
    deviation: float | None
    """Of the sample; None for one seed."""
    change: float | None
    """Of the mean, as a share of the full model's; None for the full model itself, and if its mean is 0."""


Summary = dict[str, dict[str, Cell]]
"""By variant and metric."""


def trainings(settings: TrainSettings) -> list[Training]:
    """What to train for the ablations of a model, each after what it starts from.

    The full model is prompt-tuned from the one without prompt-tuning, so that both share one pre-training.
    A variant that would change nothing is left out.
    Raises ``UserError`` if the settings leave out a stage.
    """
    if settings.stages != STAGES:
        raise UserError(f"stages: an ablation needs both, {' and '.join(STAGES)}; leave the setting out")
    pretraining = replace(settings, stages=("pretrain",))
    prompt_tuning = replace(settings, stages=("prompt_tune",))
    personal = settings.model.user.kind != "none"
    user = replace(settings.model.user, kind="none" if personal else "hashed")
    # What the paper trains for: binary cross-entropy of the target against one drawn item.
    loss = replace(settings.loss, kind="binary", negatives_per_target=1, calibration=0.0)
    variants = {
        NO_USER_MODULE if personal else WITH_USER_MODULE: replace(
            settings, model=replace(settings.model, user=user)
        ),
        PAPERS_LOSS: replace(settings, loss=loss),
    }
    return [
        Training(NO_PROMPT_TUNING, pretraining),
        Training(FULL, prompt_tuning, starts_from=NO_PROMPT_TUNING),
        *(Training(name, changed) for name, changed in variants.items() if changed != settings),
    ]


def measured_variants(training: Training) -> list[str]:
    """The variants that its model is measured for: the full model is also served with one step."""
    several_steps = len(training.settings.recall.quotas) > 1
    return [FULL, NO_AUTOREGRESSIVE_RECALL] if training.name == FULL and several_steps else [training.name]


def metrics_of(variant: str, evaluation: Mapping[str, Any]) -> Metrics:
    """A variant's metrics in the result of ``ray_jobs.evaluate.run_evaluate`` for its model."""
    served = evaluation["one_step"] if variant == NO_AUTOREGRESSIVE_RECALL else evaluation
    return {metric: served[metric] for metric in metric_names()}


def read_results(url: str) -> Results:
    """Raises ``UserError`` if the file is missing or damaged."""
    return from_dict(Results, storage.read_json(url), url)


def summarize(results: Results, seeds: Sequence[int]) -> Summary:
    """Over the given seeds, with all of which all variants must have been measured."""
    values = {
        variant: {metric: [results[variant][seed][metric] for seed in seeds] for metric in SHOWN_METRICS}
        for variant in VARIANTS
        if variant in results
    }
    full = {metric: statistics.fmean(values[FULL][metric]) for metric in SHOWN_METRICS}
    return {
        variant: {
            metric: _cell(over_seeds, None if variant == FULL else full[metric])
            for metric, over_seeds in of_variant.items()
        }
        for variant, of_variant in values.items()
    }


def _cell(values: Sequence[float], full: float | None) -> Cell:
    mean = statistics.fmean(values)
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return Cell(mean, deviation, mean / full - 1 if full else None)


def rich_table(summary: Summary, seeds: Sequence[int]) -> Table:
    """For the terminal: a row for each variant."""
    table = Table(title="Ablations", caption=_note(seeds), caption_justify="left", show_edge=False)
    table.add_column(no_wrap=True)
    for metric in SHOWN_METRICS:  # in 80 columns the difference stands below the mean
        table.add_column(metric, justify="right", min_width=len("0.1234 ± 0.1234"))
    for variant, cells in summary.items():
        table.add_row(variant, *(_text(cells[metric]) for metric in SHOWN_METRICS))
    return table


def markdown_table(summary: Summary, seeds: Sequence[int]) -> str:
    """The same in Markdown."""
    rows = [("variant", *SHOWN_METRICS), ("---", *["---:"] * len(SHOWN_METRICS))]
    rows += [(variant, *map(_text, cells.values())) for variant, cells in summary.items()]
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", _note(seeds), ""])


def _note(seeds: Sequence[int]) -> str:
    return NOTE.format(seeds=", ".join(map(str, seeds)))


def _text(cell: Cell) -> str:
    parts = [f"{cell.mean:.4f}"]
    if cell.deviation is not None:
        parts.append(f"± {cell.deviation:.4f}")
    if cell.change is not None:
        parts.append(f"({100 * cell.change:+.1f} %)")
    return " ".join(parts)


def bar_plot(summary: Summary) -> bytes:
    """A PNG with one panel for each metric: a bar for each variant, and its standard deviation."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context("default"):  # whatever a user's own matplotlibrc says
        figure = Figure(figsize=(11, 1.2 + 0.4 * len(summary)), layout="constrained", dpi=150)
        panels = figure.subplots(1, len(SHOWN_METRICS), sharey=True)
        for axes, metric in zip(panels, SHOWN_METRICS, strict=True):
            _draw(axes, metric, {variant: cells[metric] for variant, cells in summary.items()})
        file = io.BytesIO()
        figure.savefig(file, format="png")
    return file.getvalue()


def _draw(axes: "Axes", metric: str, cells: Mapping[str, Cell]) -> None:
    deviations = [cell.deviation or 0.0 for cell in cells.values()]
    axes.barh(list(cells), [cell.mean for cell in cells.values()], xerr=deviations, capsize=3, color=_COLOUR)
    axes.axvline(cells[FULL].mean, color="black", linestyle=":", linewidth=1)
    axes.set_title(metric)
    axes.locator_params(axis="x", nbins=4)
    axes.spines[["top", "right"]].set_visible(False)
    if not axes.yaxis_inverted():  # the panels share the axis
        axes.invert_yaxis()
