"""The law B_opt(D) = constant·D^exponent through the best batches of several budgets.

Each budget says of any batch how surely the loss still falls or already rises there: the slope of its curve over its
standard error (`Curve.scores`). If a law is true, the squared scores at its batches add up like errors do. Its interval
holds every law whose sum isn't too far above the least one (profile likelihood; Fieller 1954 for a single parabola). So
budgets whose best batch is only bounded enter as bounds. What the unknown shape of the curves adds to the error of a
best batch is common to the budgets: it widens the band of the law, not the interval of its exponent.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from scaling_jax.fitting.smooth import Curve

NUM_PARAMETERS = 2
FEWEST_BUDGETS = 3
_NUM_POINTS = 161  # of the grid in each parameter
_ROUNDS = 12  # of widening or narrowing the grid
MISFIT = 0.05  # p below which budgets don't follow one law


class _Region(NamedTuple):
    """The laws that aren't rejected: level at the middle of the budgets, and slope."""

    level: np.ndarray  # `[laws]`
    slope: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class BudgetLaw:
    """B_opt = constant·D^exponent, B_opt and D in tokens."""

    constant: float
    exponent: float
    exponent_interval: tuple[float, float]
    valid_range: tuple[float, float]  # of the budgets D in the fit, in tokens; the law is untested elsewhere
    confidence: float
    misfit_p: float  # p of a test that one law holds for all budgets
    budgets: int  # number in the fit
    bounds: int  # number of these that only bound their best batch
    _shared_error: float = dataclasses.field(repr=False)  # of all best batches alike, in logs
    _region: _Region = dataclasses.field(repr=False)

    def __call__(self, tokens):
        """The best batch size in tokens for a budget of `tokens`."""
        return self.constant * np.asarray(tokens, float) ** self.exponent

    def band(self, tokens) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of the interval of the best batch at each budget, in tokens."""
        middle = np.log(self.valid_range).mean()
        x = np.log(np.asarray(tokens, float))[..., None] - middle
        at = self._region.level + self._region.slope * x
        middle_of_law = np.log(self(tokens))
        low, high = (
            middle_of_law + sign * np.hypot(end - middle_of_law, self._shared_error)
            for sign, end in ((-1, at.min(-1)), (1, at.max(-1)))
        )
        return np.exp(low), np.exp(high)


def fit_budget_law(
    curves: Sequence[Curve], tokens: np.ndarray, bounded: np.ndarray, confidence: float
) -> BudgetLaw | None:
    """The law through the minima of `curves`; None unless three different budgets bound theirs on both sides.

    Args:
      curves: of the budgets.
      tokens: `[budgets]`.
      bounded: `[budgets]`, False for a budget that only bounds its best batch on one side.
      confidence: of the intervals.
    """
    if len(np.unique(tokens[bounded])) < FEWEST_BUDGETS:
        return None
    middle = np.log([tokens.min(), tokens.max()]).mean()
    x = np.log(tokens) - middle
    freedom = curves[0].freedom
    level, slope, level_error, slope_error = _line(
        [c for c, b in zip(curves, bounded, strict=True) if b], x[bounded], confidence
    )
    for _ in range(_ROUNDS):
        levels = level + level_error * np.linspace(-1, 1, _NUM_POINTS)
        slopes = slope + slope_error * np.linspace(-1, 1, _NUM_POINTS)
        sums = np.sum([_squared(c, levels[:, None] + slopes * at) for c, at in zip(curves, x, strict=True)], axis=0)
        i, j = np.unravel_index(np.argmin(sums), sums.shape)
        level, slope = float(levels[i]), float(slopes[j])
        degrees = len(x) - NUM_PARAMETERS
        misfit_p = float(special.fdtrc(degrees, freedom, sums[i, j] / degrees))
        limit = special.stdtrit(freedom, 0.5 + confidence / 2) ** 2
        if misfit_p < MISFIT:  # then budgets scatter around the law, by as much as they do
            limit = special.stdtrit(degrees, 0.5 + confidence / 2) ** 2 * sums[i, j] / degrees
        inside = sums <= sums[i, j] + limit
        wide = [_reach(inside.any(axis)) for axis in (1, 0)]
        if all(0.3 < reach < 1 for reach in wide):
            break
        level_error, slope_error = (
            error * (2.5 if reach >= 1 else max(1.6 * reach, 0.05) if reach <= 0.3 else 1.0)
            for error, reach in zip((level_error, slope_error), wide, strict=True)
        )
    rows, columns = np.nonzero(inside)
    region = _Region(levels[rows], slopes[columns])
    half = slopes[1] - slopes[0]  # of the grid: the region ends within the next cell
    return BudgetLaw(
        constant=float(np.exp(level - slope * middle)),
        exponent=slope,
        exponent_interval=(float(region.slope.min() - half / 2), float(region.slope.max() + half / 2)),
        valid_range=(float(tokens.min()), float(tokens.max())),
        confidence=confidence,
        misfit_p=misfit_p,
        budgets=len(tokens),
        bounds=int((~bounded).sum()),
        _shared_error=float(np.mean([c.shared_error(confidence) for c, b in zip(curves, bounded, strict=True) if b])),
        _region=region,
    )


def _squared(curve: Curve, log_batch) -> np.ndarray:
    """Squared scores at log batch sizes; 0 beyond an end towards which the loss still falls."""
    scores = curve.noise_scores
    first, last = min(scores[0], 0.0), max(scores[-1], 0.0)
    return np.interp(log_batch, curve.grid, scores, left=first, right=last) ** 2


def _line(curves: Sequence[Curve], x, confidence: float) -> tuple[float, float, float, float]:
    """(level, slope, reach of the grid around each) by a weighted line through the minima."""
    best, low, high = np.array([curve.minimum(confidence) for curve in curves]).T
    error = np.maximum((high - low) / 4, 1e-3)
    design = np.stack([np.ones_like(x), x], axis=1) / error[:, None]
    gram = np.linalg.inv(design.T @ design)
    level, slope = gram @ design.T @ (best / error)
    return float(level), float(slope), 5 * float(np.sqrt(gram[0, 0])), 5 * float(np.sqrt(gram[1, 1]))


def _reach(inside: np.ndarray) -> float:
    """How far from the middle of the grid the region reaches, as a share of the grid's half; 1 at its edge."""
    found = np.flatnonzero(inside)
    half = (len(inside) - 1) / 2
    return float(max(half - found[0], found[-1] - half) / half)
