"""Plots of a projection, as PNG and SVG; each says in its title that nothing of it was measured."""

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from recgpt.plots import COLOURS, count_axis
from recgpt.scaling.projection import (
    NOTE,
    TABLES,
    Choice,
    Point,
    Projection,
    count,
    replicated_text,
    sharded_text,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

KINDS = ("png", "svg")
_PARTS = ("#3f86c8", "#c8602a", "#2f9a6a", "#8a63b8", "#b8a03f", "#888888", "#c24f79")
_FITS = ("#d7e8f7", "#a9cdea", "#cdeeda", "#9fdcb8", "#f7e8c0", "#f0d48a")  # pale: text stands on them
_DOES_NOT_FIT = "#eeeeee"


def figure_files(title: str, size: tuple[float, float], draw: Callable[["Figure"], None]) -> dict[str, bytes]:
    """What ``draw`` draws under a title, by kind of file; the same drawing gives the same files.

    ``size``: inches.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    settings = {"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False, "font.size": 9}
    with style.context(["default", settings]):  # whatever a user's own matplotlibrc says
        figure = Figure(figsize=size, layout="constrained", dpi=150)
        figure.suptitle(title)
        draw(figure)
        files = {}
        for kind in KINDS:
            file = io.BytesIO()
            figure.savefig(file, format=kind, metadata={"Date": None} if kind == "svg" else None)
            files[kind] = file.getvalue()
    return files


def curves(projection: Projection) -> dict[str, bytes]:
    """Throughput, time of an epoch, memory and the parts of a step over the number of GPUs."""
    items = sorted({point.items for point in projection.points})
    shown = list(dict.fromkeys((items[0], items[len(items) // 2], items[-1])))
    lines = {size: [point for point in projection.points if point.items == size] for size in shown}

    def draw(figure: "Figure") -> None:
        (throughput, epoch), (memory, parts) = figure.subplots(2, 2)
        # Lines that lie over one another are all seen: the later, the thinner.
        for colour, width, (size, points) in zip(COLOURS, (5, 3, 1.5), lines.items(), strict=False):
            gpus = [point.gpus for point in points]
            label = f"{count(size)} items"
            for axes, name in ((throughput, "tokens_per_second"), (epoch, "epoch_seconds")):
                ranges = [getattr(point, name) for point in points]
                axes.plot(gpus, [each.middle for each in ranges], color=colour, label=label, linewidth=width)
                low, high = [each.low for each in ranges], [each.high for each in ranges]
                axes.fill_between(gpus, low, high, color=colour, alpha=0.15, linewidth=0)
            sizes = [point.memory_bytes / 2**30 for point in points]
            memory.plot(gpus, sizes, color=colour, label=label, linewidth=width)
        memory.axhline(projection.memory_available / 2**30, color="black", linestyle=":", linewidth=1)
        memory.annotate("may be used", (gpus[0], projection.memory_available / 2**30), va="bottom")
        for axes, title in (
            (throughput, "projected tokens per second, with range"),
            (epoch, "projected seconds of an epoch, with range"),
            (memory, "projected GiB of a GPU"),
        ):
            _over_gpus(axes, title, gpus)
            axes.set_yscale("log")
            log_axis(axes.yaxis)
            axes.legend(frameon=False)
        _draw_parts(parts, lines[shown[-1]])

    return figure_files(f"{projection.device}. {NOTE}", (11, 7.5), draw)


def log_axis(axis: "Axis") -> None:
    """Counts on a logarithmic axis, short, also where it spans less than a factor of ten."""
    from matplotlib.ticker import LogLocator

    count_axis(axis)
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))


def _over_gpus(axes: "Axes", title: str, gpus: Sequence[int]) -> None:
    axes.set_title(title)
    axes.set_xlabel("GPUs")
    axes.set_xscale("log", base=2)
    axes.set_xticks(gpus, [str(number) for number in gpus])
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _draw_parts(axes: "Axes", points: Sequence[Point]) -> None:
    """Shares of a step, one over the other."""
    gpus = [point.gpus for point in points]
    names = list(points[0].step_parts)
    shares = [[point.step_parts[name] / point.step_seconds.middle for point in points] for name in names]
    axes.stackplot(gpus, shares, labels=names, colors=_PARTS, alpha=0.85)
    _over_gpus(axes, f"projected shares of a step, {count(points[0].items)} items", gpus)
    axes.set_ylim(0, 1)
    axes.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, reverse=True)


def choices(projection: Projection) -> dict[str, bytes]:
    """Which table and which ZeRO stage fit, by items and GPUs: one chart for each placement of the table."""
    colour_of_table = dict(zip(TABLES, _FITS, strict=True))

    def draw(figure: "Figure") -> None:
        sharded, replicated = figure.subplots(2, 1)
        _draw_grid(
            sharded,
            "projected: table sharded over all GPUs; the optimizer that keeps the most state and fits",
            projection.choices,
            sharded_text,
            lambda choice: colour_of_table[choice.table] if choice.table else _DOES_NOT_FIT,
        )
        _draw_grid(
            replicated,
            "projected: whole table on every GPU under Adam; the lowest ZeRO stage that fits, "
            "and its time per step over that of a sharded table",
            projection.choices,
            replicated_text,
            lambda choice: (
                _FITS[2 * choice.replicated_zero_stage - 2] if choice.replicated_zero_stage else _DOES_NOT_FIT
            ),
        )

    return figure_files(f"{projection.device}. {NOTE}", (12, 7.5), draw)


def _draw_grid(
    axes: "Axes",
    title: str,
    cells: Sequence[Choice],
    text: Callable[[Choice], str],
    colour: Callable[[Choice], str],
) -> None:
    from matplotlib.patches import Rectangle

    gpus = list(dict.fromkeys(cell.gpus for cell in cells))
    items = list(dict.fromkeys(cell.items for cell in cells))
    for cell in cells:
        place = gpus.index(cell.gpus), items.index(cell.items)
        corner = (place[0] - 0.5, place[1] - 0.5)
        axes.add_patch(Rectangle(corner, 1, 1, facecolor=colour(cell), edgecolor="white", linewidth=2))
        axes.text(*place, text(cell).replace("; ", "\n").replace(", ", "\n"), ha="center", va="center")
    axes.set_title(title)
    axes.set_xticks(range(len(gpus)), [f"{number} GPUs" for number in gpus])
    axes.set_yticks(range(len(items)), [f"{count(size)} items" for size in items])
    axes.set_xlim(-0.5, len(gpus) - 0.5)
    axes.set_ylim(-0.5, len(items) - 0.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
