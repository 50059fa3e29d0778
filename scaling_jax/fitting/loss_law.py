"""The power law by which the critical batch size grows as the loss falls.

Kaplan et al. 2020 (arXiv 2001.08361), eq. 1.4: B_crit(L) = B_*/L^(1/alpha_B).
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy import special

from scaling_jax.fitting.robust import huber_limit, huber_weights

NUM_PARAMETERS = 2


@dataclasses.dataclass(frozen=True)
class LossLaw:
    """B_crit(L) = B_*·L^exponent with exponent = -1/alpha_B; L in nats per token, B_crit in tokens."""

    b_star: float
    exponent: float
    exponent_interval: tuple[float, float]
    b_star_interval: tuple[float, float]
    loss_range: tuple[float, float]  # lowest and highest loss that entered: the law is untested elsewhere
    confidence: float

    @property
    def alpha_b(self) -> float:
        """Kaplan's alpha_B, -1/exponent."""
        return float(-np.divide(1.0, self.exponent))

    def __call__(self, loss):
        """Critical batch size in tokens at a loss in nats per token."""
        return self.b_star * np.asarray(loss, float) ** self.exponent


class Lines(NamedTuple):
    """Robust straight lines log B_crit = level + slope·(log L - centre), `[...]` each."""

    centre: np.ndarray
    level: np.ndarray
    slope: np.ndarray
    level_error: np.ndarray  # standard errors, as if points were independent
    slope_error: np.ndarray

    @property
    def log_b_star(self) -> np.ndarray:
        return self.level - self.slope * self.centre


def fit_loss_law(loss, b_crit, weights=None, *, confidence: float = 0.95) -> LossLaw:
    """Fits B_crit(L) = B_*/L^(1/alpha_B) to points, robustly in log-log.

    Args:
      loss: `[n]`, nats per token.
      b_crit: `[n]`, tokens.
      weights: `[n]`, inverse variances of log b_crit up to a factor; None takes all points as equally sure.
      confidence: of the intervals (Student t), which take the points as independent. Points of one scan share its
        runs and aren't: `fit_scan` gives the interval that knows.

    Raises:
      ValueError: for values that aren't positive and finite, unequal lengths, or fewer than three distinct losses.
    """
    loss, b_crit = np.asarray(loss, float), np.asarray(b_crit, float)
    weights = np.ones(loss.shape) if weights is None else np.asarray(weights, float)
    _check(loss, b_crit, weights)
    lines = fit_lines(np.log(loss), np.log(b_crit), weights, np.ones(loss.shape, bool))
    t = special.stdtrit(loss.size - NUM_PARAMETERS, 0.5 + confidence / 2)
    log_b_star_error = np.hypot(lines.level_error, lines.slope_error * lines.centre)
    return LossLaw(
        b_star=float(np.exp(lines.log_b_star)),
        exponent=float(lines.slope),
        exponent_interval=(float(lines.slope - t * lines.slope_error), float(lines.slope + t * lines.slope_error)),
        b_star_interval=(
            float(np.exp(lines.log_b_star - t * log_b_star_error)),
            float(np.exp(lines.log_b_star + t * log_b_star_error)),
        ),
        loss_range=(float(loss.min()), float(loss.max())),
        confidence=confidence,
    )


def fit_lines(x, y, weights, mask, num_iterations=15) -> Lines:
    """Weighted Huber lines through `[..., n]` points, a fixed number of reweightings; `mask` False: no point."""
    base = weights * mask
    base = base / np.max(base, axis=-1, keepdims=True)
    limit, robust = np.array(np.inf), np.ones_like(base)
    for _ in range(num_iterations):
        total = base * robust
        centre, level = _mean(x, total), _mean(y, total)
        spread = (total * (x - centre) ** 2).sum(-1, keepdims=True)
        slope = (total * (x - centre) * (y - level)).sum(-1, keepdims=True) / spread
        standardised = np.sqrt(base) * (y - level - slope * (x - centre))
        limit = huber_limit(standardised, mask, NUM_PARAMETERS)
        robust = huber_weights(standardised, limit)

    freedom = np.maximum(mask.sum(-1, keepdims=True) - NUM_PARAMETERS, 1)
    inside = _mean(1.0 * (np.abs(standardised) <= limit), 1.0 * mask)
    pull = np.clip(standardised, -limit, limit) * mask
    variance = (pull**2).sum(-1, keepdims=True) / freedom / inside**2
    lines = (
        centre,
        level,
        slope,
        np.sqrt(variance / base.sum(-1, keepdims=True)),
        np.sqrt(variance / (base * (x - centre) ** 2).sum(-1, keepdims=True)),
    )
    return Lines(*(values[..., 0] for values in lines))


def _mean(values, weights):
    return (weights * values).sum(-1, keepdims=True) / weights.sum(-1, keepdims=True)


def _check(loss, b_crit, weights):
    if loss.ndim != 1 or not loss.shape == b_crit.shape == weights.shape:
        raise ValueError(
            f"loss {loss.shape}, b_crit {b_crit.shape} and weights {weights.shape} should be lists of one length"
        )
    for name, values in (("loss", loss), ("b_crit", b_crit), ("weights", weights)):
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if bad.size:
            raise ValueError(f"{name}[{bad[0]}] is {values[bad[0]]:g}; should be positive and finite")
    if np.unique(loss).size < 3:
        raise ValueError(f"{np.unique(loss).size} distinct losses can't show a power law: give at least 3")
