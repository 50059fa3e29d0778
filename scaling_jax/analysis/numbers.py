"""Numbers as tables and sentences show them."""

import math


def short(value: float) -> str:
    """Three significant digits, with k, M and G; NaN is what measurements couldn't resolve."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "unresolved"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Two digits or more, in the largest unit that fits."""
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"
