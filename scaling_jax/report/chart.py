"""A chart: a matplotlib figure, and what its points say when a reader points at them."""

import dataclasses
import html
import io
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scaling_jax.report.style import PARAMETERS
from scaling_jax.training.records import write_atomically

_POINTS_PER_INCH = 72  # an SVG's unit


class Mark(NamedTuple):
    """A point in data coordinates, and its text."""

    axis: Axes
    x: float
    y: float
    text: str


@dataclasses.dataclass(frozen=True, eq=False)
class Chart:
    """A figure with marks; `mark` adds them."""

    name: str  # of its files
    caption: str  # what it shows, for people who can't see it as well
    figure: Figure
    marks: list[Mark] = dataclasses.field(default_factory=list)

    def mark(self, axis: Axes, x: Iterable[float], y: Iterable[float], texts: Iterable[str]) -> None:
        self.marks.extend(Mark(axis, *point) for point in zip(x, y, texts, strict=True))


class Drawn(NamedTuple):
    """A chart as HTML takes it: an <svg> without namespaces, and its marks in the SVG's units."""

    caption: str
    svg: str
    marks: list[tuple[float, float, str]]


def save(chart: Chart, folder: Path) -> Path:
    """Writes the chart's PNG and SVG, each whole or not at all; returns the PNG's path."""
    path, unfinished = folder / f"{chart.name}.png", folder / f".{chart.name}-{os.getpid()}.png"
    write_atomically(path.with_suffix(".svg"), _svg(chart))
    try:
        with matplotlib.rc_context(PARAMETERS):
            chart.figure.savefig(unfinished, dpi=160, metadata={"Software": None})
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def draw(chart: Chart, prefix: str) -> Drawn:
    """The chart for a page whose other charts have other prefixes: an id must not come twice."""
    svg = _svg(chart)  # first: saving lays the axes out
    width, height = chart.figure.get_size_inches() * _POINTS_PER_INCH
    to_figure = chart.figure.transFigure.inverted()
    marks = []
    for mark in chart.marks:
        x, y = to_figure.transform(mark.axis.transData.transform((mark.x, mark.y)))
        if 0 <= x <= 1 and 0 <= y <= 1:
            marks.append((round(x * width, 1), round((1 - y) * height, 1), mark.text))
    return Drawn(chart.caption, _inline(svg, prefix, chart.caption), marks)


def _svg(chart: Chart) -> str:
    text = io.StringIO()
    with matplotlib.rc_context(PARAMETERS):
        chart.figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()


def _inline(svg: str, prefix: str, caption: str) -> str:
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<!--.*?-->|<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"\n\s*", "\n", svg)
    view = re.search(r'viewBox="[^"]*"', svg)
    assert view is not None
    svg = re.sub(r"<svg[^>]*>", f'<svg {view.group()} role="img" aria-label="{html.escape(caption)}">', svg, count=1)
    svg = svg.replace("xlink:href=", "href=")
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = re.sub(r'href="#', f'href="#{prefix}-', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}-", svg)
    # Hundredths of a point are finer than any screen; the scales of letters (scale(0.015625)) stay as they are.
    return re.sub(r'(?<= d| x| y)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m.group()), svg)
