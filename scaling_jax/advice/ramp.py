"""Batch ramps that double the batch as the local B_crit grows, and the cost of a ramp in steps and tokens.

Merrill et al. 2025 (arXiv 2505.23971): start with a small batch. When B_crit exceeds twice the batch, double the batch
and multiply the learning rate by √2. What counts for the next step is the local B_crit, dE_min/dS_min, which grows to
about twice the cumulative one. McCandlish et al. 2018 (arXiv 1812.06162), appendix D: the way from one loss to a lower
one takes as many steps at a batch B as it takes a run with this batch, whatever came before. So a schedule takes
dS(B) = S(B, L - dL) - S(B, L) steps for each fall of the loss, for trade-offs of any shape.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import optimize

from scaling_jax.advice.goal import goal
from scaling_jax.advice.measured import exponent, models_of, points_of
from scaling_jax.fitting import ScanFit
from scaling_jax.io import UserError
from scaling_jax.training.stages import Stage

GRID = 2_000  # losses between the highest measured one and the target


class Descent(NamedTuple):
    """The way down through falling losses."""

    losses: np.ndarray  # `[losses]`, nats per token, falling
    steps_at: Callable[[float], np.ndarray]  # batch in tokens -> `[losses]`, steps from the first one; never decrease
    b_crit: np.ndarray  # `[losses]`, tokens; what a ramp follows; never decreases
    follows: str = "law"  # where `b_crit` comes from: "local", "law", or without a law "fit" for the cumulative fits

    def until(self, count: int) -> "Descent":
        """The way through the first `count` losses."""
        return Descent(
            self.losses[:count], lambda batch: self.steps_at(batch)[:count], self.b_crit[:count], self.follows
        )


class Cost(NamedTuple):
    """Steps and tokens that a schedule needs to the last loss."""

    steps: float
    tokens: float


def descent(fit: ScanFit, target_loss: float, model: str | None = None) -> Descent:
    """The way of a model from its highest measured loss to the target.

    B_crit is the local one; beyond its windows, that of the nearest window. Without windows it is the law's.

    Raises:
      UserError: if the target is outside the measured range, or the model has no usable trade-off.
    """
    model = model or next(iter(models_of(fit)), "")
    points = points_of(fit, model)[::-1]
    losses = np.geomspace(points[-1].loss, goal(fit, target_loss, model).loss, GRID)
    at_points = np.array([(math.log(p.loss), math.log(p.s_min), exponent(p), math.log(p.b_crit)) for p in points]).T
    log_losses, log_s_min, a, log_b_crit = at_points
    # As in `Goal`: linear in log L are a and the logs of S_min and of the overhead of small batches.
    log_s_min, a, log_overhead = (
        np.interp(np.log(losses), log_losses, values) for values in (log_s_min, a, log_s_min + a * log_b_crit)
    )

    @functools.cache
    def steps_at(batch_tokens: float) -> np.ndarray:
        steps = np.exp(log_s_min) + np.exp(log_overhead - a * math.log(batch_tokens))
        # Steps can't fall as the loss falls, though neighbouring fits may show this. The last ones stay as fitted.
        return np.maximum.accumulate(np.minimum(steps, steps[-1]))

    follows, b_crit = _to_follow(fit, model, losses)
    return Descent(losses, steps_at, np.maximum.accumulate(b_crit), follows)


def ramp(
    fit: ScanFit,
    target_loss: float,
    *,
    start_batch_tokens: int,
    max_batch_tokens: int | None = None,
    model: str | None = None,
    fraction: float = 1.0,
) -> tuple[Stage, ...]:
    """A ramp that keeps the batch between half of `fraction`·B_crit(L) and all of it, with the local B_crit.

    Args:
      fit: of a scan.
      target_loss: nats per token, inside the measured range.
      start_batch_tokens: batch of the first stage; later batches are this times a power of two.
      max_batch_tokens: largest batch; None sets no limit.
      model: its steps give the tokens of the stages; None takes the model with the lowest loss.
      fraction: below 1, the run needs more steps and fewer tokens.

    Returns:
      The stages. The first starts at 0 tokens; each later one after a whole number of steps of the stage before. Before
      the highest measured loss the batch doesn't grow, because nothing was measured there.

    Raises:
      UserError: for a batch or fraction that isn't positive, or a target outside the measured range.
    """
    if start_batch_tokens < 1 or (max_batch_tokens or math.inf) < start_batch_tokens or not fraction > 0:
        raise UserError(
            f"a ramp from {start_batch_tokens} to {max_batch_tokens} tokens at {fraction:g}·B_crit: the batches must "
            "be positive, the second not below the first, and the fraction positive"
        )
    way = descent(fit, target_loss, model)
    largest = max_batch_tokens or math.inf
    stages = [Stage(0, start_batch_tokens, 1.0)]
    for k in range(GRID - 1):
        batch = stages[-1].batch_tokens
        while 2 * batch <= min(largest, fraction * way.b_crit[k]):
            batch *= 2
        if batch > stages[-1].batch_tokens:
            tokens = cost(way.until(k + 1), tuple(stages)).tokens
            before = stages[-1]
            whole = before.tokens + math.ceil((tokens - before.tokens) / before.batch_tokens) * before.batch_tokens
            stages.append(Stage(whole, batch, math.sqrt(batch / start_batch_tokens)))
    return tuple(stages)


def cost(way: Descent, stages: tuple[Stage, ...]) -> Cost:
    """Steps and tokens to the last loss of `way` with a schedule of batches. One stage is a constant batch."""
    falls = [np.diff(way.steps_at(stage.batch_tokens), prepend=0.0).tolist() for stage in stages]
    starts = [stage.tokens for stage in stages] + [math.inf]
    steps = tokens = 0.0
    k = 0
    for i in range(len(way.losses)):
        part = 1.0  # of this fall of the loss, still to come
        while True:
            batch, more = stages[k].batch_tokens, part * falls[k][i]
            left = starts[k + 1] - tokens  # until the next stage
            if batch * more <= left:
                steps, tokens = steps + more, tokens + batch * more
                break
            steps, tokens = steps + left / batch, tokens + left
            part *= 1 - left / (batch * more)
            k += 1
    return Cost(steps, tokens)


def _to_follow(fit: ScanFit, model: str, losses: np.ndarray) -> tuple[str, np.ndarray]:
    """Where the B_crit that a ramp follows comes from, and its values at losses."""
    windows = [] if fit.local is None else [p for p in fit.local.points if p.model == model and p.shown]
    if windows:
        follows, known = "local", windows
        # As the local B_crit rises along a run, its errors are smoothed by what rises and lies nearest to it.
        widths = [math.log(high / low) if low > 0 else math.inf for low, high in (p.b_crit_interval for p in windows)]
        weights = [1 / max(min(width, 1e3), 1e-2) ** 2 for width in widths]
        log_b_crit = optimize.isotonic_regression([math.log(p.b_crit) for p in windows], weights=weights).x
    elif fit.law is not None:
        return "law", fit.law(losses)
    else:
        follows, known = "fit", points_of(fit, model)
        log_b_crit = np.log([point.b_crit for point in known])
    log_losses = np.log([point.loss for point in known])
    return follows, np.exp(np.interp(np.log(losses), log_losses[::-1], log_b_crit[::-1]))
