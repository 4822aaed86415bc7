"""The report on a prepared dataset, on the terminal and as HTML: what it holds, what was left out and why."""

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from recgpt.data.dataset import BadFile, DatasetManifest
from recgpt.data.summary import COLD_BELOW, BadRow, DataSummary

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

REASONS = {
    "missing_values": "user, item or time missing",
    "bad_values": "broken value",
    "duplicates": "the same user, item and time as another row",
    "repeats": "the item that the user took just before",
    "other_events": "event of a type not asked for",
    "outside_time_window": "outside the time window",
    "over_max_history": "older than the newest that a history may hold",
    "rare_users_or_items": "user or item with too few interactions",
}
"""What stands for the reasons in a manifest; others are shown without their underscores."""

BAD_FILES_ON_TERMINAL = 5
BAD_FILES_IN_HTML = 100
SOURCES_IN_HTML = 50

_DAY_BINS = 200
_LENGTH_BINS = 60
_LENGTHS_SHOWN = 0.95  # of users: a few very long histories would squeeze the others into one bar
_COLOUR = "#3f86c8"  # like the gray, seen well on white and on black
_GRAY = "#888888"
# Text stays black, which matplotlib writes down nowhere, so that the page can give it its own colour.
_PLOT_STYLE = {
    "svg.fonttype": "none",
    "font.size": 10,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": _GRAY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _GRAY,
    "grid.alpha": 0.25,
    "xtick.color": _GRAY,
    "xtick.labelcolor": "black",
    "ytick.color": _GRAY,
    "ytick.labelcolor": "black",
}


class Headline(NamedTuple):
    """One figure of the report."""

    name: str
    value: str
    note: str = ""


class Dropped(NamedTuple):
    """Rows left out for one reason."""

    key: str
    reason: str
    rows: int
    share: float
    """Of all rows read."""


class Plot(NamedTuple):
    """One plot of the report; ``svg`` is None where the log does not give it, and ``note`` says why."""

    title: str
    note: str
    svg: "Markup | None"


def terminal_report(manifest: DatasetManifest, summary: DataSummary) -> RenderableType:
    """The headline figures, what was left out and why, and the first bad files."""
    figures = Table.grid(padding=(0, 2))
    figures.add_column(style="bold")
    figures.add_column(justify="right")
    for headline in _headlines(manifest, summary):
        figures.add_row(*headline)
    parts: list[RenderableType] = [figures]
    if dropped := _dropped(manifest):
        table = Table("left out because")
        table.add_column("rows", justify="right")
        table.add_column("of rows read", justify="right")
        for _, reason, rows, share in dropped:
            table.add_row(_plain(reason), f"{rows:,}", _percent(share))
        parts.append(table)
    if manifest.bad_files:
        parts += _bad_files(manifest.bad_files)
    return Group(*parts)


def html_report(manifest: DatasetManifest, summary: DataSummary, bad_rows: Sequence[BadRow]) -> str:
    """One HTML file that needs nothing beside it; the same arguments give the same text."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("recgpt.data", ""),
        autoescape=True,  # names come from the data
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=_percent, setting=_setting)
    html = environment.get_template("report.html.jinja").render(
        manifest=manifest,
        headlines=_headlines(manifest, summary),
        plots=[_days_plot(manifest, summary), _lengths_plot(summary), _popularity_plot(summary)],
        rows_read=_rows_read_text(manifest),
        dropped=_dropped(manifest),
        cold_shares=_cold_shares(summary),
        bad_files=manifest.bad_files[:BAD_FILES_IN_HTML],
        bad_rows=bad_rows,
        sources=manifest.sources[:SOURCES_IN_HTML],
    )
    # File names need not be UTF-8; Python keeps their other bytes as surrogates, which no file can hold.
    return html.encode("utf-8", "replace").decode("utf-8")


def _headlines(manifest: DatasetManifest, summary: DataSummary) -> list[Headline]:
    kept = _percent(manifest.num_interactions / _rows_read(manifest))
    cold = _percent(summary.cold_interaction_share)
    median, mean, longest = _history_lengths(summary)
    headlines = [
        Headline("users", f"{manifest.num_users:,}"),
        Headline("items", f"{manifest.num_items:,}"),
        Headline("interactions", f"{manifest.num_interactions:,}", f"{kept} of {_rows_read_text(manifest)}"),
        Headline("median history", f"{median:,g}", f"mean {mean:,.1f}, longest {longest:,}"),
        _time_span(manifest, summary),
        Headline(
            "cold items",
            _percent(summary.cold_item_share),
            f"have fewer than {COLD_BELOW} interactions; {cold} of interactions are with them",
        ),
    ]
    if summary.new_item_share is not None:
        note = "of the newest tenth of interactions are with items unseen before"
        headlines.append(Headline("new items", _percent(summary.new_item_share), note))
    return headlines


def _rows_read(manifest: DatasetManifest) -> int:
    return manifest.num_interactions + sum(manifest.dropped.values())


def _rows_read_text(manifest: DatasetManifest) -> str:
    text = f"{_rows_read(manifest):,} rows read"
    return f"{text}, the older dataset's included" if manifest.lineage else text


def _history_lengths(summary: DataSummary) -> tuple[float, float, int]:
    """Median, mean and largest."""
    lengths, users = _arrays(summary.users_by_length)
    ends = users.cumsum()
    num_users = int(ends[-1])
    middle = np.searchsorted(ends, [(num_users - 1) // 2, num_users // 2], side="right")
    return float(lengths[middle].mean()), float(lengths @ users / num_users), int(lengths[-1])


def _time_span(manifest: DatasetManifest, summary: DataSummary) -> Headline:
    if not summary.interactions_per_day:
        return Headline("time span", "unknown", _why_no_days(manifest))
    first, last = min(summary.interactions_per_day), max(summary.interactions_per_day)
    days = int((np.datetime64(last) - np.datetime64(first)).astype(int)) + 1
    if days == 1:
        return Headline("time span", "1 day", first)
    return Headline("time span", f"{days:,} days", f"{first} to {last}")


def _why_no_days(manifest: DatasetManifest) -> str:
    if manifest.has_timestamps:
        return "the log's times are plain numbers, which belong to no day"
    return "the log gives an order but no times"


def _dropped(manifest: DatasetManifest) -> list[Dropped]:
    """The largest first; reasons that met no row are left out."""
    read = _rows_read(manifest)
    counts = sorted(manifest.dropped.items(), key=lambda item: (-item[1], item[0]))
    return [
        Dropped(key, REASONS.get(key, key.replace("_", " ")), rows, rows / read)
        for key, rows in counts
        if rows
    ]


def _cold_shares(summary: DataSummary) -> list[tuple[str, float]]:
    shares = [
        (f"items with fewer than {COLD_BELOW} interactions, of all items", summary.cold_item_share),
        ("interactions with these items, of all interactions", summary.cold_interaction_share),
    ]
    if summary.new_item_share is not None:
        new = "interactions with items not seen before, of the newest tenth"
        shares.append((new, summary.new_item_share))
    return shares


def _bad_files(files: Sequence[BadFile]) -> list[RenderableType]:
    table = Table()
    table.add_column("file that could not be read", overflow="fold")
    table.add_column("reason", overflow="fold")
    for file in files[:BAD_FILES_ON_TERMINAL]:
        table.add_row(_plain(file.path), _plain(file.reason))
    more = len(files) - BAD_FILES_ON_TERMINAL
    return [table, f"and {more:,} more"] if more > 0 else [table]


def _plain(text: str) -> Text:
    """Text from the data for the terminal: neither rich's markup nor the terminal's commands work in it."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text))


def _percent(share: float) -> str:
    """Never 0.0% or 100.0% for what is only close to it."""
    if 0 < share < 0.001:
        return "<0.1%"
    if 0.999 < share < 1:
        return ">99.9%"
    return f"{share:.1%}"


def _setting(value: Any) -> str:
    if value is None:
        return "not set"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def _days_plot(manifest: DatasetManifest, summary: DataSummary) -> Plot:
    title = "Interactions per day"
    if not summary.interactions_per_day:
        return Plot(title, f"Not shown: {_why_no_days(manifest)}.", None)
    dates, counts = zip(*sorted(summary.interactions_per_day.items()), strict=True)
    days = np.array(dates, "datetime64[D]").astype(np.int64)
    last = int(days[-1])
    edges, sums = _binned(days, np.array(counts), last, _DAY_BINS)
    means = sums / np.diff(np.minimum(edges, last + 1))  # the last bin may reach beyond the last day
    ticks = np.unique(np.linspace(days[0], last, 4).round().astype(np.int64))

    def draw(axes: "Axes") -> None:
        axes.stairs(means, edges, fill=True, color=_COLOUR)
        axes.set_xticks(ticks + 0.5, ticks.astype("datetime64[D]").astype(str))
        axes.set_ylabel("interactions per day")
        axes.grid(axis="x", visible=False)
        _count_axis(axes.yaxis)

    width = int(edges[1] - edges[0])
    return Plot(title, f"Means of {width} days each." if width > 1 else "Days in UTC.", _svg(title, draw))


def _lengths_plot(summary: DataSummary) -> Plot:
    lengths, users = _arrays(summary.users_by_length)
    shares = users.cumsum() / users.sum()
    last = int(lengths[np.searchsorted(shares, _LENGTHS_SHOWN)])
    edges, sums = _binned(lengths, users, last, _LENGTH_BINS)
    beyond = 1 - sums.sum() / users.sum()

    def draw(axes: "Axes") -> None:
        axes.stairs(sums, edges - 0.5, fill=True, color=_COLOUR)
        axes.set_xlabel("interactions in the history")
        axes.set_ylabel("users")
        axes.grid(axis="x", visible=False)
        _count_axis(axes.xaxis)
        _count_axis(axes.yaxis)

    width = int(edges[1] - edges[0])
    note = f"In steps of {width}. " if width > 1 else ""
    if beyond > 0:
        note += f"Not shown: {_percent(beyond)} of users, with histories of up to {lengths[-1]:,}."
    title = "Length of histories"
    return Plot(title, note, _svg(title, draw))


def _popularity_plot(summary: DataSummary) -> Plot:
    ranks, counts = np.array(summary.item_counts).T

    def draw(axes: "Axes") -> None:
        axes.loglog(ranks, counts, color=_COLOUR, marker="o", markersize=3)
        axes.set_xlabel("rank of the item")
        axes.set_ylabel("interactions")
        axes.set_xlim(*_decades(ranks[-1]))
        axes.set_ylim(*_decades(counts[0]))
        _count_axis(axes.xaxis)
        _count_axis(axes.yaxis)

    title = "Popularity of items"
    return Plot(title, "Both scales are logarithmic.", _svg(title, draw))


def _decades(largest: int) -> tuple[float, float]:
    """Limits of a logarithmic axis from 1 on, with at least two powers of ten for labels."""
    return 0.8, 1.25 * 10.0 ** max(1, np.ceil(np.log10(largest)))


def _arrays(counts: dict[int, int]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Keys and values, by ascending key."""
    keys, values = np.array(sorted(counts.items()), np.int64).T
    return keys, values


def _binned(
    values: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], last: int, bins: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Counts of ascending values in at most so many bins of one whole width, up to the bin with ``last``.

    Returns the edges [n + 1] and the sums [n].
    """
    first = int(values[0])
    width = -(-(last + 1 - first) // bins)
    edges = np.arange(first, last + 1 + width, width)
    ends = np.concatenate([[0], counts.cumsum()])[np.searchsorted(values, edges)]
    return edges, np.diff(ends)


def _count_axis(axis: Any) -> None:
    """Whole numbers, short: 20k for 20,000."""
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

    if axis.get_scale() == "linear":
        axis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    axis.set_major_formatter(EngFormatter(sep=""))
    axis.set_minor_formatter(NullFormatter())


def _svg(title: str, draw: Callable[["Axes"], None]) -> "Markup":
    """The ``svg`` element of a plot, whose text and background the page decides."""
    from markupsafe import Markup
    from matplotlib import style
    from matplotlib.figure import Figure

    # The salt makes ids the same in each run, and different in each plot of a page.
    with style.context(["default", {**_PLOT_STYLE, "svg.hashsalt": title}]):
        figure = Figure(figsize=(4.8, 2.6), layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # XML's own head has no place in HTML
    return Markup(re.sub(r'<g id="[^"]*"', "<g", svg))  # figure_1 and such: every plot has them
