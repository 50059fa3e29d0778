"""Compared scans for the terminal."""

import math
from pathlib import Path

from rich.console import Group as Rows

from scaling_jax.console.grid import Grid
from scaling_jax.console.tables import Line
from scaling_jax.report.words import short
from scaling_jax.results.compare import Compared, Pair


def comparison(compared: Compared, figure: Path) -> Rows:
    """For each pair, what is saved at each batch size, and the trade-offs at three losses."""
    unit, of_loss = ("bytes", "bits per byte") if compared.in_bytes else ("tokens", "nats per token")
    parts: list = []
    for pair in compared.pairs:
        parts += [_savings(pair, unit), _tradeoffs(pair, unit)]
        low, high = pair.overall_interval
        model = pair.models[0] if pair.models[0] == pair.models[1] else " and ".join(pair.models)
        parts.append(
            Line(
                f"{pair.names[1]} over {pair.names[0]}, {model}: {_percent(pair.overall)} of the {unit} saved "
                f"[{_percent(low)}, {_percent(high)}] in the mean over {len(pair.batches)} batch sizes, losses "
                f"{pair.losses[0]:.4g} to {pair.losses[-1]:.4g} {of_loss}"
            )
        )
    return Rows(*parts, *map(Line, [*(f"note: {note}" for note in compared.notes), f"figure: {figure}"]))


def _savings(pair: Pair, unit: str) -> Grid:
    a, b = pair.names
    rows = [
        (
            f"{row.batch:,.0f}",
            *(_count(value) for value in (*row.steps, *row.tokens)),
            _percent(row.saving),
            "–" if math.isnan(row.saving) else f"{_percent(row.interval[0])} to {_percent(row.interval[1])}",
            _percent(row.mean_saving),
        )
        for row in pair.batches
    ]
    columns = ["batch", f"steps\n{a}", f"steps\n{b}", f"{unit}\n{a}", f"{unit}\n{b}", "saved", "95 %\ninterval", "mean"]
    title = f"{pair.models[0]}, to loss {pair.losses[-1]:.4g}; saved: by {b}; mean: over all losses"
    return Grid(columns, rows, title)


def _tradeoffs(pair: Pair, unit: str) -> Grid:
    rows = [
        (
            f"{row.loss:.4g}",
            row.name,
            _count(row.b_crit),
            "–" if math.isnan(row.b_crit) else f"{short(row.interval[0])}–{short(row.interval[1])}",
            _count(row.s_min),
            _count(row.e_min),
        )
        for row in pair.at_losses
    ]
    columns = ["loss", "of", "B_crit", "95 %\ninterval", "S_min", "E_min"]
    return Grid(columns, rows, f"B_crit and E_min in {unit}, S_min in steps", ("of",), heads=2)


def _count(value: float) -> str:
    return "–" if math.isnan(value) else short(value)


def _percent(value: float) -> str:
    if math.isnan(value):
        return "–"
    return f"{100 * value:.0f} %" if math.isfinite(value) else "unknown"
