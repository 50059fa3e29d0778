"""A smooth curve through losses over log batch size, and what it says of their minimum.

The curve is a parabola plus a random curve of unknown roughness, the twice integrated Brownian motion: a smoothing
spline of degree five (Wahba 1978, Journal of the Royal Statistical Society B 40). So real curves, which are flatter or
steeper on one side, need no formula. Roughness and noise are common to all curves of a table. The noise is that of
restricted maximum likelihood; roughness is averaged over what the losses allow, so intervals hold it, too.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

NUM_PARAMETERS = 3  # of the parabola
NUM_POINTS = 241  # of the grid on which a curve is searched for its minimum
_DECADES = np.arange(-1.5, 7.1, 0.5)  # variance of the random curve over that of the noise, in powers of ten
_PARABOLAS = 5.0  # weight of the smallest roughness, which stands for all that can't be told from a parabola
_LEAST_WEIGHT = 0.01  # of a roughness to be counted
SMALLEST_NOISE = 1e-5  # nats; losses are written with a few digits, and no noise at all leaves nothing to compare with


class Roughness(NamedTuple):
    """One roughness of the curves, with the noise that goes with it."""

    weight: float
    value: float  # variance of the random curve over that of the noise, per log batch size to the fifth power
    variance: float  # of a loss with relative variance 1


@dataclasses.dataclass(frozen=True, eq=False)
class Losses:
    """Losses at the batch sizes of one budget."""

    x: np.ndarray  # `[n]`, log batch size, rising
    loss: np.ndarray  # `[n]`
    covariance: np.ndarray  # `[n, n]`, relative: 1 on the diagonal for a single run


class Curve:
    """The smooth of one budget's losses.

    Args:
      losses: of the budget.
      roughness: from `roughness_of`.
      freedom: degrees of freedom of the noise.
    """

    def __init__(self, losses: Losses, roughness: Sequence[Roughness], freedom: int):
        self.x = losses.x
        self.freedom = freedom
        self._losses = losses
        self._solved = [(r, _Solved(losses, r.value)) for r in roughness]
        self.grid = np.linspace(self.x[0], self.x[-1], NUM_POINTS)
        self.values = self.at(self.grid)
        self.lowest = int(np.argmin(self.values))

    def at(self, x) -> np.ndarray:
        """The curve at log batch sizes `[m]`."""
        x = np.atleast_1d(np.asarray(x, float))
        return sum(r.weight * (solved.values(x) @ self._losses.loss) for r, solved in self._solved)

    @functools.cached_property
    def scores(self) -> np.ndarray:
        """`[grid]`: slope of the curve over its standard error, away from the minimum never closer to 0 again.

        If the minimum is at a point, its score is a draw from Student's t with `freedom` degrees.
        """
        return self._scores(noise_only=False)

    @functools.cached_property
    def noise_scores(self) -> np.ndarray:
        """`[grid]`: `scores` with the error from noise alone, without that from roughness.

        Curves of one shape share the error from roughness, so it moves all their minima alike.
        """
        return self._scores(noise_only=True)

    def _scores(self, noise_only: bool) -> np.ndarray:
        below = np.zeros(len(self.grid))  # probability that the slope is negative
        for r, solved in self._solved:
            slope, variance, noise = solved.slope(self.grid)
            variance = noise if noise_only else variance
            below += r.weight * special.stdtr(self.freedom, -slope / np.sqrt(r.variance * variance))
        scores = -special.stdtrit(self.freedom, np.clip(below, 1e-15, 1 - 1e-15))
        k = self.lowest
        return np.concatenate(
            [np.minimum.accumulate(scores[: k + 1][::-1])[::-1], np.maximum.accumulate(scores[k:])[1:]]
        )

    def above(self, x, base: float) -> list[tuple[float, np.ndarray, np.ndarray]]:
        """[(weight, curve at x minus curve at base, its standard error)], one for each roughness."""
        x = np.atleast_1d(np.asarray(x, float))
        found = []
        for r, solved in self._solved:
            difference, variance = solved.difference(x, base)
            found.append((r.weight, difference, np.sqrt(r.variance * variance)))
        return found

    def shared_error(self, confidence: float) -> float:
        """Half of the interval of the minimum that comes from roughness alone, in log batch size."""
        limit = special.stdtrit(self.freedom, 0.5 + confidence / 2)
        whole, noise = (
            (np.interp(limit, scores, self.grid) - np.interp(-limit, scores, self.grid)) / 2
            for scores in (self.scores, self.noise_scores)
        )
        return math.sqrt(max(whole**2 - noise**2, 0.0))

    def minimum(self, confidence: float) -> tuple[float, float, float]:
        """(log batch size of the least loss, low, high); an end is infinite if the losses don't bound it.

        The interval holds every point at which the slope may be 0.
        """
        limit = special.stdtrit(self.freedom, 0.5 + confidence / 2)
        x, scores, k = self.grid, self.scores, self.lowest
        best = float(np.interp(0.0, scores, x)) if scores[0] < 0 < scores[-1] else float(x[k])
        # A slope is least well known at the ends. There a loss that is higher for sure excludes a minimum as well.
        sure = [sum(w * special.stdtr(self.freedom, d / e) for w, d, e in self.above(x[end], x[k])) for end in (0, -1)]
        high_ends = [0 < k < len(x) - 1 and float(s[0]) > 0.995 for s in sure]
        low = -np.inf if scores[0] > -limit and not high_ends[0] else _crossing(x[: k + 1], scores[: k + 1], -limit)
        high = np.inf if scores[-1] < limit and not high_ends[1] else _crossing(x[k:], scores[k:], limit)
        return best, low, high


class _Solved:
    """A smooth at one roughness: linear in the losses (universal kriging)."""

    def __init__(self, losses: Losses, roughness: float):
        self._origin, self._roughness = losses.x[0], roughness
        self._x = losses.x - self._origin
        self._inverse = np.linalg.inv(losses.covariance + roughness * _covariance(self._x, self._x))
        self._basis = _basis(self._x)
        self._gram = np.linalg.inv(self._basis.T @ self._inverse @ self._basis)
        self._loss, self._covariance = losses.loss, losses.covariance

    def values(self, x) -> np.ndarray:
        """`[m, n]`: the curve at x as weights of the losses."""
        t = x - self._origin
        return self._weights(self._roughness * _covariance(t, self._x), _basis(t))[0]

    def slope(self, x) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(slope at x, its variance relative to that of a loss, the part from noise), `[m]` each."""
        t = x - self._origin
        with_losses = self._roughness * _slope_covariance(t, self._x)
        basis = np.stack([0 * t, 1 + 0 * t, 2 * t], axis=1)
        return self._predict(with_losses, basis, self._roughness * t**3 / 3)

    def difference(self, x, base: float) -> tuple[np.ndarray, np.ndarray]:
        """(curve at x minus curve at base, its variance relative to that of a loss), `[m]` each."""
        t, u = x - self._origin, np.array([base - self._origin])
        with_losses = self._roughness * (_covariance(t, self._x) - _covariance(u, self._x))
        prior = _variance(t) + _variance(u) - 2 * _covariance(t, u)[:, 0]
        return self._predict(with_losses, _basis(t) - _basis(u), self._roughness * prior)[:2]

    def _predict(self, with_losses, basis, prior) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        weights, rest = self._weights(with_losses, basis)
        known = np.einsum("ij,jk,ik->i", with_losses, self._inverse, with_losses)
        variance = prior - known + np.einsum("ij,jk,ik->i", rest, self._gram, rest)
        noise = np.einsum("ij,jk,ik->i", weights, self._covariance, weights)
        return weights @ self._loss, np.maximum(variance, 1e-18), np.maximum(noise, 1e-18)

    def _weights(self, with_losses, basis) -> tuple[np.ndarray, np.ndarray]:
        direct = with_losses @ self._inverse
        rest = basis - direct @ self._basis
        return direct + rest @ self._gram @ self._basis.T @ self._inverse, rest


def roughness_of(curves: Sequence[Losses], rss: float = 0.0, freedom: int = 0) -> tuple[list[Roughness], int]:
    """The roughnesses that the losses of all budgets allow, and the degrees of freedom of the noise.

    Args:
      curves: the losses of each budget, at four batch sizes or more.
      rss, freedom: squared residuals of runs at one batch size, and their degrees of freedom, to add to the noise.

    Returns:
      The roughnesses, weighted by restricted likelihood; and degrees of freedom.
    """
    freedom += sum(len(c.x) - NUM_PARAMETERS for c in curves)
    widest = max(c.x[-1] - c.x[0] for c in curves)
    values = 320 / widest**5 * 10**_DECADES  # at 1, the random curve bends about as much as the noise scatters
    log_likelihood, variances = [], []
    for value in values:
        log_volume, total = 0.0, rss + freedom * SMALLEST_NOISE**2
        for curve in curves:
            volume, residual = _restricted(curve, value)
            log_volume, total = log_volume + volume, total + residual
        log_likelihood.append(-0.5 * (log_volume + freedom * np.log(total)))
        variances.append(total / freedom)
    weights = np.exp(np.array(log_likelihood) - max(log_likelihood))
    weights[0] *= _PARABOLAS
    kept = np.flatnonzero(weights >= _LEAST_WEIGHT * weights.sum())
    share = weights[kept] / weights[kept].sum()
    found = zip(share, values[kept], np.array(variances)[kept], strict=True)
    return [Roughness(*map(float, one)) for one in found], freedom


def _restricted(curve: Losses, roughness: float) -> tuple[float, float]:
    """(log of the volume, squared residuals) of the restricted likelihood (Patterson and Thompson 1971)."""
    x = curve.x - curve.x[0]
    root = np.linalg.cholesky(curve.covariance + roughness * _covariance(x, x))
    basis, loss = np.linalg.solve(root, _basis(x)), np.linalg.solve(root, curve.loss)
    coefficients, *_ = np.linalg.lstsq(basis, loss, rcond=None)
    residual = loss - basis @ coefficients
    volume = 2 * np.log(np.diag(root)).sum() + np.linalg.slogdet(basis.T @ basis)[1]
    return float(volume), float(residual @ residual)


def _basis(t) -> np.ndarray:
    return np.stack([np.ones_like(t), t, t**2], axis=1)


def _covariance(t, s) -> np.ndarray:
    """`[m, n]`: ∫ (t-u)²(s-u)²/4 du from 0 to the smaller, of the twice integrated Brownian motion."""
    t, s = t[:, None], s[None, :]
    a, d = np.minimum(t, s), np.abs(t - s)
    return a**5 / 20 + d * a**4 / 8 + d**2 * a**3 / 12


def _variance(t) -> np.ndarray:
    return t**5 / 20


def _slope_covariance(t, s) -> np.ndarray:
    """`[m, n]`: of the slope at t and the value at s, ∫ (t-u)(s-u)²/2 du from 0 to the smaller."""
    t, s = t[:, None], s[None, :]
    a, d = np.minimum(t, s), np.abs(t - s)
    return np.where(s <= t, a**4 / 8 + d * a**3 / 6, a**4 / 8 + d * a**3 / 3 + d**2 * a**2 / 4)


def _crossing(x, scores, at: float) -> float:
    """Where rising scores pass a value; the nearer end of x if they don't."""
    return float(np.interp(at, scores, x))
