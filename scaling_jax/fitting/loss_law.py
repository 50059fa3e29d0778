"""Power laws through points of B_crit: in the loss, in the training data, in the model size.

Kaplan et al. 2020 (arXiv 2001.08361), eq. 1.4: B_crit(L) = B_*/L^(1/alpha_B). They expect B_crit to diverge at the
irreducible loss L_inf (section 5.1); the law is then B_*/(L - L_inf)^(1/alpha).
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from scipy import special

from scaling_jax.fitting.hyperbolas import huber_limit, huber_weights, weighted_mean

NUM_PARAMETERS = 2  # of a line
NUM_FLOORS = 1_000  # values of L_inf to try


class Refit(NamedTuple):
    """The law with a part of the data."""

    kept: str  # in words
    exponent: float
    b_crit: float  # tokens, at the middle of the whole law's losses
    num_losses: int


@dataclasses.dataclass(frozen=True)
class LossLaw:
    """B_crit(L) = B_*·(L - floor)^exponent, exponent = -1/alpha_B. L and floor in nats per token, B_crit in tokens."""

    b_star: float
    exponent: float
    exponent_interval: tuple[float, float]
    b_star_interval: tuple[float, float]
    loss_range: tuple[float, float]  # lowest and highest loss in the fit; the law is untested elsewhere
    confidence: float
    floor: float = 0.0  # L_inf
    systematic: tuple[Refit, ...] = ()  # the law with parts of the data; of a scan's law
    shapes: tuple[float, float] | None = None  # a at the highest and the lowest loss; None: a is 1, hyperbolas

    @property
    def systematic_spread(self) -> tuple[float, float] | None:
        """The lowest and the highest exponent of `systematic`; None if it is empty."""
        exponents = [refit.exponent for refit in self.systematic]
        return (min(exponents), max(exponents)) if exponents else None

    @property
    def alpha_b(self) -> float:
        """Kaplan's alpha_B, -1/exponent."""
        return float(-np.divide(1.0, self.exponent))

    def __call__(self, loss):
        """Critical batch size in tokens at a loss in nats per token."""
        return self.b_star * (np.asarray(loss, float) - self.floor) ** self.exponent


def fit_loss_law(loss, b_crit, weights=None, *, floor: float | None = 0.0, confidence: float = 0.95) -> LossLaw:
    """Fits B_crit(L) = B_*/(L - floor)^(1/alpha) to points, robustly and in logs.

    Args:
      loss: `[n]`, nats per token.
      b_crit: `[n]`, tokens.
      weights: `[n]`, inverse variances of log b_crit up to a factor; None gives all points the same weight.
      floor: L_inf in nats per token; None finds the best floor between 0 and the lowest loss.
      confidence: of the intervals (Student t). They take the points as independent. The points of one scan are not,
        because they share runs: use the interval of `fit_scan` for them. If `floor` is None, the intervals include
        every floor that the points don't reject.

    Raises:
      ValueError: for values that aren't positive and finite, unequal lengths, a floor that isn't below every loss, or
        fewer than three distinct losses (four if `floor` is None).
    """
    return _fit_law("loss", loss, b_crit, weights, floor, confidence)


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """B_crit = constant·variable^exponent in tokens."""

    variable: str  # with its unit
    constant: float
    exponent: float
    exponent_interval: tuple[float, float]
    valid_range: tuple[float, float]  # range of the variable in the fit; the law is untested elsewhere
    confidence: float

    def __call__(self, variable):
        """Critical batch size in tokens."""
        return self.constant * np.asarray(variable, float) ** self.exponent


def fit_data_law(data_tokens, b_crit, weights=None, *, confidence: float = 0.95) -> PowerLaw:
    """Fits B_crit = constant·D_min^beta. D_min is the minimum number of tokens to each loss (`Tradeoff.e_min`).

    The other arguments, the errors and the intervals are as in `fit_loss_law`.
    """
    return _fit_power("D_min in tokens", data_tokens, b_crit, weights, confidence)


def fit_size_law(num_params, b_crit, weights=None, *, confidence: float = 0.95) -> PowerLaw:
    """Fits B_crit = constant·N^gamma, N the number of non-embedding parameters.

    The other arguments, the errors and the intervals are as in `fit_loss_law`.
    """
    return _fit_power("N in parameters", num_params, b_crit, weights, confidence)


class Lines(NamedTuple):
    """Robust straight lines log B_crit = level + slope·(log L - centre), `[...]` each."""

    centre: np.ndarray
    level: np.ndarray
    slope: np.ndarray
    level_error: np.ndarray  # standard error; takes points as independent
    slope_error: np.ndarray  # standard error; takes points as independent
    variance: np.ndarray  # of a point with weight 1, which is the largest weight
    misfit: np.ndarray  # Huber's loss, with the smallest limit of all rows

    @property
    def log_b_star(self) -> np.ndarray:
        return self.level - self.slope * self.centre


def floors_below(loss: np.ndarray, count: int) -> np.ndarray:
    """`count` values of L_inf to try, from 0 to just below the lowest loss."""
    return loss.min() * (1.0 - np.geomspace(1.0, 0.02, count))


def fit_lines(x, y, weights, mask, num_iterations=15) -> Lines:
    """Weighted Huber lines through points `[..., n]` where `mask` is True, with a fixed number of reweightings."""
    base = weights * mask
    base = base / np.max(base, axis=-1, keepdims=True)
    limit, robust = np.array(np.inf), np.ones_like(base)
    for _ in range(num_iterations):
        total = base * robust
        centre, level = weighted_mean(x, total), weighted_mean(y, total)
        spread = (total * (x - centre) ** 2).sum(-1, keepdims=True)
        slope = (total * (x - centre) * (y - level)).sum(-1, keepdims=True) / spread
        standardised = np.sqrt(base) * (y - level - slope * (x - centre))
        limit = huber_limit(standardised, mask, NUM_PARAMETERS)
        robust = huber_weights(standardised, limit)

    freedom = np.maximum(mask.sum(-1, keepdims=True) - NUM_PARAMETERS, 1)
    inside = weighted_mean(1.0 * (np.abs(standardised) <= limit), 1.0 * mask)
    pull = np.clip(standardised, -limit, limit) * mask
    variance = (pull**2).sum(-1, keepdims=True) / freedom / inside**2
    size = np.abs(standardised) * mask
    held = np.minimum(size, limit.min())
    lines = (
        centre,
        level,
        slope,
        np.sqrt(variance / base.sum(-1, keepdims=True)),
        np.sqrt(variance / (base * (x - centre) ** 2).sum(-1, keepdims=True)),
        variance,
        (held * (size - 0.5 * held)).sum(-1, keepdims=True),
    )
    return Lines(*(values[..., 0] for values in lines))


def _fit_power(variable, values, b_crit, weights, confidence) -> PowerLaw:
    law = _fit_law(variable.split(" in ")[0], values, b_crit, weights, 0.0, confidence)
    return PowerLaw(variable, law.b_star, law.exponent, law.exponent_interval, law.loss_range, confidence)


def _fit_law(name, loss, b_crit, weights, floor, confidence) -> LossLaw:
    """`fit_loss_law`, of any variable; `name` is for error messages."""
    loss, b_crit = np.asarray(loss, float), np.asarray(b_crit, float)
    weights = np.ones(loss.shape) if weights is None else np.asarray(weights, float)
    _check(name, loss, b_crit, weights, floor)
    floors = floors_below(loss, NUM_FLOORS) if floor is None else np.array([floor])
    freedom = loss.size - NUM_PARAMETERS - (floor is None)
    lines = fit_lines(np.log(loss - floors[:, None]), np.log(b_crit), weights, np.ones(loss.shape, bool))
    best = int(np.argmin(lines.misfit))
    # An F test allows a total of t². Each floor uses up `worse`; the rest, `left`, is for the line at that floor.
    worse = 2.0 * (lines.misfit - lines.misfit[best]) / np.maximum(lines.variance[best], 1e-24)
    left = special.stdtrit(freedom, 0.5 + confidence / 2) ** 2 - worse
    reach = np.sqrt(np.maximum(left, 0.0) * (loss.size - NUM_PARAMETERS) / freedom)

    def interval(values, errors) -> tuple[float, float]:
        ends = np.stack([values - reach * errors, values + reach * errors])[:, left >= 0]
        return float(ends[0].min()), float(ends[1].max())

    log_b_star = interval(lines.log_b_star, np.hypot(lines.level_error, lines.slope_error * lines.centre))
    return LossLaw(
        b_star=float(np.exp(lines.log_b_star[best])),
        exponent=float(lines.slope[best]),
        exponent_interval=interval(lines.slope, lines.slope_error),
        b_star_interval=(float(np.exp(log_b_star[0])), float(np.exp(log_b_star[1]))),
        loss_range=(float(loss.min()), float(loss.max())),
        confidence=confidence,
        floor=float(floors[best]),
    )


def _check(name, variable, b_crit, weights, floor):
    if variable.ndim != 1 or not variable.shape == b_crit.shape == weights.shape:
        raise ValueError(
            f"{name} {variable.shape}, b_crit {b_crit.shape} and weights {weights.shape} must be lists of equal length"
        )
    for column, values in ((name, variable), ("b_crit", b_crit), ("weights", weights)):
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if bad.size:
            raise ValueError(f"{column}[{bad[0]}] is {values[bad[0]]:g}; must be positive and finite")
    distinct, fewest = np.unique(variable).size, 4 if floor is None else 3
    if distinct < fewest:
        raise ValueError(f"{distinct} distinct values of {name} are too few for a power law: give at least {fewest}")
    if floor is not None and not 0 <= floor < variable.min():
        raise ValueError(f"floor is {floor:g}; must be at least 0 and below the lowest {name}, {variable.min():g}")
