"""The chart of how far a law moves: its exponent with parts of the data, and with floors that fit about as well."""

import math
from typing import NamedTuple

from scaling_jax.fitting import FormFit, LossLaw
from scaling_jax.report.chart import LAW_COLOUR, MODEL_COLOURS, Chart, Into, new_figure
from scaling_jax.results import Analysis

_MOST_FLOORS = 4  # rows of the chart
_HALVES = {"losses up to": "the lower losses", "losses from": "the higher losses"}  # which differ between panels


class _Row(NamedTuple):
    label: str
    slope: float  # d log B_crit/d log L at the middle of the losses; a law's exponent
    interval: tuple[float, float] | None = None


def law_spread_chart(analysis: Analysis, into: Into = None) -> Chart | None:
    """Exponents of the law, and of the local law. A panel each; a row for each part of the data or floor; or None."""
    fit, forms = analysis.fit, analysis.forms
    of_whole = fit.table_of_law is not None  # forms are of the law from the start; else of the local one
    laws = {"from the start": (fit.law, forms if of_whole else ())}
    if fit.local is not None:
        laws["local"] = (fit.local.law, () if of_whole else forms)
    panels = {title: _rows(law, some) for title, (law, some) in laws.items() if law is not None}
    if not panels:
        return None
    labels = list(dict.fromkeys(row.label for rows in panels.values() for row in rows))
    figure, axes = new_figure(len(panels), width=6.4, height=1.4 + 0.28 * len(labels), into=into)
    chart = Chart("law_spread", "Exponent of the law with parts of the data left out, and with floors.", figure)
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        for row in rows:
            place = labels.index(row.label)
            colour = MODEL_COLOURS[0] if row.interval else LAW_COLOUR
            if row.interval:
                axis.axvspan(*row.interval, color=colour, alpha=0.1, linewidth=0)
            axis.plot([row.slope], [place], "o", color=colour, ms=5)
            chart.mark(axis, [row.slope], [place], [f"{row.label}: {row.slope:.2f}"])
        axis.set_title(title, loc="left")
        axis.set_xlabel("exponent of L")
        axis.set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    return chart


def _rows(law: LossLaw, forms: tuple[FormFit, ...]) -> list[_Row]:
    rows = [_Row("all data, 95 % interval", law.exponent, law.exponent_interval)]
    rows += [_Row(_HALVES.get(refit.kept.rsplit(" ", 1)[0], refit.kept), refit.exponent) for refit in law.systematic]
    middle = math.sqrt(math.prod(law.loss_range))
    for floors in (form.floors for form in forms if len(form.floors) > 1):
        step = max(1, (len(floors) - 1) / (_MOST_FLOORS - 1))
        chosen = dict.fromkeys(floors[round(k * step)] for k in range(1, _MOST_FLOORS) if round(k * step) < len(floors))
        rows += [_Row(f"floor L_inf = {floor:.2f}", exponent * middle / (middle - floor)) for floor, exponent in chosen]
    return rows
