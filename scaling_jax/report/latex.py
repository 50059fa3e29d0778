"""Fits as a LaTeX table, for papers."""

import math
from collections.abc import Sequence

from scaling_jax.fitting import CriticalBatch, ScanFit

_SPECIAL = {c: f"\\{c}" for c in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
}
_DIGITS = 3


def latex_table(fit: ScanFit) -> str:
    """A `tabular` with rules of booktabs: B_crit and the local B_crit with intervals at each loss, a line for the law.

    Where a point can't be shown, the cells are empty, as in the other tables.
    """
    rows, interval = [_row(point) for point in fit.points], rf"{100 * fit.confidence:.0f}\,\% interval"
    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{tabular}{lrrrrr}",
        r"\toprule",
        rf"model & loss & $B_\mathrm{{crit}}$ (tokens) & {interval} & local & {interval} \\",
        r"\midrule",
        *(" & ".join(row) + r" \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
    ]
    if fit.law is not None:
        low, high = fit.law.exponent_interval
        lines.append(
            rf"% law: $B_\mathrm{{crit}} = {_power(fit.law.b_star)} \cdot L^{{{fit.law.exponent:.2f}}}$, exponent in "
            rf"$[{low:.2f}, {high:.2f}]$"
        )
    return "\n".join(lines) + "\n"


def escaped(text: str) -> str:
    """The text as LaTeX prints it."""
    return "".join(_SPECIAL.get(character, character) for character in text)


def _row(point: CriticalBatch) -> tuple[str, ...]:
    whole = _with_interval(point.b_crit, point.b_crit_interval) if point.shown else ("", "")
    return (
        escaped(point.model),
        f"{point.loss:.4g}",
        *whole,
        *_with_interval(point.local_b_crit, point.local_b_crit_interval),
    )


def _with_interval(value: float, interval: Sequence[float]) -> tuple[str, str]:
    if not math.isfinite(value):
        return "", ""
    return f"${_number(value)}$", "$[{}, {}]$".format(*map(_number, interval))


def _number(value: float) -> str:
    """Three digits, with thin spaces between thousands."""
    if math.isinf(value):
        return r"\infty"
    if math.isnan(value):
        return "-"
    whole = round(value, _DIGITS - 1 - math.floor(math.log10(value))) if value > 0 else 0.0
    return f"{whole:,.0f}".replace(",", r"\,") if whole >= 100 else f"{whole:.3g}"


def _power(value: float) -> str:
    mantissa, exponent = f"{value:.2e}".split("e")
    return rf"{mantissa} \times 10^{{{int(exponent)}}}"
