"""Steps that a run needs to reach a loss, from a monotone fit to its evaluations.

The fit is isotonic regression with pooled adjacent violators (Barlow et al. 1972).
"""

import dataclasses

import numpy as np
from scipy import optimize


@dataclasses.dataclass(frozen=True, eq=False)
class Crossings:
    """Steps at which a run reached each target loss, `[targets]` each; NaN if there is no such step."""

    targets: np.ndarray  # nats per token
    steps: np.ndarray  # where the monotone fit reaches the target; use these
    first: np.ndarray  # where the raw evaluations first fall to the target
    last: np.ndarray  # where the raw evaluations last fall to the target and then stay below it
    not_reached: np.ndarray  # True: the fit ends above the target; steps > last_step (right-censored)
    already_below: np.ndarray  # True: the fit starts below the target; steps < first_step (left-censored)
    first_step: float
    last_step: float


def steps_to_loss(steps, losses, targets) -> Crossings:
    """Steps to each target loss, from a monotone decreasing fit, with linear interpolation in log steps.

    Never extrapolates. Steps are NaN if the run didn't reach the target (`not_reached`), or had passed it before the
    first evaluation (`already_below`).

    Args:
      steps: `[n]`, optimizer steps of the evaluations, positive and increasing.
      losses: `[n]`, evaluation losses in nats per token.
      targets: `[targets]`, in any order.

    Raises:
      ValueError: for unequal lengths, steps that aren't positive and increasing, or values that aren't finite.
    """
    steps, losses, targets = (np.atleast_1d(np.asarray(x, float)) for x in (steps, losses, targets))
    _check(steps, losses, targets)
    log_steps = np.log(steps)
    fit = optimize.isotonic_regression(losses, increasing=False)
    block_ends = fit.blocks
    sizes = np.diff(block_ends)
    levels = fit.x[block_ends[:-1]]
    # A pooled block has one loss for a range of steps. Take the middle of the range as the step with this loss.
    middles = np.add.reduceat(log_steps, block_ends[:-1]) / sizes

    not_reached = targets < levels[-1]
    already_below = targets > levels[0]
    inside = ~(not_reached | already_below)
    crossing = np.exp(np.interp(-targets, -levels, middles))
    raw = [_raw_crossings(log_steps, losses, target) for target in targets]
    return Crossings(
        targets=targets,
        steps=np.where(inside, crossing, np.nan),
        first=np.array([first for first, _ in raw]),
        last=np.array([last for _, last in raw]),
        not_reached=not_reached,
        already_below=already_below,
        first_step=float(steps[0]),
        last_step=float(steps[-1]),
    )


def _raw_crossings(log_steps, losses, target):
    """Steps of the first and the last fall to the target; NaN if the curve starts below, or doesn't end below."""
    above = losses > target
    down = np.flatnonzero(above[:-1] & ~above[1:])

    def between(i):
        fraction = (losses[i] - target) / (losses[i] - losses[i + 1])
        return float(np.exp(log_steps[i] + fraction * (log_steps[i + 1] - log_steps[i])))

    if losses[0] == target:
        first = float(np.exp(log_steps[0]))
    else:
        first = between(down[0]) if above[0] and down.size else np.nan
    # No fall is found if the curve is below from the start, or starts exactly at the target: then take `first`.
    last = between(down[-1]) if down.size else first
    return first, np.nan if above[-1] else last


def _check(steps, losses, targets):
    if steps.ndim != 1 or steps.shape != losses.shape or steps.size == 0:
        raise ValueError(
            f"steps {steps.shape} and losses {losses.shape} must be two lists of equal length, with at least 1 entry"
        )
    for name, values in (("steps", steps), ("losses", losses), ("targets", targets)):
        bad = np.flatnonzero(~np.isfinite(values))
        if bad.size:
            raise ValueError(f"{name}[{bad[0]}] is {values[bad[0]]}; must be finite")
    bad = np.flatnonzero(np.diff(steps, prepend=0.0) <= 0)
    if bad.size:
        raise ValueError(f"steps[{bad[0]}] is {steps[bad[0]]:g}; steps must be positive and increasing")
