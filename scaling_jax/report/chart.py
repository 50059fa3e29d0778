"""How every figure looks: colour-blind safe colours, units on axes, plain numbers."""

import dataclasses
import html
import io
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from scaling_jax.io.files import whole_file, write_whole

# Okabe & Ito's palette, without the green that noise-scale dots use
MODEL_COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")
NOISE_COLOUR = "#009E73"
LAW_COLOUR = "0.35"
# Of losses and batch sizes; viridis' last yellows can't be seen on white
COLOURS = ListedColormap(matplotlib.colormaps["viridis"](np.linspace(0, 0.94, 256)))

PARAMETERS: Any = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "axes.axisbelow": True,
    "legend.frameon": True,
    "legend.framealpha": 0.9,
    "legend.edgecolor": "0.85",
    "svg.hashsalt": "scaling_jax",  # the same figure is the same file
}


def new_figure(panels: int = 1, *, width: float = 5.6, height: float = 4.2) -> tuple[Figure, list[Axes]]:
    """Panels side by side, each of a size in inches, with room for a colour bar or a legend."""
    with matplotlib.rc_context(PARAMETERS):
        figure = Figure(figsize=(width + 4.8 * (panels - 1), height), layout="constrained")
        (axes,) = figure.subplots(1, panels, squeeze=False, sharey=True)
    return figure, list(axes)


def loss_bar(figure: Figure, axes: list[Axes], losses: list[float]) -> Normalize:
    """A colour bar for test losses, dark = low; returns the scale of its colours."""
    norm = Normalize(min(losses, default=2.0), max(losses, default=3.0))
    _bar(figure, axes, norm).set_label("test loss, nats per token")
    return norm


def batch_bar(figure: Figure, axes: list[Axes], batch_tokens: list[int]) -> Normalize:
    """A colour bar for batch sizes, dark = small; returns the scale of its colours."""
    norm = LogNorm(min(batch_tokens), max(batch_tokens))
    bar = _bar(figure, axes, norm)
    bar.set_label("batch size, tokens")
    bar.ax.yaxis.set_major_locator(FixedLocator(sorted(set(batch_tokens))))
    bar.ax.yaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    bar.ax.yaxis.set_minor_locator(NullLocator())
    return norm


def _bar(figure: Figure, axes: list[Axes], norm: Normalize):
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), ax=axes, pad=0.02)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return bar


def loss_axis(axis: Axes, losses: list[float]) -> tuple[float, float]:
    """Logarithmic, falling from left to right, with plain numbers and a little room; returns the ends, low first."""
    low, high = min(losses, default=2.0), max(losses, default=3.0)
    room = max(1.02, (high / low) ** 0.06)
    low, high = low / room, high * room
    axis.set_xscale("log")
    axis.set_xlim(high, low)
    step = 0.1 if high - low < 1 else 0.2 if high - low < 2.5 else 0.5
    first = math.ceil(low / step - 1e-9) * step
    axis.xaxis.set_major_locator(FixedLocator(list(np.arange(first, high + 1e-9, step))))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.1f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("test loss, nats per token")
    return low, high


def count_axis(axis: Any) -> None:
    """A logarithmic x or y axis of counts with plain numbers, as many as fit; call it once its limits are set."""
    axis.axes.set_xscale("log") if axis.axis_name == "x" else axis.axes.set_yscale("log")
    low, high = axis.axes.get_xlim() if axis.axis_name == "x" else axis.axes.get_ylim()
    within = (1, 1.5, 2, 3, 5, 7) if high / low < 10 else (1, 2, 5) if high / low < 3_000 else (1,)
    axis.set_major_locator(LogLocator(subs=within, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda x, _: _count(x)))
    axis.set_minor_formatter(NullFormatter())


def batch_axis(axis: Axes) -> None:
    """A logarithmic x axis of batch sizes in tokens, with every power of two."""
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axis.tick_params(axis="x", labelsize=8.5)
    axis.set_xlabel("batch size, tokens")


def plain(text: str) -> str:
    """Without meaning for matplotlib's formulas."""
    return text.replace("$", r"\$")


def _count(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


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
    path = folder / f"{chart.name}.png"
    write_whole(path.with_suffix(".svg"), _svg(chart))
    with matplotlib.rc_context(PARAMETERS), whole_file(path) as file:
        chart.figure.savefig(file, format="png", dpi=160, metadata={"Software": None})
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
