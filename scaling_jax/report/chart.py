"""Charts: the common style of all figures, and charts as files or as inline SVG with marks."""

import dataclasses
import html
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, LogNorm, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullFormatter, NullLocator

from scaling_jax.io import UserError
from scaling_jax.io.files import refuse_links, whole_file, write_rows, write_whole

# Okabe and Ito's palette for colour-blind readers; its green is for noise scales
MODEL_COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")
NOISE_COLOUR = "#009E73"
LAW_COLOUR = "0.35"
# For losses and batch sizes; without the last yellows of viridis, which are hard to see on white
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
    "svg.hashsalt": "scaling_jax",  # so that equal figures give equal files
}
_POINTS_PER_INCH = 72  # the unit of an SVG is a point

Into = Figure | SubFigure | Axes | Sequence[Axes] | None  # where a chart is drawn; None makes a figure


class Mark(NamedTuple):
    """A point of a chart with the text of its tooltip."""

    axis: Axes
    x: float
    y: float
    text: str
    low: float = math.nan  # interval of y; NaN if there is none
    high: float = math.nan


class Point(NamedTuple):
    """A row of the CSV file of a chart: a measurement, in the units of its axes."""

    panel: str
    x: float
    y: float
    low: float  # interval of y; empty if there is none
    high: float
    x_axis: str  # what x is
    y_axis: str
    point: str  # the text of its tooltip


@dataclasses.dataclass(frozen=True, eq=False)
class Chart:
    """A figure with marks for tooltips."""

    name: str  # of its files
    caption: str  # a description, also for readers who can't see the figure
    figure: Figure | SubFigure
    marks: list[Mark] = dataclasses.field(default_factory=list)

    def mark(
        self, axis: Axes, x: Iterable[float], y: Iterable[float], texts: Iterable[str], intervals: Any = None
    ) -> None:
        """Adds a mark for each point (x, y), in data coordinates; `intervals` has a (low, high) of y for each."""
        points = list(zip(x, y, texts, strict=True))
        ends = [()] * len(points) if intervals is None else [(float(low), float(high)) for low, high in intervals]
        self.marks.extend(Mark(axis, *point, *own) for point, own in zip(points, ends, strict=True))

    def points(self) -> list[Point]:
        """The data of the chart: what its marks stand for."""
        first = self.figure.axes[0]
        return [
            Point(
                panel=mark.axis.get_title(loc="left").replace(r"\$", "$"),
                x=float(mark.x),
                y=float(mark.y),
                low=mark.low,
                high=mark.high,
                x_axis=mark.axis.get_xlabel(),
                y_axis=mark.axis.get_ylabel() or first.get_ylabel(),
                point=" ".join(mark.text.split()),
            )
            for mark in self.marks
        ]


class Drawn(NamedTuple):
    """A chart for an HTML page."""

    caption: str
    svg: str  # an <svg> element without namespaces
    marks: list[tuple[float, float, str]]  # x and y in the units of the SVG, and the text


def save(chart: Chart, folder: Path) -> Path:
    """Writes the chart as PNG and SVG and its data as CSV, whole or not at all. Returns the path of the PNG file."""
    refuse_links(folder)
    assert isinstance(chart.figure, Figure)
    path = folder / f"{chart.name}.png"
    write_rows(path.with_suffix(".csv"), Point, chart.points())
    write_whole(path.with_suffix(".svg"), _svg(chart))
    chart.figure.set_layout_engine("none")  # the layout of the SVG serves the PNG too; it takes a third of the time
    with matplotlib.rc_context(PARAMETERS), whole_file(path) as file:
        chart.figure.savefig(file, format="png", dpi=160, metadata={"Software": None})
    return path


def draw(chart: Chart, prefix: str) -> Drawn:
    """The chart for an HTML page. Charts on one page need different prefixes, so that their ids differ."""
    assert isinstance(chart.figure, Figure)
    svg = _svg(chart)  # comes first, because saving sets the layout of the axes
    width, height = chart.figure.get_size_inches() * _POINTS_PER_INCH
    to_figure = chart.figure.transFigure.inverted()
    marks = []
    for mark in chart.marks:
        x, y = to_figure.transform(mark.axis.transData.transform((mark.x, mark.y)))
        if 0 <= x <= 1 and 0 <= y <= 1:
            marks.append((round(x * width, 1), round((1 - y) * height, 1), mark.text))
    return Drawn(chart.caption, _inline(svg, prefix, chart.caption), marks)


def new_figure(
    panels: int = 1, *, width: float = 5.6, height: float = 4.2, into: Into = None
) -> tuple[Figure | SubFigure, list[Axes]]:
    """A figure with panels side by side; sizes are in inches. There is room for a colour bar or a legend.

    Args:
      into: what a caller gave instead: an empty figure, or an axis for each panel.

    Raises:
      UserError: if there aren't as many axes as panels.
    """
    if isinstance(into, Figure | SubFigure):
        return into, list(into.subplots(1, panels, squeeze=False, sharey=True)[0])
    if into is not None:
        axes = axes_of(into)
        if len(axes) != panels:
            raise UserError(f"the figure needs {panels} axes, one for each panel, but was given {len(axes)}")
        for other in axes[1:]:
            if not axes[0].get_shared_y_axes().joined(axes[0], other):
                other.sharey(axes[0])
        return axes[0].figure, axes
    with matplotlib.rc_context(PARAMETERS):
        figure = Figure(figsize=(width + 4.8 * (panels - 1), height), layout="constrained")
        (axes,) = figure.subplots(1, panels, squeeze=False, sharey=True)
    return figure, list(axes)


def axes_of(into: Axes | Sequence[Axes]) -> list[Axes]:
    return [into] if isinstance(into, Axes) else list(into)


def legend_below(figure: Figure | SubFigure, axes: list[Axes], handles: list, labels: list[str], columns: int) -> None:
    """Adds a legend below the panels; in the first panel if the layout of the figure keeps no room for it."""
    if isinstance(figure.get_layout_engine(), ConstrainedLayoutEngine):
        figure.legend(handles, labels, loc="outside lower center", fontsize=8.5, ncols=columns)
    else:
        axes[0].legend(handles, labels, fontsize=8.5)


def loss_bar(figure: Figure | SubFigure, axes: list[Axes], losses: list[float]) -> Normalize:
    """Adds a colour bar for test losses, dark = low. Returns the scale of its colours."""
    norm = Normalize(min(losses, default=2.0), max(losses, default=3.0))
    _bar(figure, axes, norm).set_label("test loss, nats per token")
    return norm


def batch_bar(figure: Figure | SubFigure, axes: list[Axes], batch_tokens: list[int]) -> Normalize:
    """Adds a colour bar for batch sizes, dark = small. Returns the scale of its colours."""
    norm = LogNorm(min(batch_tokens), max(batch_tokens))
    bar = _bar(figure, axes, norm)
    bar.set_label("batch size, tokens")
    bar.ax.yaxis.set_major_locator(FixedLocator(sorted(set(batch_tokens))))
    bar.ax.yaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    bar.ax.yaxis.set_minor_locator(NullLocator())
    return norm


def say_if_empty(axis: Axes, drawn: bool, why: str = "no run reached a target loss") -> None:
    """Writes into a panel why nothing is drawn in it."""
    if not drawn:
        axis.text(0.5, 0.5, why, transform=axis.transAxes, ha="center", va="center", color="0.4")


def loss_axis(axis: Axes, losses: list[float]) -> tuple[float, float]:
    """Makes x a logarithmic axis of losses that fall from left to right. Returns its (low, high) ends."""
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
    """Makes an x or y axis logarithmic, with plain numbers. Call it after the limits of the axis are set."""
    low, high = _logarithmic(axis)
    within = (1, 1.5, 2, 3, 5, 7) if high / low < 10 else (1, 2, 5) if high / low < 3_000 else (1,)
    axis.set_major_locator(LogLocator(subs=within, numticks=9))
    axis.set_major_formatter(FuncFormatter(lambda x, _: _count(x)))
    axis.set_minor_formatter(NullFormatter())


def batch_axis(axis: Axes) -> None:
    """Makes x a logarithmic axis of batch sizes in tokens, with powers of two."""
    _logarithmic(axis.xaxis, base=2)
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}"))
    axis.tick_params(axis="x", labelsize=8.5)
    axis.set_xlabel("batch size, tokens")


def plain(text: str) -> str:
    """The text, escaped so that matplotlib sees no formulas in it."""
    return text.replace("$", r"\$")


def _logarithmic(axis: Any, **options: Any) -> tuple[float, float]:
    """Makes an x or y axis logarithmic. Returns its (low, high) ends; an axis without data gets ends, too."""
    axes, x_or_y = axis.axes, axis.axis_name
    getattr(axes, f"set_{x_or_y}scale")("log", **options)
    low, high = getattr(axes, f"get_{x_or_y}lim")()
    if not 0 < low < high < math.inf:
        low, high = getattr(axes, f"set_{x_or_y}lim")(1, 10)
    return low, high


def _bar(figure: Figure | SubFigure, axes: list[Axes], norm: Normalize):
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), ax=axes, pad=0.02)
    bar.outline.set_visible(False)  # type: ignore[operator]
    return bar


def _count(value: float) -> str:
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g}{unit}"
    return f"{value:.4g}"


def _svg(chart: Chart) -> str:
    text = io.StringIO()
    assert isinstance(chart.figure, Figure)
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
    # Two digits after the point are enough for any screen. The scale of letters, scale(0.015625), keeps its digits.
    return re.sub(r'(?<= d| x| y)="[^"]*"', lambda m: re.sub(r"(\.\d\d)\d+", r"\1", m.group()), svg)
