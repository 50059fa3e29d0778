"""Advice for a number of tokens, for the terminal."""

import math

from rich.console import Group as Rows

from scaling_jax.advice.horizon import FAR, HorizonAdvice
from scaling_jax.console.grid import Grid
from scaling_jax.console.tables import Line
from scaling_jax.report.words import duration, short

_COSTS = {"B_opt": "loss above\nthe best", "B_crit": "tokens\nlost"}


def horizon_table(advice: HorizonAdvice) -> Rows:
    """A row for each batch size, and what the batch rests on."""
    columns = ["batch", "steps", _COSTS[advice.quantity], "lr", "weight\ndecay", "wall\ntime"]
    rows = [
        [
            f"{row.batch_tokens:,.0f}",
            short(row.steps),
            _cost(advice, row.cost),
            "" if math.isnan(row.learning_rate) else f"{row.learning_rate:.2g}",
            "" if math.isnan(row.weight_decay) else f"{row.weight_decay:.2g}",
            "" if math.isnan(row.seconds) else duration(row.seconds),
        ]
        for row in advice.rows
    ]
    kept = [k for k in range(len(columns)) if any(row[k] for row in rows)]
    title = f"{advice.model or 'all models'}, {short(advice.tokens)} tokens"
    table = Grid([columns[k] for k in kept], [[row[k] for k in kept] for row in rows], title)
    return Rows(table, *map(Line, _lines(advice)))


def _lines(advice: HorizonAdvice) -> list[str]:
    low, high = advice.interval
    first, last = advice.measured
    means = {
        "B_opt": "the batch of the least loss after these tokens",
        "B_crit": "at this batch a run needs twice the fewest tokens to its loss",
    }
    lines = [
        f"{advice.quantity}: {short(advice.batch)} [{short(low)}, {short(high)}] tokens, {means[advice.quantity]}",
        f"by {advice.law}, measured for {short(first)}–{short(last)} tokens",
    ]
    if advice.outside > 1:
        sure = ": a guess, whatever the interval says" if advice.outside > FAR else ""
        lines.append(
            f"EXTRAPOLATED: {short(advice.tokens)} tokens are {short(advice.outside)} times outside that{sure}"
        )
    if advice.published:
        said = ", ".join(f"{p.key} {short(p.batch_tokens)}{'*' * p.outside}" for p in advice.published)
        star = " (* outside its range, or that isn't known)" if any(p.outside for p in advice.published) else ""
        lines.append(f"published laws of {advice.quantity}, on other text: {said} tokens{star}")
    if advice.hardware is not None:
        lines.append(f"wall time on {advice.hardware.devices} devices, without communication")
    return lines + [f"note: {note}" for note in advice.notes]


def _cost(advice: HorizonAdvice, cost: float) -> str:
    if math.isnan(cost):
        return "–"
    return f"{cost:.4f}" if advice.quantity == "B_opt" else f"{cost:.0%}"
