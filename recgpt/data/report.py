"""The report on a prepared dataset, on the terminal and as HTML: what it holds, what was left out and why."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from recgpt.data.dataset import BadFile, DatasetManifest
from recgpt.data.summary import COLD_BELOW, BadRow, DataSummary
from recgpt.pages import Headline, percent, render
from recgpt.plots import COLOURS, Plot, count_axis, plot

if TYPE_CHECKING:
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


class Dropped(NamedTuple):
    """Rows left out for one reason."""

    key: str
    reason: str
    rows: int
    share: float
    """Of all rows read."""


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
            table.add_row(_plain(reason), f"{rows:,}", percent(share))
        parts.append(table)
    if manifest.bad_files:
        parts += _bad_files(manifest.bad_files)
    return Group(*parts)


def html_report(manifest: DatasetManifest, summary: DataSummary, bad_rows: Sequence[BadRow]) -> str:
    """One HTML file that needs nothing beside it; the same arguments give the same text."""
    return render(
        "data/report.html.jinja",
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


def _headlines(manifest: DatasetManifest, summary: DataSummary) -> list[Headline]:
    kept = percent(manifest.num_interactions / _rows_read(manifest))
    cold = percent(summary.cold_interaction_share)
    headlines = [
        Headline("users", f"{manifest.num_users:,}"),
        Headline("items", f"{manifest.num_items:,}"),
        Headline("interactions", f"{manifest.num_interactions:,}", f"{kept} of {_rows_read_text(manifest)}"),
        length_headline(summary.users_by_length),
        _time_span(manifest, summary),
        Headline(
            "cold items",
            percent(summary.cold_item_share),
            f"have fewer than {COLD_BELOW} interactions; {cold} of interactions are with them",
        ),
    ]
    if summary.new_item_share is not None:
        note = "of the newest tenth of interactions are with items unseen before"
        headlines.append(Headline("new items", percent(summary.new_item_share), note))
    return headlines


def _rows_read(manifest: DatasetManifest) -> int:
    return manifest.num_interactions + sum(manifest.dropped.values())


def _rows_read_text(manifest: DatasetManifest) -> str:
    text = f"{_rows_read(manifest):,} rows read"
    return f"{text}, the older dataset's included" if manifest.lineage else text


def length_headline(users_by_length: dict[int, int]) -> Headline:
    """Median, mean and largest length of the histories of at least one user."""
    lengths, users = _arrays(users_by_length)
    ends = users.cumsum()
    num_users = int(ends[-1])
    middle = np.searchsorted(ends, [(num_users - 1) // 2, num_users // 2], side="right")
    median, mean = float(lengths[middle].mean()), float(lengths @ users / num_users)
    return Headline("median history", f"{median:,g}", f"mean {mean:,.1f}, longest {lengths[-1]:,}")


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


def _days_plot(manifest: DatasetManifest, summary: DataSummary) -> Plot:
    title = "Interactions per day"
    if not summary.interactions_per_day:
        return Plot(title, f"Not shown: {_why_no_days(manifest)}.", None)
    dates, counts = zip(*sorted(summary.interactions_per_day.items()), strict=True)
    days = np.array(dates, "datetime64[D]").astype(np.int64)
    last = int(days[-1])
    edges, sums = _binned(days, np.array(counts), last, _DAY_BINS)
    means = sums / np.diff(np.minimum(edges, last + 1))  # the last bin may reach beyond the last day
    ticks = np.unique(np.linspace(days[0], last, 3).round().astype(np.int64))

    def draw(axes: "Axes") -> None:
        axes.stairs(means, edges, fill=True, color=COLOURS[0])
        axes.set_xticks(ticks + 0.5, ticks.astype("datetime64[D]").astype(str))
        axes.set_ylabel("interactions per day")
        axes.grid(axis="x", visible=False)
        count_axis(axes.yaxis)

    width = int(edges[1] - edges[0])
    return plot(title, f"Means of {width} days each." if width > 1 else "Days in UTC.", draw)


def _lengths_plot(summary: DataSummary) -> Plot:
    lengths, users = _arrays(summary.users_by_length)
    shares = users.cumsum() / users.sum()
    last = int(lengths[np.searchsorted(shares, _LENGTHS_SHOWN)])
    edges, sums = _binned(lengths, users, last, _LENGTH_BINS)
    beyond = 1 - sums.sum() / users.sum()

    def draw(axes: "Axes") -> None:
        axes.stairs(sums, edges - 0.5, fill=True, color=COLOURS[0])
        axes.set_xlabel("interactions in the history")
        axes.set_ylabel("users")
        axes.grid(axis="x", visible=False)
        count_axis(axes.xaxis)
        count_axis(axes.yaxis)

    width = int(edges[1] - edges[0])
    note = f"In steps of {width}. " if width > 1 else ""
    if beyond > 0:
        note += f"Not shown: {percent(beyond)} of users, with histories of up to {lengths[-1]:,}."
    title = "Length of histories"
    return plot(title, note, draw)


def _popularity_plot(summary: DataSummary) -> Plot:
    ranks, counts = np.array(summary.item_counts).T

    def draw(axes: "Axes") -> None:
        axes.loglog(ranks, counts, color=COLOURS[0], marker="o", markersize=3)
        axes.set_xlabel("rank of the item")
        axes.set_ylabel("interactions")
        axes.set_xlim(*_decades(ranks[-1]))
        axes.set_ylim(*_decades(counts[0]))
        count_axis(axes.xaxis)
        count_axis(axes.yaxis)

    title = "Popularity of items"
    return plot(title, "Both scales are logarithmic.", draw)


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
