"""A fitted table of steps to loss, printed."""

from pathlib import Path

from rich.console import Group as Rows
from rich.table import Table
from rich.text import Text

from scaling_jax.analysis.numbers import short
from scaling_jax.analysis.table_fit import TableFit, law_lines


def print_fit(found: TableFit, written: Path) -> Rows:
    """Every trade-off, the laws through them, what was left out."""
    table = Table(title="S_min in steps; E_min, B_crit, CBS20 in tokens", title_justify="left", title_style="bold")
    for column in ("model", "loss", "S_min", "E_min", "B_crit", "95 % interval", "CBS20", "flags"):
        table.add_column(column, justify="left" if column in ("model", "flags") else "right", no_wrap=column != "model")
    for point in found.fit.points:
        t = point.tradeoff
        s_min, e_min, b_crit, cbs20 = (
            "–" if t.one_sided else short(value) for value in (t.s_min, t.e_min, t.b_crit, t.cbs20)
        )
        flags = ["one-sided"] * t.one_sided + [f"{point.not_reached} missed"] * bool(point.not_reached)
        interval = "–".join(short(end) for end in t.b_crit_interval)
        table.add_row(point.model, f"{point.loss:.4g}", s_min, e_min, b_crit, interval, cbs20, ", ".join(flags))
    lines = [
        *law_lines(found.fit, found.joint, found.forms),
        *(f"note: {note}" for note in found.notes),
        f"fit: {written}",
    ]
    return Rows(table, *(Text(line) for line in lines))
