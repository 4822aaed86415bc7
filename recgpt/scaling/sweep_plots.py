"""Plots of a sweep: inside its page, and as PNG and SVG files beside it."""

import io
import json
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from recgpt.plots import COLOURS, Plot, number_axis, plot, share_axis
from recgpt.scaling.experiment import WORKERS
from recgpt.scaling.parts import PARTS
from recgpt.scaling.results import Summary, efficiencies
from recgpt.scaling.sweep_tables import readable, short_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_STYLES = ("-", "--", ":", "-.")
_MOST_LINES = len(COLOURS) * len(_STYLES)


class Drawing(NamedTuple):
    """A plot that is not drawn yet."""

    name: str
    """Of its files."""
    title: str
    note: str
    draw: Callable[["Axes"], None]

    def for_page(self) -> Plot:
        return plot(self.title, self.note, self.draw)

    def files(self) -> dict[str, bytes]:
        """By name: the same as PNG and SVG, on white."""
        from matplotlib import style
        from matplotlib.figure import Figure

        with style.context(["default", {"svg.hashsalt": self.name, "text.parse_math": False}]):
            figure = Figure(figsize=(7, 4.2), layout="constrained", dpi=150)
            axes = figure.add_subplot()
            axes.set_title(self.title)
            axes.grid(alpha=0.25)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            self.draw(axes)
            drawn = {}
            for format_, metadata in (("png", None), ("svg", {"Date": None})):
                file = io.BytesIO()
                figure.savefig(file, format=format_, metadata=metadata)
                drawn[f"{self.name}.{format_}"] = file.getvalue()
        return drawn


class _Line(NamedTuple):
    """Points that differ in the first key alone."""

    name: str
    points: list[Summary]


def drawings(summaries: Sequence[Summary]) -> list[Drawing]:
    """The plots of what was measured; none if nothing was, or if there is one point alone."""
    measured = [summary for summary in summaries if summary.measured]
    if len(measured) < 2:
        return []
    key = _swept(measured)
    efficiency = efficiencies(measured)
    plots = [
        Drawing(
            "step_time",
            "Time of a step",
            "Median over the repeats; the bars reach from the fastest to the slowest repeat.",
            _curves(measured, key, "ms", lambda some: 1e3 * (some.figures["step_seconds"] or 0), bars=True),
        ),
        Drawing(
            "tokens_per_second",
            "Throughput",
            "Inputs of the GPT, all workers together.",
            _curves(measured, key, "tokens per second", lambda some: some.figures["tokens_per_second"] or 0),
        ),
    ]
    if efficiency:
        plots.append(
            Drawing(
                "efficiency",
                "Efficiency",
                "Tokens per second and worker, by those of the fewest workers.",
                _curves(measured, WORKERS, "efficiency", lambda some: efficiency[some.label], share=True),
            )
        )
    note = "Exclusive parts: waiting in an exchange counts for that exchange alone."
    plots.append(Drawing("parts", "Where a step's time goes", note, _stacked(measured)))
    return plots


def _swept(measured: Sequence[Summary]) -> str:
    """The key along the axis: the workers, if they change, else the first that does, best one of numbers."""
    keys = list(measured[0].values)
    changing = [key for key in keys if len({_mark(some.values[key]) for some in measured}) > 1]
    numbers = [key for key in changing if all(isinstance(some.values[key], int | float) for some in measured)]
    return WORKERS if WORKERS in changing else (numbers or changing or keys)[0]


def _mark(value: Any) -> str:
    return json.dumps(value)


def _places(measured: Sequence[Summary], key: str) -> list[Any]:
    """The values of a key, each once: numbers in their order, others as they come."""
    values = list({_mark(some.values[key]): some.values[key] for some in measured}.values())
    is_number = all(isinstance(value, int | float) for value in values)
    return sorted(values) if is_number else values


def _lines(measured: Sequence[Summary], key: str) -> list[_Line]:
    lines: dict[str, _Line] = {}
    follows = _followers(measured, key)
    for some in measured:
        others = [
            f"{name}={readable(value)}" for name, value in some.values.items() if name not in (key, *follows)
        ]
        name = " ".join(others)
        lines.setdefault(name, _Line(name, [])).points.append(some)
    return list(lines.values())


def _followers(measured: Sequence[Summary], key: str) -> list[str]:
    """Keys that the first one decides, such as a window that grows with the histories."""
    by_key: dict[str, dict[str, set[str]]] = {}
    for some in measured:
        for name, value in some.values.items():
            by_key.setdefault(name, {}).setdefault(_mark(some.values[key]), set()).add(_mark(value))
    return [
        name
        for name, seen in by_key.items()
        if name != key and all(len(values) == 1 for values in seen.values())
    ]


def _curves(
    measured: Sequence[Summary],
    key: str,
    unit: str,
    value: Callable[[Summary], float],
    bars: bool = False,
    share: bool = False,
) -> Callable[["Axes"], None]:
    places = _places(measured, key)
    lines = _lines(measured, key)[:_MOST_LINES]

    def draw(axes: "Axes") -> None:
        for number, line in enumerate(lines):
            colour, dashes = COLOURS[number % len(COLOURS)], _STYLES[number // len(COLOURS)]
            points = sorted(line.points, key=lambda some: places.index(some.values[key]))
            x = [places.index(some.values[key]) for some in points]
            y = [value(some) for some in points]
            axes.plot(x, y, dashes, marker="o", markersize=4, color=colour, label=line.name)
            if bars:
                low = [1e3 * (some.least_step_seconds or 0) for some in points]
                high = [1e3 * (some.most_step_seconds or 0) for some in points]
                axes.vlines(x, low, high, color=colour, linewidth=1)
        axes.set_xticks(range(len(places)), [readable(place) for place in places])
        axes.set_xlabel(key)
        axes.set_ylabel(unit)
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
        (share_axis if share else number_axis)(axes.yaxis)
        if len(lines) > 1:
            axes.legend(fontsize="x-small")

    return draw


def _stacked(measured: Sequence[Summary]) -> Callable[["Axes"], None]:
    shown = [part for part in PARTS if any(some.figures[f"{part}_seconds"] for some in measured)]

    def draw(axes: "Axes") -> None:
        from matplotlib import colormaps

        colours = colormaps["tab20"].colors  # type: ignore[attr-defined]
        labels = list(map(short_label, measured))
        left = [0.0] * len(measured)
        for number, part in enumerate(shown):
            width = [1e3 * (some.figures[f"{part}_seconds"] or 0) for some in measured]
            axes.barh(labels, width, left=left, color=colours[number], label=part.replace("_", " "))
            left = [start + more for start, more in zip(left, width, strict=True)]
        axes.figure.set(figheight=2.2 + 0.3 * len(measured))
        axes.invert_yaxis()
        axes.set_xlabel("ms")
        axes.set_ylabel(", ".join(measured[0].values))
        axes.tick_params(axis="y", labelsize="x-small")
        axes.figure.legend(loc="outside lower center", ncols=4, fontsize="x-small")

    return draw
