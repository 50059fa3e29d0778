"""The result in a short table: critical batch size, noise scale and their law."""

import math
from pathlib import Path

import numpy as np
from rich.console import Group as Rows
from rich.table import Table
from rich.text import Text

from scaling_jax.analysis import Analysis
from scaling_jax.analysis.numbers import short as tokens
from scaling_jax.analysis.table_fit import law_lines


def summary(analysis: Analysis, figures: list[str], folder: Path) -> Rows:
    """B_crit and noise scale at three losses of each model, the law, what was flagged, where the figures are."""
    table = Table(title="Critical batch size, tokens", title_justify="left", title_style="bold")
    for column in ("model", "loss", "B_crit", "95 % interval", "noise scale", "its middle half"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for model in dict.fromkeys(p.model for p in analysis.fit.points):
        points = [p for p in analysis.fit.points if p.model == model and p.in_law]
        for point in _spread(points, 3):
            low, high = point.tradeoff.b_crit_interval
            middle, half = _noise_near(analysis, model, point.loss)
            table.add_row(
                model,
                f"{point.loss:.2f}",
                tokens(point.tradeoff.b_crit),
                f"{tokens(low)} – {tokens(high)}",
                middle,
                half,
            )
    return Rows(
        table, *(Text(line) for line in _sentences(analysis)), Text(f"figures in {folder}: " + ", ".join(figures))
    )


def _sentences(analysis: Analysis) -> list[str]:
    lines = law_lines(analysis.fit, analysis.joint, analysis.forms)
    if math.isfinite(analysis.noise_ratio):
        lines.append(f"noise scale / B_crit, median over that range: {analysis.noise_ratio:.2f}")
    return lines + [f"note: {note}" for note in analysis.notes]


def _spread(points: list, count: int) -> list:
    if len(points) <= count:
        return points
    return [points[round(k * (len(points) - 1) / (count - 1))] for k in range(count)]


def _noise_near(analysis: Analysis, model: str, loss: float) -> tuple[str, str]:
    near = [n for n in analysis.noise if n.model == model and abs(math.log(n.loss / loss)) < 0.03]
    values = [n.b_simple if n.resolved else math.inf for n in near]
    if not values:
        return "", ""
    low, middle, high = np.quantile(values, (0.25, 0.5, 0.75), method="nearest")
    return tokens(float(middle)), f"{tokens(float(low))} – {tokens(float(high))}"
