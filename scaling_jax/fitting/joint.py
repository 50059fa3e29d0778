"""One law for a whole scan at once: every run's steps to every target, with S_min free at each model and loss.

log S = log S_min(model, L) + log(1 + B_crit/B), log B_crit = level + slope·x. For the law of Kaplan et al. 2020 (arXiv
2001.08361), eq. 1.4, x = log L; other forms put another x there. S_min is an average given the law, so that two numbers
are left to search. Points whose own B_crit is unbounded count for what they are worth, and runs that ended above a
target count as bounds (`bounds`).

Dimension letters: G fits (model, target loss); n runs of the model that has most.
"""

from typing import NamedTuple

import numpy as np

from scaling_jax.fitting.bounds import NUM_ITERATIONS, noise_of, pull_of
from scaling_jax.fitting.hyperbolas import log_overhead
from scaling_jax.fitting.robust import TUNING, huber_weights
from scaling_jax.fitting.scan_table import ScanTable


class JointFits(NamedTuple):
    """Robust fits, `[...]` unless said otherwise; natural logs of tokens and steps."""

    level: np.ndarray  # log B_crit at x = 0
    slope: np.ndarray
    log_s_min: np.ndarray  # `[..., G]`
    residuals: np.ndarray  # `[..., G, n]`, of measured points and of bounds, zero elsewhere
    limit: np.ndarray  # `[..., 1, 1]`, where Huber's loss turns linear
    noise: np.ndarray  # `[..., 1, 1]`, of log steps
    gradient: np.ndarray  # `[..., 2, G, n]`, of the fitted log steps in level and slope, less its mean in each row
    information: np.ndarray  # `[..., 2, 2]`, inverse covariance of level and slope per unit variance of log S


def fit_joint_rows(
    table: ScanTable, x, log_steps, start, num_rounds=3, num_iterations=6, bound_iterations=NUM_ITERATIONS
) -> JointFits:
    """Fits `log_steps`, `[..., G, n]`, by Gauss-Newton on level and slope, with Huber weights renewed each round.

    Args:
      table: batches, and where steps were measured or bounded.
      x: `[..., G]`, what log B_crit is a straight line in; centred, or level and slope are hard to tell apart.
      start: (level, slope), `[...]` each.
      num_rounds, num_iterations: of the fit to measured points.
      bound_iterations: of the fit to bounds, too, that starts there.
    """
    points = table.mask.astype(float)
    level, slope = (np.asarray(s, float)[..., None, None] for s in start)
    abscissa = np.asarray(x, float)[..., None]
    limit = np.array(np.inf)
    for k in range(num_rounds * num_iterations):
        residuals, gradient, weights = _linearise(level, slope, abscissa, table.log_batch, log_steps, points, limit)
        force = np.einsum("...kgn,...gn->...k", gradient, weights * residuals)
        step = _solve(_quadratic(gradient, weights), force, 1.0)
        level, slope = level + step[..., 0, None, None], slope + step[..., 1, None, None]
        if k % num_iterations == num_iterations - 1:
            limit = _limit(residuals, table.mask)
    overhead, _ = log_overhead(level + slope * abscissa, table.log_batch)
    _, _, weights = _linearise(level, slope, abscissa, table.log_batch, log_steps, points, limit)
    s_min = _mean(log_steps - overhead, weights)
    num_parameters = int(table.mask.any(-1).sum()) + 2
    noise = noise_of(log_steps - overhead - s_min, table.mask, limit, num_parameters, axis=(-2, -1))
    if table.bound.any():
        level, slope, s_min, noise = _with_bounds(
            table, abscissa, log_steps, (level, slope, s_min), limit, noise, num_parameters, bound_iterations
        )
    overhead, along = log_overhead(level + slope * abscissa, table.log_batch)
    residuals = (log_steps - overhead - s_min) * (table.mask | table.bound)
    _, points = pull_of(residuals, table.mask, table.bound, np.inf, noise)
    gradient = _gradient(along, abscissa, points)
    return JointFits(
        level=level[..., 0, 0],
        slope=slope[..., 0, 0],
        log_s_min=s_min[..., 0],
        residuals=residuals,
        limit=limit,
        noise=noise,
        gradient=gradient * table.mask,
        information=_quadratic(gradient, points),
    )


def _with_bounds(table, abscissa, log_steps, start, limit, noise, num_parameters, num_iterations):
    """Newton's steps on level, slope and every S_min from a fit to the measured points alone, noise along with them."""
    level, slope, s_min = start
    for _ in range(num_iterations):
        overhead, along = log_overhead(level + slope * abscissa, table.log_batch)
        pull, weights = pull_of(log_steps - overhead - s_min, table.mask, table.bound, limit, noise)
        gradient = _gradient(along, abscissa, weights)
        step = _solve(_quadratic(gradient, weights), np.einsum("...kgn,...gn->...k", gradient, pull), 0.5)
        along = along * (step[..., :1, None] + step[..., 1:, None] * abscissa)
        total = weights.sum(-1, keepdims=True)
        s_min = s_min + np.clip((pull - weights * along).sum(-1, keepdims=True) / total, -0.5, 0.5)
        level, slope = level + step[..., 0, None, None], slope + step[..., 1, None, None]
        overhead, _ = log_overhead(level + slope * abscissa, table.log_batch)
        noise = noise_of(log_steps - overhead - s_min, table.mask, limit, num_parameters, axis=(-2, -1))
    return level, slope, s_min, noise


def _linearise(level, slope, abscissa, log_batch, log_steps, points, limit):
    overhead, along = log_overhead(level + slope * abscissa, log_batch)
    remainder = log_steps - overhead
    residuals = (remainder - _mean(remainder, points)) * points
    weights = points
    if np.isfinite(limit).any():
        weights = points * huber_weights(residuals, limit)
        residuals = (remainder - _mean(remainder, weights)) * points
    return residuals, _gradient(along, abscissa, weights), weights


def _gradient(along, abscissa, weights):
    along = (along - _mean(along, weights)) * (weights > 0)
    return np.stack([along, along * abscissa], axis=-3)


def _quadratic(gradient, weights):
    return np.einsum("...kgn,...gn,...lgn->...kl", gradient, weights, gradient, optimize=True)


def _solve(information, force, longest):
    damped = information + 1e-9 * np.trace(information, axis1=-2, axis2=-1)[..., None, None] * np.eye(2)
    return np.clip(np.linalg.solve(damped, force[..., None])[..., 0], -longest, longest)


def _limit(residuals, mask):
    """One scale for the whole scan: its median absolute residual knows a wrong run better than seven points do."""
    count = mask.sum()
    freedom = count - mask.any(-1).sum() - 2
    scale = 1.4826 * np.median(np.abs(residuals[..., mask]), axis=-1) * np.sqrt(count / max(freedom, 1))
    return np.maximum(TUNING * scale, 1e-9)[..., None, None]


def _mean(values, weights):
    return (weights * values).sum(-1, keepdims=True) / weights.sum(-1, keepdims=True)
