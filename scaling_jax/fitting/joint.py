"""One law for a whole scan at once: every run's steps to every target, with S_min free at each model and loss.

log S = log S_min(model, L) + log(1 + B_crit/B), log B_crit = level + slope·x. For the law of Kaplan et al. 2020 (arXiv
2001.08361), eq. 1.4, x = log L; other forms put another x there. S_min is an average given the law, so that two numbers
are left to search. Points whose own B_crit is unbounded count for what they are worth.

Dimension letters: G fits (model, target loss); n runs of the model that has most.
"""

from typing import NamedTuple

import numpy as np

from scaling_jax.fitting.hyperbolas import log_overhead
from scaling_jax.fitting.robust import TUNING, huber_weights
from scaling_jax.fitting.scan_table import ScanTable


class JointFits(NamedTuple):
    """Robust fits, `[...]` unless said otherwise; natural logs of tokens and steps."""

    level: np.ndarray  # log B_crit at x = 0
    slope: np.ndarray
    log_s_min: np.ndarray  # `[..., G]`
    residuals: np.ndarray  # `[..., G, n]`, zero where nothing was measured
    limit: np.ndarray  # `[..., 1, 1]`, where Huber's loss turns linear
    gradient: np.ndarray  # `[..., 2, G, n]`, of the fitted log steps in level and slope, less its mean in each row
    information: np.ndarray  # `[..., 2, 2]`, inverse covariance of level and slope per unit variance of log S


def fit_joint_rows(table: ScanTable, x, log_steps, start, num_rounds=3, num_iterations=6) -> JointFits:
    """Fits `log_steps`, `[..., G, n]`, by Gauss-Newton on level and slope, with Huber weights renewed each round.

    Args:
      table: batches, and where steps were measured; bounds don't enter.
      x: `[..., G]`, what log B_crit is a straight line in; centred, or level and slope are hard to tell apart.
      start: (level, slope), `[...]` each.
    """
    points = table.mask.astype(float)
    level, slope = (np.asarray(s, float)[..., None, None] for s in start)
    abscissa = np.asarray(x, float)[..., None]
    limit = np.array(np.inf)
    for k in range(num_rounds * num_iterations):
        residuals, gradient, weights = _linearise(level, slope, abscissa, table.log_batch, log_steps, points, limit)
        information = np.einsum("...kgn,...gn,...lgn->...kl", gradient, weights, gradient, optimize=True)
        force = np.einsum("...kgn,...gn->...k", gradient, weights * residuals)
        damped = information + 1e-9 * np.trace(information, axis1=-2, axis2=-1)[..., None, None] * np.eye(2)
        step = np.clip(np.linalg.solve(damped, force[..., None])[..., 0], -1.0, 1.0)
        level, slope = level + step[..., 0, None, None], slope + step[..., 1, None, None]
        if k % num_iterations == num_iterations - 1:
            limit = _limit(residuals, table.mask)
    residuals, gradient, weights = _linearise(level, slope, abscissa, table.log_batch, log_steps, points, limit)
    overhead, _ = log_overhead(level + slope * abscissa, table.log_batch)
    return JointFits(
        level=level[..., 0, 0],
        slope=slope[..., 0, 0],
        log_s_min=_mean(log_steps - overhead, weights)[..., 0],
        residuals=residuals * points,
        limit=limit,
        gradient=gradient,
        information=np.einsum("...kgn,...gn,...lgn->...kl", gradient, points, gradient, optimize=True),
    )


def _linearise(level, slope, abscissa, log_batch, log_steps, points, limit):
    overhead, along = log_overhead(level + slope * abscissa, log_batch)
    remainder = log_steps - overhead
    residuals = (remainder - _mean(remainder, points)) * points
    weights = points
    if np.isfinite(limit).any():
        weights = points * huber_weights(residuals, limit)
        residuals = (remainder - _mean(remainder, weights)) * points
    along = (along - _mean(along, weights)) * points
    return residuals, np.stack([along, along * abscissa], axis=-3), weights


def _limit(residuals, mask):
    """One scale for the whole scan: its median absolute residual knows a wrong run better than seven points do."""
    count = mask.sum()
    freedom = count - mask.any(-1).sum() - 2
    scale = 1.4826 * np.median(np.abs(residuals[..., mask]), axis=-1) * np.sqrt(count / max(freedom, 1))
    return np.maximum(TUNING * scale, 1e-9)[..., None, None]


def _mean(values, weights):
    return (weights * values).sum(-1, keepdims=True) / weights.sum(-1, keepdims=True)
