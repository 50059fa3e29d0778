"""Robust fits of the hyperbola log S = log S_min + log(1 + B_crit/B), their intervals, and Huber weights.

With Huber weights, a point far from the fit pulls on it with bounded force (Huber 1964, "Robust estimation of a
location parameter"). The scale is the median absolute residual. All functions take many rows at once.
"""

from typing import NamedTuple

import numpy as np
from scipy import special

TUNING = 2.0  # weights fall beyond this many scales; the usual 1.345 loses too much precision with seven clean batches
NUM_PARAMETERS = 2  # of a hyperbola
REACH = 7.0  # search log B_crit this far beyond the batches; farther out, no data can tell values apart


def huber_limit(residuals: np.ndarray, mask: np.ndarray, num_parameters: int) -> np.ndarray:
    """Size of residuals above which Huber's loss is linear, one per fit.

    Args:
      residuals: `[..., n]`, any unit.
      mask: `[..., n]`, True where there is a point.
      num_parameters: number of parameters fitted to each row; corrects the scale for the lost degrees of freedom.

    Returns:
      `[..., 1]`; infinite (least squares) with fewer than three degrees of freedom, too few to judge outliers by.
    """
    count = mask.sum(-1, keepdims=True)
    ordered = np.sort(np.where(mask, np.abs(residuals), np.inf), axis=-1)
    count_all = np.broadcast_to(count, (*ordered.shape[:-1], 1))
    low = np.take_along_axis(ordered, np.maximum(count_all - 1, 0) // 2, axis=-1)
    high = np.take_along_axis(ordered, np.minimum(count_all // 2, ordered.shape[-1] - 1), axis=-1)
    freedom = count - num_parameters
    with np.errstate(invalid="ignore"):
        scale = 1.4826 * 0.5 * (low + high) * np.sqrt(count / np.maximum(freedom, 1))
    # The floor of 1e-9 makes sure that rounding errors of noiseless data are no outliers.
    return np.where(freedom >= 3, np.maximum(TUNING * scale, 1e-9), np.inf)


def huber_weights(residuals: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Weights in (0, 1]; repeated weighted least squares with them gives Huber's fit."""
    size = np.abs(residuals)
    return np.where(size <= limit, 1.0, limit / np.maximum(size, 1e-250))


def weighted_mean(values, weights) -> np.ndarray:
    """Mean along the last axis, which is kept: `[..., n]` -> `[..., 1]`."""
    return (weights * values).sum(-1, keepdims=True) / weights.sum(-1, keepdims=True)


class Hyperbolas(NamedTuple):
    """Robust fits, `[...]` unless a shape is given; natural logs of tokens and steps."""

    log_b_crit: np.ndarray
    log_s_min: np.ndarray
    residuals: np.ndarray  # [..., n], zero where there is no point
    information: np.ndarray  # inverse variance of log_b_crit if log S has variance 1
    limit: np.ndarray  # [..., 1], above which Huber's loss is linear
    weights: np.ndarray  # [..., n], information of each point: 1 if measured, less if it is only a bound


def log_overhead(log_b_crit: np.ndarray, log_batch: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """log(1 + B_crit/B) and its slope along log B_crit."""
    difference = log_b_crit - log_batch
    small = np.exp(-np.abs(difference))
    slope = np.where(difference > 0, 1.0, small) / (1.0 + small)
    return np.maximum(difference, 0.0) + np.log1p(small), slope


def fit_hyperbolas(log_batch, log_steps, mask, start=None, num_rounds=3, num_iterations=6) -> Hyperbolas:
    """Fits each row by damped Gauss-Newton steps in log B_crit; each round renews the Huber weights.

    Args:
      log_batch, log_steps: `[..., n]`, broadcast against each other; any finite value where `mask` is False.
      mask: `[..., n]`, True where there is a point.
      start: `[...]`, log B_crit to start from; None starts from the best of a grid.
      num_rounds, num_iterations: fixed numbers, so that a row's result doesn't depend on the other rows.
    """
    points = mask.astype(float)
    lowest = np.min(np.where(mask, log_batch, np.inf), axis=-1, keepdims=True) - REACH
    highest = np.max(np.where(mask, log_batch, -np.inf), axis=-1, keepdims=True) + REACH
    position = best_of_grid(log_batch, log_steps, points, lowest, highest) if start is None else start[..., None]

    limit = np.array(np.inf)
    for _ in range(num_rounds):
        for _ in range(num_iterations):
            residuals, slope, weights, curvature = linearise(position, log_batch, log_steps, points, limit)
            step = (weights * slope * residuals).sum(-1, keepdims=True) / np.maximum(curvature, 1e-12)
            position = np.clip(position + np.clip(step, -1.0, 1.0), lowest, highest)
        residuals, slope, weights, curvature = linearise(position, log_batch, log_steps, points, limit)
        limit = huber_limit(residuals, mask, NUM_PARAMETERS)

    overhead, slope = log_overhead(position, log_batch)
    level = weighted_mean(log_steps - overhead, weights)
    information = (points * (slope - weighted_mean(slope, points)) ** 2).sum(-1)
    return Hyperbolas(position[..., 0], level[..., 0], residuals * points, information, limit, points)


def deviance(log_b_crit, fit: Hyperbolas, log_batch, log_steps, mask) -> np.ndarray:
    """How much worse than the fit a given log B_crit is: rise of Huber's loss at the best log S_min, over its scale.

    For the true log B_crit it is F-distributed with (1, n - 2) degrees of freedom (Schrader and Hettmansperger 1980).
    """
    points = mask.astype(float)
    overhead, _ = log_overhead(np.asarray(log_b_crit)[..., None], log_batch)
    loss_there = _loss_at_best_level(log_steps - overhead, points, fit.limit)
    loss_here = huber_loss(fit.residuals, points, fit.limit)
    inside = weighted_mean(points * (np.abs(fit.residuals) <= fit.limit), points)[..., 0]
    pull = points * np.clip(fit.residuals, -fit.limit, fit.limit)
    variance = (pull**2).sum(-1) / np.maximum(mask.sum(-1) - NUM_PARAMETERS, 1)
    return 2.0 * np.maximum(loss_there - loss_here, 0.0) * inside / np.maximum(variance, 1e-24)


def profile_intervals(log_b_crit, deviance_at, log_batch, mask, confidence) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper ends `[...]` of the log B_crit that the data don't reject; infinite if they reject none there.

    Args:
      log_b_crit: `[...]`, of the fits.
      deviance_at: function of log B_crit `[...]` with F-distributed values `[...]`, such as `deviance`.
      log_batch, mask: `[..., n]`.
    """
    freedom = np.maximum(mask.sum(-1) - NUM_PARAMETERS, 1)
    allowed = special.stdtrit(freedom, 0.5 + confidence / 2) ** 2
    ends = []
    for beyond in (-30.0, 30.0):  # so far out that log(1 + B_crit/B) is flat or a straight line to the last digit
        edge = (np.min if beyond < 0 else np.max)(
            np.where(mask, log_batch, np.inf if beyond < 0 else -np.inf), axis=-1
        ) + beyond
        unbounded = deviance_at(edge) <= allowed
        accepted = last_accepted(log_b_crit, edge, lambda x: deviance_at(x) <= allowed, num_halvings=40)
        ends.append(np.where(unbounded, np.copysign(np.inf, beyond), accepted))
    return ends[0], ends[1]


def last_accepted(accepted, rejected, accept, num_halvings: int) -> np.ndarray:
    """Between values that `accept` takes and values that it doesn't, all `[...]`: the last that it takes."""
    for _ in range(num_halvings):
        middle = 0.5 * (accepted + rejected)
        keep = accept(middle)
        accepted, rejected = np.where(keep, middle, accepted), np.where(keep, rejected, middle)
    return accepted


def one_sided(log_b_crit, deviance_at, log_batch, mask, confidence=0.995) -> np.ndarray:
    """False `[...]` if the data show, at this confidence, that B_crit lies between the smallest and largest batch."""
    needed = special.stdtrit(np.maximum(mask.sum(-1) - NUM_PARAMETERS, 1), confidence) ** 2
    smallest = np.min(np.where(mask, log_batch, np.inf), axis=-1)
    largest = np.max(np.where(mask, log_batch, -np.inf), axis=-1)
    between = (smallest < log_b_crit) & (log_b_crit < largest)
    for edge in (smallest, largest):
        between &= deviance_at(edge) > needed
    return ~between


def log_covariances(fit: Hyperbolas, log_batch, mask) -> np.ndarray:
    """Covariance `[..., 2, 2]` of log S_min and log B_crit, linearised at the fit; takes points as independent."""
    _, slope = log_overhead(fit.log_b_crit[..., None], log_batch)
    pull = np.clip(fit.residuals, -fit.limit, fit.limit)
    inside = weighted_mean(1.0 * (np.abs(fit.residuals) <= fit.limit), 1.0 * mask)[..., 0]
    variance = (pull**2).sum(-1) / np.maximum(mask.sum(-1) - NUM_PARAMETERS, 1) / np.maximum(inside, 0.5) ** 2
    centre = weighted_mean(slope, fit.weights)[..., 0]
    of_position = variance / np.maximum(fit.information, 1e-300)
    of_level = variance / fit.weights.sum(-1) + centre**2 * of_position
    across = -centre * of_position
    return np.stack([np.stack([of_level, across], -1), np.stack([across, of_position], -1)], -2)


def linearise(position, log_batch, log_steps, points, limit):
    overhead, slope = log_overhead(position, log_batch)
    remainder = log_steps - overhead
    residuals = remainder - weighted_mean(remainder, points)
    weights = points
    if np.isfinite(limit).any():
        for _ in range(2):  # the level and the weights depend on each other
            weights = points * huber_weights(residuals, limit)
            residuals = remainder - weighted_mean(remainder, weights)
    slope = slope - weighted_mean(slope, weights)
    return residuals, slope, weights, (weights * slope**2).sum(-1, keepdims=True)


def best_of_grid(log_batch, log_steps, points, lowest, highest):
    fractions = np.linspace(0.0, 1.0, 121).reshape(-1, *([1] * lowest.ndim))
    positions = lowest + (highest - lowest) * fractions
    overhead, _ = log_overhead(positions, log_batch)
    remainder = log_steps - overhead
    loss = (points * np.abs(remainder - weighted_mean(remainder, points))).sum(-1, keepdims=True)
    return np.take_along_axis(positions + 0 * loss, np.argmin(loss, axis=0, keepdims=True), axis=0)[0]


def huber_loss(residuals, points, limit):
    size = np.abs(residuals)
    clipped = np.minimum(size, limit)
    return (points * clipped * (size - 0.5 * clipped)).sum(-1)


def _loss_at_best_level(remainder, points, limit):
    level = weighted_mean(remainder, points)
    for _ in range(8):
        level = weighted_mean(remainder, points * huber_weights(remainder - level, limit))
    return huber_loss(remainder - level, points, limit)
