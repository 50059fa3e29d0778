"""How every figure looks: colour-blind safe colours, units on axes, saved as PNG and SVG."""

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator

# Okabe & Ito's palette, without the green that noise-scale dots use
MODEL_COLOURS = ("#0072B2", "#D55E00", "#CC79A7", "#E69F00", "#56B4E9")
NOISE_COLOUR = "#009E73"
LAW_COLOUR = "0.35"

_PARAMETERS: Any = {
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


def new_figure(columns: int = 1, *, width: float, height: float, **kwargs):
    with plt.rc_context(_PARAMETERS):
        return plt.subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained", **kwargs)


def save(figure: Figure, folder: Path, name: str) -> Path:
    """Writes `name`.png and .svg; returns the PNG's path."""
    folder.mkdir(parents=True, exist_ok=True)
    with plt.rc_context(_PARAMETERS):
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
        figure.savefig(folder / f"{name}.png", dpi=160, metadata={"Software": None})
    plt.close(figure)
    return folder / f"{name}.png"


def loss_axis(axis, low: float, high: float) -> None:
    """Logarithmic, falling from left to right, with plain numbers."""
    axis.set_xscale("log")
    axis.set_xlim(high * 1.02, low / 1.02)
    step = 0.1 if high - low < 1 else 0.2 if high - low < 2.5 else 0.5
    first = int(low / step + 1 - 1e-9) * step
    ticks = [first + k * step for k in range(int((high - first) / step + 1e-9) + 1)]
    axis.xaxis.set_major_locator(FixedLocator(ticks))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.1f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
