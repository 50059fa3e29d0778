"""Where between the learning rates tried so far a better one may lie.

A factor of two between rates costs little where steps are flat in the rate, as they are for small batches. For large
ones the best rate lies just below where training diverges; the grid misses it by up to that factor, always to the side
of more steps, and always at the same batches: B_crit came out 20 % too small (experiments/quadratic_scan.py).
"""

from collections.abc import Mapping

GAIN = 0.02  # in steps; a parabola that promises less isn't followed


def next_between(best: int, log_steps: Mapping[int, float], tried: set[int], log_place: float) -> int | None:
    """The grid place to try next to the best one, whose neighbours were tried; None if no better one is to be expected.

    Args:
      best: the place of the fewest steps.
      log_steps: by place, natural logs; only of those whose steps to the target are known.
      tried: all places, with one on either side of the best.
      log_place: natural log of the ratio of rates one place apart.
    """
    below, above = max(i for i in tried if i < best), min(i for i in tried if i > best)
    if below in log_steps and above in log_steps:
        return _vertex(log_steps, tried, below, best, above)
    failed = above if above not in log_steps else below
    if abs(failed - best) > 1:
        return (best + failed) // 2
    if below in log_steps and best - below > 1:
        # Steps can't fall faster than the rate rises: this is what could still lie below the best.
        hope = log_steps[best] - log_steps[below] + (best - below) * log_place
        if hope > 2 * GAIN:
            return (best + below) // 2
    return None


def _vertex(log_steps, tried, below, best, above) -> int | None:
    """The place nearest to the minimum of the parabola through three, if it was not tried and promises enough."""
    rise_above = (log_steps[above] - log_steps[best]) / (above - best)
    rise_below = (log_steps[below] - log_steps[best]) / (best - below)
    curvature = 2 * (rise_above + rise_below) / (above - below)
    slope = (rise_above * (best - below) - rise_below * (above - best)) / (above - below)
    if curvature <= 0 or slope**2 / (2 * curvature) < GAIN:
        return None
    place = round(best - slope / curvature)
    return None if place in tried else place
