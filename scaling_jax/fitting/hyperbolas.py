"""Huber weights: points that lie far from a fit pull on it with bounded force.

Huber 1964, "Robust estimation of a location parameter"; the scale is the median absolute residual.
"""

from typing import NamedTuple

import numpy as np
from scipy import special

TUNING = 2.0  # residuals beyond this many scales are held back; at 1.345 clean scans of seven batches lose too much


def huber_limit(residuals: np.ndarray, mask: np.ndarray, num_parameters: int) -> np.ndarray:
    """Residual size from which Huber's loss turns linear, one per fit.

    Args:
      residuals: `[..., n]`, any unit.
      mask: `[..., n]`, True where there is a point.
      num_parameters: fitted to each row; their share of the freedom is given back to the scale.

    Returns:
      `[..., 1]`, infinite (least squares) where fewer than three degrees of freedom are left to judge outliers by.
    """
    count = mask.sum(-1, keepdims=True)
    ordered = np.sort(np.where(mask, np.abs(residuals), np.inf), axis=-1)
    count_all = np.broadcast_to(count, (*ordered.shape[:-1], 1))
    low = np.take_along_axis(ordered, np.maximum(count_all - 1, 0) // 2, axis=-1)
    high = np.take_along_axis(ordered, np.minimum(count_all // 2, ordered.shape[-1] - 1), axis=-1)
    freedom = count - num_parameters
    with np.errstate(invalid="ignore"):
        scale = 1.4826 * 0.5 * (low + high) * np.sqrt(count / np.maximum(freedom, 1))
    # The floor keeps data without noise from turning rounding errors into outliers.
    return np.where(freedom >= 3, np.maximum(TUNING * scale, 1e-9), np.inf)


def huber_weights(residuals: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Weights in (0, 1] of the least-squares fit that has Huber's fit as its fixed point."""
    size = np.abs(residuals)
    return np.where(size <= limit, 1.0, limit / np.maximum(size, np.finfo(float).tiny))


NUM_PARAMETERS = 2
REACH = 7.0  # log B_crit is looked for this far outside of the batches; beyond it nothing can be told apart


class Hyperbolas(NamedTuple):
    """Robust fits, `[...]` unless said otherwise; natural logs of tokens and steps."""

    log_b_crit: np.ndarray
    log_s_min: np.ndarray
    residuals: np.ndarray  # [..., n], zero where there is no point
    information: np.ndarray  # inverse variance of log_b_crit per unit variance of log S
    limit: np.ndarray  # [..., 1], where Huber's loss turns linear
    weights: np.ndarray  # [..., n], what each point tells of the parameters: 1, or less where it is only a bound


def log_overhead(log_b_crit: np.ndarray, log_batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log(1 + B_crit/B) and its slope along log B_crit."""
    difference = log_b_crit - log_batch
    small = np.exp(-np.abs(difference))
    slope = np.where(difference > 0, 1.0, small) / (1.0 + small)
    return np.maximum(difference, 0.0) + np.log1p(small), slope


def fit_hyperbolas(log_batch, log_steps, mask, start=None, num_rounds=3, num_iterations=6) -> Hyperbolas:
    """Fits each row by damped Gauss-Newton along log B_crit, with Huber weights renewed each round.

    Args:
      log_batch, log_steps: `[..., n]`, broadcast against each other; anything finite where `mask` is False.
      mask: `[..., n]`, True where there is a point.
      start: `[...]`, log B_crit to start from; None looks for the best of a grid.
      num_rounds, num_iterations: fixed, so that results don't depend on what else is fitted along.
    """
    points = mask.astype(float)
    lowest = np.min(np.where(mask, log_batch, np.inf), axis=-1, keepdims=True) - REACH
    highest = np.max(np.where(mask, log_batch, -np.inf), axis=-1, keepdims=True) + REACH
    position = _best_of_grid(log_batch, log_steps, points, lowest, highest) if start is None else start[..., None]

    limit = np.array(np.inf)
    for _ in range(num_rounds):
        for _ in range(num_iterations):
            residuals, slope, weights, curvature = _linearise(position, log_batch, log_steps, points, limit)
            step = (weights * slope * residuals).sum(-1, keepdims=True) / np.maximum(curvature, 1e-12)
            position = np.clip(position + np.clip(step, -1.0, 1.0), lowest, highest)
        residuals, slope, weights, curvature = _linearise(position, log_batch, log_steps, points, limit)
        limit = huber_limit(residuals, mask, NUM_PARAMETERS)

    overhead, slope = log_overhead(position, log_batch)
    level = _mean(log_steps - overhead, weights)
    information = (points * (slope - _mean(slope, points)) ** 2).sum(-1)
    return Hyperbolas(position[..., 0], level[..., 0], residuals * points, information, limit, points)


def deviance(log_b_crit, fit: Hyperbolas, log_batch, log_steps, mask) -> np.ndarray:
    """How much worse than the fit a given log B_crit is: F-distributed with (1, n - 2) degrees of freedom if true.

    Huber's loss at the best log S_min, over the scale of the fit (Schrader and Hettmansperger 1980).
    """
    points = mask.astype(float)
    overhead, _ = log_overhead(np.asarray(log_b_crit)[..., None], log_batch)
    loss_there = _loss_at_best_level(log_steps - overhead, points, fit.limit)
    loss_here = _huber_loss(fit.residuals, points, fit.limit)
    inside = _mean(points * (np.abs(fit.residuals) <= fit.limit), points)[..., 0]
    pull = points * np.clip(fit.residuals, -fit.limit, fit.limit)
    variance = (pull**2).sum(-1) / np.maximum(mask.sum(-1) - NUM_PARAMETERS, 1)
    return 2.0 * np.maximum(loss_there - loss_here, 0.0) * inside / np.maximum(variance, 1e-24)


def profile_intervals(log_b_crit, deviance_at, log_batch, mask, confidence) -> tuple[np.ndarray, np.ndarray]:
    """Ends of {log B_crit that the data don't reject}, `[...]` each; infinite where they reject no further one.

    Args:
      log_b_crit: `[...]`, of the fits.
      deviance_at: log B_crit `[...]` -> F-distributed `[...]`, such as `deviance`.
      log_batch, mask: `[..., n]`.
    """
    freedom = np.maximum(mask.sum(-1) - NUM_PARAMETERS, 1)
    allowed = special.stdtrit(freedom, 0.5 + confidence / 2) ** 2
    ends = []
    for beyond in (-30.0, 30.0):  # so far out that softplus is flat or a straight line to the last digit
        edge = (np.min if beyond < 0 else np.max)(
            np.where(mask, log_batch, np.inf if beyond < 0 else -np.inf), axis=-1
        ) + beyond
        unbounded = deviance_at(edge) <= allowed
        accepted, rejected = log_b_crit, edge
        for _ in range(40):
            middle = 0.5 * (accepted + rejected)
            keep = deviance_at(middle) <= allowed
            accepted, rejected = np.where(keep, middle, accepted), np.where(keep, rejected, middle)
        ends.append(np.where(unbounded, np.copysign(np.inf, beyond), accepted))
    return ends[0], ends[1]


def one_sided(log_b_crit, deviance_at, log_batch, mask, confidence=0.995) -> np.ndarray:
    """True, `[...]`, unless the data show at this confidence that B_crit lies between smallest and largest batch."""
    needed = special.stdtrit(np.maximum(mask.sum(-1) - NUM_PARAMETERS, 1), confidence) ** 2
    smallest = np.min(np.where(mask, log_batch, np.inf), axis=-1)
    largest = np.max(np.where(mask, log_batch, -np.inf), axis=-1)
    between = (smallest < log_b_crit) & (log_b_crit < largest)
    for edge in (smallest, largest):
        between &= deviance_at(edge) > needed
    return ~between


def log_covariances(fit: Hyperbolas, log_batch, mask) -> np.ndarray:
    """Covariance `[..., 2, 2]` of log S_min and log B_crit, linearised at the fit, as if points were independent."""
    _, slope = log_overhead(fit.log_b_crit[..., None], log_batch)
    pull = np.clip(fit.residuals, -fit.limit, fit.limit)
    inside = _mean(1.0 * (np.abs(fit.residuals) <= fit.limit), 1.0 * mask)[..., 0]
    variance = (pull**2).sum(-1) / np.maximum(mask.sum(-1) - NUM_PARAMETERS, 1) / inside**2
    centre = _mean(slope, fit.weights)[..., 0]
    of_position = variance / np.maximum(fit.information, 1e-300)
    of_level = variance / fit.weights.sum(-1) + centre**2 * of_position
    across = -centre * of_position
    return np.stack([np.stack([of_level, across], -1), np.stack([across, of_position], -1)], -2)


def _linearise(position, log_batch, log_steps, points, limit):
    overhead, slope = log_overhead(position, log_batch)
    remainder = log_steps - overhead
    residuals = remainder - _mean(remainder, points)
    weights = points
    if np.isfinite(limit).any():
        for _ in range(2):  # the level and the weights depend on each other
            weights = points * huber_weights(residuals, limit)
            residuals = remainder - _mean(remainder, weights)
    slope = slope - _mean(slope, weights)
    return residuals, slope, weights, (weights * slope**2).sum(-1, keepdims=True)


def _best_of_grid(log_batch, log_steps, points, lowest, highest):
    fractions = np.linspace(0.0, 1.0, 121).reshape(-1, *([1] * lowest.ndim))
    positions = lowest + (highest - lowest) * fractions
    overhead, _ = log_overhead(positions, log_batch)
    remainder = log_steps - overhead
    loss = (points * np.abs(remainder - _mean(remainder, points))).sum(-1, keepdims=True)
    return np.take_along_axis(positions + 0 * loss, np.argmin(loss, axis=0, keepdims=True), axis=0)[0]


def _mean(values, weights):
    return (weights * values).sum(-1, keepdims=True) / weights.sum(-1, keepdims=True)


def _huber_loss(residuals, points, limit):
    size = np.abs(residuals)
    clipped = np.minimum(size, limit)
    return (points * clipped * (size - 0.5 * clipped)).sum(-1)


def _loss_at_best_level(remainder, points, limit):
    level = _mean(remainder, points)
    for _ in range(8):
        level = _mean(remainder, points * huber_weights(remainder - level, limit))
    return _huber_loss(remainder - level, points, limit)
