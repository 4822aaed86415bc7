"""Plots of the reports: SVG inside of a page, which decides their text and background, in light and dark."""

import io
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

COLOURS = ("#3f86c8", "#c8602a", "#2f9a6a")
"""Each stands out from a white and from a dark page (contrast 3 or more)."""

_DASHES = ("-", "--", ":")  # beside the colours, which not everyone can tell apart
_GRAY = "#888888"
_SHORT_FROM = 1000  # 20k for 20,000
# Text stays black, which matplotlib writes down nowhere, so that the page can give it its own colour.
_STYLE = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # names come from the data
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
    "legend.frameon": False,
    "xtick.color": _GRAY,
    "xtick.labelcolor": "black",
    "ytick.color": _GRAY,
    "ytick.labelcolor": "black",
}


class Plot(NamedTuple):
    """One plot of a report; ``svg`` is None where there is nothing to draw, and ``note`` says why."""

    title: str
    note: str
    svg: "Markup | None"


class Curve(NamedTuple):
    name: str
    points: npt.NDArray[np.float64]
    """x and y, [n, 2], n > 0."""


def plot(title: str, note: str, draw: Callable[["Axes"], None], description: str = "") -> Plot:
    """A plot of what ``draw`` draws; the same arguments give the same SVG.

    ``title`` must be the plot's alone on its page. Screen readers read it with ``description``, or the note.
    """
    from markupsafe import Markup
    from matplotlib import style
    from matplotlib.figure import Figure

    # The salt makes ids the same in each run, and different in each plot of a page.
    with style.context(["default", {**_STYLE, "svg.hashsalt": title}]):
        figure = Figure(figsize=(4.2, 2.5), layout="constrained")
        draw(figure.add_subplot())
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # XML's own head has no place in HTML
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # figure_1 and such: every plot has them
    start, _, content = svg.partition(">")
    names = Markup("<title>{}</title><desc>{}</desc>").format(title, description or note)
    return Plot(title, note, Markup(f'{start} role="img">{names}{content}'))


def curve_plot(
    title: str, note: str, curves: Sequence[Curve], labels: tuple[str, str], refine: Callable[["Axes"], None]
) -> Plot:
    """Curves over one another.

    Args:
        labels: of the axes, x and y, with their units.
        refine: is given the axes once the curves are drawn.
    """
    x_label, y_label = labels

    def draw(axes: "Axes") -> None:
        for place, (name, points) in enumerate(curves):
            style = _DASHES[place % len(_DASHES)]
            marker = "." if len(points) == 1 else ""  # a single point makes no line
            axes.plot(*points.T, style, color=COLOURS[place % len(COLOURS)], marker=marker, label=name)
        if len(curves) > 1:
            axes.figure.legend(loc="outside upper left", ncols=len(curves))
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        refine(axes)

    description = "; ".join(
        f"{name}: {points[0, 1]:.4g} at {x_label} {points[0, 0]:.4g}, "
        f"{points[-1, 1]:.4g} at {x_label} {points[-1, 0]:.4g}"
        for name, points in curves
    )
    return plot(title, note, draw, description)


def count_axis(axis: Any) -> None:
    """Whole numbers, short: 20k for 20,000."""
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

    if axis.get_scale() == "linear":
        axis.set_major_locator(MaxNLocator(nbins=5, integer=True, min_n_ticks=1))
    axis.set_major_formatter(EngFormatter(sep=""))
    axis.set_minor_formatter(NullFormatter())


def number_axis(axis: Any) -> None:
    """Numbers of any size, large ones short."""
    from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=5))
    largest = max(map(abs, axis.get_view_interval()))
    short = EngFormatter(sep="") if largest >= _SHORT_FROM else FuncFormatter(lambda value, _: f"{value:g}")
    axis.set_major_formatter(short)


def share_axis(axis: Any) -> None:
    """Shares in percent."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    if axis.get_scale() == "linear":
        axis.set_major_locator(MaxNLocator(nbins=5))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.4g}%"))
    axis.set_minor_formatter(NullFormatter())
