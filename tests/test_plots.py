"""Plots of the reports: readable in light and dark, told in words too, and no text in them is markup."""

import re
from pathlib import Path

import numpy as np
import pytest

from recgpt.plots import COLOURS, Curve, curve_plot, number_axis, plot, share_axis

PAGE = (Path(__file__).parent.parent / "recgpt" / "page.html.jinja").read_text()
HOSTILE = "</svg><script>alert(1)</script>$\\frac"


def curve(name, *points):
    return Curve(name, np.array(points, np.float64))


def schemes():
    """The colours of the page by name: in light, and what is other in dark."""
    light, dark = (
        dict(re.findall(r"--(\w+): (#\w{6})", block)) for block in re.findall(r":root {(.*?)}", PAGE, re.S)
    )
    return [light, {**light, **dark}]


def contrast(one, other):
    """As the Web Content Accessibility Guidelines (WCAG 2.1) define it."""

    def luminance(colour):
        shares = [int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5)]
        linear = [share / 12.92 if share <= 0.03928 else ((share + 0.055) / 1.055) ** 2.4 for share in shares]
        return np.dot(linear, [0.2126, 0.7152, 0.0722]) + 0.05

    darker, lighter = sorted(map(luminance, (one, other)))
    return lighter / darker


@pytest.mark.parametrize("scheme", schemes(), ids=["light", "dark"])
def test_contrast(scheme):
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for ground in (scheme["page"], scheme["box"]):
        assert contrast(scheme["text"], ground) >= 4.5
        assert contrast(scheme["muted"], ground) >= 4.5
    assert all(contrast(colour, scheme["box"]) >= 3 for colour in COLOURS)


def test_a_plot_is_told_in_words():
    curves = [curve("a", (1, 10), (2, 5.5)), curve("b", (1, 0.25))]
    svg = curve_plot("T", "N", curves, ("step", "loss"), lambda axes: None).svg
    assert svg.startswith("<svg ")
    assert ' role="img"><title>T</title><desc>' in svg
    assert "<desc>a: 10 at step 1, 5.5 at step 2; b: 0.25 at step 1, 0.25 at step 1</desc>" in svg
    assert {">step<", ">loss<", ">a<", ">b<"} <= set(
        re.findall(r">\w+<", svg)
    )  # text is text, legend and all
    assert "<desc>N</desc>" in plot("T", "N", lambda axes: None).svg


def test_one_curve_needs_no_legend():
    svg = curve_plot("T", "N", [curve("alone", (1, 2), (2, 3))], ("x", "y"), lambda axes: None).svg
    assert ">alone<" not in svg


def test_names_are_neither_markup_nor_mathematics():
    curves = [curve(HOSTILE, (1, 2)), curve("b", (1, 3))]
    svg = curve_plot(HOSTILE, HOSTILE, curves, (HOSTILE, HOSTILE), lambda axes: None).svg
    assert "<script" not in svg
    assert svg.count("</svg>") == 1
    assert svg.count("&lt;script&gt;") == 9  # title, five times in the description, axes, legend


@pytest.mark.parametrize(
    ("points", "axis", "label"),
    [
        (((1, 0), (2, 20_000)), number_axis, "20k"),
        (((1, 0), (2, 0.0004)), number_axis, "0.0004"),
        (((1, 0), (2, 0.2)), share_axis, "20%"),
    ],
)
def test_numbers_at_an_axis_are_short(points, axis, label):
    svg = curve_plot("T", "N", [curve("a", *points)], ("x", "y"), lambda axes: axis(axes.yaxis)).svg
    assert f">{label}<" in svg
