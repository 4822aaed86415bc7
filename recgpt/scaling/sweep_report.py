"""The page about a sweep: tables, plots, and what was told."""

from collections.abc import Mapping, Sequence
from typing import Any

from recgpt.pages import Headline, render
from recgpt.scaling.experiment import Experiment
from recgpt.scaling.results import Summary
from recgpt.scaling.sweep_plots import Drawing
from recgpt.scaling.sweep_tables import TextTable
from recgpt.settings_reading import to_dict
from recgpt.training.runs import flat


def sweep_report(
    name: str,
    experiment: Experiment,
    machine: Mapping[str, Any],
    summaries: Sequence[Summary],
    tables: Sequence[TextTable],
    drawings: Sequence[Drawing],
) -> str:
    """One HTML file that needs nothing beside it; the same arguments give the same text.

    Args:
        name: of the experiment.
        machine: what it was measured on, by name.
    """
    told = flat({key: value for key, value in to_dict(experiment).items() if key not in ("grid", "points")})
    return render(
        "scaling/sweep_report.html.jinja",
        name=name,
        headlines=_headlines(experiment, summaries),
        tables=tables,
        plots=[drawing.for_page() for drawing in drawings],
        told=told,
        machine=machine,
    )


def _headlines(experiment: Experiment, summaries: Sequence[Summary]) -> list[Headline]:
    measured = [summary for summary in summaries if summary.measured]
    steps = f"{experiment.repeats} times {experiment.steps} steps each"
    headlines = [Headline("points measured", f"{len(measured)} of {len(summaries)}", steps)]
    if measured:
        fastest = max(measured, key=lambda some: some.figures["tokens_per_second"] or 0)
        value = f"{fastest.figures['tokens_per_second']:,.0f}"
        headlines.append(Headline("most tokens per second", value, fastest.label))
        largest = max(measured, key=lambda some: some.figures["memory_bytes"] or 0)
        memory = f"{(largest.figures['memory_bytes'] or 0) / 2**20:,.0f} MiB"
        headlines.append(Headline("largest rank", memory, largest.label))
    return headlines
