"""Tables of a sweep and of two sweeps side by side: for the terminal, as Markdown and for the page."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from rich.table import Table

from recgpt.scaling.parts import PARTS
from recgpt.scaling.results import Row, Summary, efficiencies, summarize

_MIB = 2**20


class TextTable(NamedTuple):
    """A table whose cells are texts."""

    title: str
    note: str
    header: list[str]
    rows: list[list[str]]
    left: int
    """Columns, the first ones, that hold words; the others hold numbers."""


class _Measure(NamedTuple):
    header: str
    text: Callable[[float], str]


def _scaled(format_: str, factor: float = 1.0) -> Callable[[float], str]:
    return lambda value: format(value * factor, format_)


_MEASURES = {
    "tokens_per_second": _Measure("tokens/s", _scaled(",.0f")),
    "flops_per_second": _Measure("GFLOP/s", _scaled(",.2f", 1e-9)),
    "matrix_rate_share": _Measure("of the matrix rate", _scaled(".1%")),
    "sent_bytes_per_step": _Measure("MiB a rank sends", _scaled(",.2f", 1 / _MIB)),
    "memory_bytes": _Measure("MiB of a rank", _scaled(",.0f", 1 / _MIB)),
    "checkpoint_seconds": _Measure("checkpoint s", _scaled(",.2f")),
    "checkpoint_bytes": _Measure("checkpoint MiB", _scaled(",.1f", 1 / _MIB)),
    "recall_users_per_second": _Measure("recall users/s", _scaled(",.0f")),
}
_STEP = _Measure("ms a step", _scaled(",.2f", 1e3))
_COMPARED = {
    "step_seconds": _STEP,
    **{name: _MEASURES[name] for name in ("tokens_per_second", "sent_bytes_per_step", "memory_bytes")},
}


def sweep_tables(summaries: Sequence[Summary]) -> list[TextTable]:
    """What was measured, where the time goes, and what failed, as far as there is something to tell."""
    tables = []
    measured = [summary for summary in summaries if summary.measured]
    if measured:
        tables += [_measured(measured), _parts(measured)]
    failed = [[summary.label, reason] for summary in summaries for reason in summary.reasons]
    if failed:
        note = "The same command tries them again."
        tables.append(TextTable("Failed", note, ["point", "reason"], failed, left=2))
    return tables


def _measured(measured: Sequence[Summary]) -> TextTable:
    names = [name for name in _MEASURES if any(summary.figures[name] is not None for summary in measured)]
    efficiency = efficiencies(measured)
    rows = []
    for summary in measured:
        row = [*map(readable, summary.values.values()), _step(summary)]
        row += [_cell(_MEASURES[name], summary.figures[name]) for name in names]
        rows.append([*row, f"{efficiency[summary.label]:.0%}"] if efficiency else row)
    header = [*measured[0].values, _STEP.header, *(_MEASURES[name].header for name in names)]
    note = "Medians over the repeats; in brackets their least and most."
    if efficiency:
        header.append("efficiency")
        note += " Efficiency: tokens per second and worker, by those of the fewest workers."
    return TextTable("Measured", note, header, rows, left=len(measured[0].values))


def _parts(measured: Sequence[Summary]) -> TextTable:
    shown = [part for part in PARTS if any(summary.figures[f"{part}_seconds"] for summary in measured)]
    rows = [
        [part.replace("_", " "), *(_cell(_STEP, summary.figures[f"{part}_seconds"]) for summary in measured)]
        for part in shown
    ]
    rows.append(["together", *(_cell(_STEP, summary.figures["step_seconds"]) for summary in measured)])
    keys = ", ".join(measured[0].values)
    header = [keys, *map(short_label, measured)]
    note = "ms of a step; what each part holds is in docs/scaling.md."
    return TextTable("Where a step's time goes", note, header, rows, left=1)


def comparison(names: tuple[str, str], before: Sequence[Row], after: Sequence[Row]) -> list[TextTable]:
    """Two sweeps side by side: the points that both have, by label, and those that only one has.

    A ratio is the second sweep's figure by the first one's.
    """
    sweeps = [
        {summary.label: summary for summary in summarize(rows) if summary.measured}
        for rows in (before, after)
    ]
    both = [label for label in sweeps[0] if label in sweeps[1]]
    tables = []
    if both:
        header = ["point"]
        for measure in _COMPARED.values():
            header += [f"{measure.header}, A", "B", "B/A"]
        rows = [[label, *_side_by_side(*(sweep[label] for sweep in sweeps))] for label in both]
        note = f"A: {names[0]}. B: {names[1]}. Medians over the repeats."
        tables.append(TextTable("Two sweeps", note, header, rows, left=1))
    alone = [
        [label, name]
        for name, mine, other in zip(names, sweeps, reversed(sweeps), strict=True)
        for label in mine
        if label not in other
    ]
    if alone:
        tables.append(TextTable("Measured in one of them alone", "", ["point", "sweep"], alone, left=2))
    return tables


def _side_by_side(before: Summary, after: Summary) -> list[str]:
    cells = []
    for name, measure in _COMPARED.items():
        old, new = before.figures[name], after.figures[name]
        cells += [_cell(measure, old), _cell(measure, new)]
        cells.append(f"{new / old:.2f}" if old and new is not None else "")
    return cells


def markdown(tables: Sequence[TextTable]) -> str:
    """The tables as one Markdown document."""
    lines: list[str] = []
    for table in tables:
        ruler = ["---"] * table.left + ["---:"] * (len(table.header) - table.left)
        lines += [f"## {table.title}", "", table.note, ""]
        lines += [f"| {' | '.join(map(_escaped, row))} |" for row in (table.header, ruler, *table.rows)]
        lines.append("")
    return "\n".join(lines)


def rich_table(table: TextTable) -> Table:
    """For the terminal."""
    from rich.text import Text

    title, note = Text(table.title), Text(table.note)
    shown = Table(title=title, caption=note, caption_justify="left", show_edge=False)
    for place, name in enumerate(table.header):
        shown.add_column(Text(name), justify="left" if place < table.left else "right", overflow="fold")
    for row in table.rows:
        shown.add_row(*map(Text, row))
    return shown


def _step(summary: Summary) -> str:
    text = _cell(_STEP, summary.figures["step_seconds"])
    if summary.measured < 2:
        return text
    return f"{text} ({_cell(_STEP, summary.least_step_seconds)} to {_cell(_STEP, summary.most_step_seconds)})"


def _cell(measure: _Measure, value: float | None) -> str:
    return "" if value is None else measure.text(value)


def short_label(summary: Summary) -> str:
    """The values of a point without their keys."""
    return " ".join(map(readable, summary.values.values())) or summary.label


def readable(value: object) -> str:
    """A value of a key, for the eye."""
    if isinstance(value, list | tuple):
        return ",".join(map(str, value))
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")
