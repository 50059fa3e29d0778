"""The learning-rate search of a cell on its own: hill climbing until the best rate lies between two others.

With small batches, steps depend little on the rate, and neighbours at a factor of two are close enough. With large
batches, the best rate lies just below the rates at which training diverges. The grid then misses it, and the cell needs
too many steps, always at the same batch sizes: B_crit came out 20 % too small (experiments/quadratic_scan.py). So the
search can also try rates between the neighbours (`LearningRates.places`).
"""

import math
from collections.abc import Mapping

import numpy as np

from scaling_jax.scanning.experiment import Cell, Experiment, LearningRates
from scaling_jax.scanning.tried import FIRST_STEP, Tried, contender, index_of, too_late
from scaling_jax.training import Deadline, Run


def first(experiment: Experiment, cell: Cell) -> dict[int, Run]:
    """The first runs, {rate index: run}: `LearningRates.together` rates around the rule."""
    rates = experiment.subject(cell.model).learning_rates
    count = min(rates.together, rates.most)
    around = [0] + [sign * rates.places * k for k in range(1, count) for sign in (1, -1)]
    return {index: experiment.run(cell, index) for index in around[:count]}


def wanted(rates: LearningRates, tried: Mapping[int, Tried], best: Tried, target: int) -> list[int]:
    """Rate indices to try next for a target: beyond the tried rates, or between the best rate and a neighbour."""
    here, places = index_of(tried, best), rates.places
    beyond = []
    if max(tried) == here:
        beyond.append(here - here % places + places)
    if min(tried) == here:
        beyond.append(-(-here // places) * places - places)
    if best.result.status == "diverged":
        beyond.reverse()
    if beyond or places == 1 or not math.isfinite(best.steps_to_target[target]):
        return beyond
    known = {index: x for index, t in tried.items() if (x := _log_steps(t, best, target)) is not None}
    between = _next_between(here, known, set(tried), math.log(rates.factor) / places, rates.rate_tolerance)
    return [] if between is None else [between]


def challenger(experiment: Experiment, cell: Cell, index: int, best: Tried, target: int) -> Run:
    """The run at a rate index, which ends once it can't be the best.

    In the demo's searches, a run that was the best in the end had made up at most 0.15 of the way that was left.
    """
    late: tuple[Deadline, ...] = ()
    rates = experiment.subject(cell.model).learning_rates
    if rates.catch_up is not None and math.isfinite(steps := best.steps_to_target[target]):
        late = too_late(best, steps, rates.catch_up, rates.rate_tolerance, FIRST_STEP, rates.rate_tolerance)
    return contender(experiment, cell, index, best, target, late)


def _log_steps(t: Tried, best: Tried, target: int) -> float | None:
    """log(steps to a target); if the run ended above it, an estimate from its delay at the last loss that both reached.

    None for a run that diverged, or whose rate is higher than the best: it might never reach the target.
    """
    least = math.log(best.steps_to_target[target])
    if math.isfinite(t.steps_to_target[target]):
        return math.log(t.steps_to_target[target])
    behind = np.log(t.steps_to_target[:target] / best.steps_to_target[:target])
    behind = behind[np.isfinite(behind)]
    if t.run.learning_rate > best.run.learning_rate or t.result.status == "diverged" or not len(behind):
        return None
    return max(least + max(float(behind[-1]), 0.0), math.log(t.result.steps))


def _next_between(
    best: int, log_steps: Mapping[int, float], tried: set[int], log_place: float, tolerance: float
) -> int | None:
    """The next grid place to try between the best place and its tried neighbours; None if none promises to be better.

    Args:
      best: the place with the fewest steps.
      log_steps: {place: natural log of steps to the target}, where known.
      tried: all tried places; at least one on each side of the best.
      log_place: natural log of the ratio of rates at neighbouring places.
      tolerance: in log steps; a place that promises less is none.
    """
    below, above = max(i for i in tried if i < best), min(i for i in tried if i > best)
    if below in log_steps and above in log_steps:
        return vertex(log_steps, tried, below, best, above, tolerance)
    failed = above if above not in log_steps else below
    if abs(failed - best) > 1:
        return (best + failed) // 2
    if below in log_steps and best - below > 1:
        # Steps can't fall faster than the rate rises, so this is the most that a rate below the best can gain.
        hope = log_steps[best] - log_steps[below] + (best - below) * log_place
        if hope > 2 * tolerance:
            return (best + below) // 2
    return None


def vertex(
    log_steps: Mapping[int, float], tried: set[int], below: int, best: int, above: int, tolerance: float
) -> int | None:
    """The place nearest to the minimum of the parabola through three; None if tried, or if it gains too little."""
    rise_above = (log_steps[above] - log_steps[best]) / (above - best)
    rise_below = (log_steps[below] - log_steps[best]) / (best - below)
    curvature = 2 * (rise_above + rise_below) / (above - below)
    slope = (rise_above * (best - below) - rise_below * (above - best)) / (above - below)
    if curvature <= 0 or slope**2 / (2 * curvature) < tolerance:
        return None
    place = round(best - slope / curvature)
    return None if place in tried else place
