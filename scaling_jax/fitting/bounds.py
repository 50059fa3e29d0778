"""Hyperbolas through points of which some are only bounds: a run that ended above its target needs more than it had.

Tobin 1958, "Estimation of relationships for limited dependent variables": a bound adds the log probability that the
steps lie above it. Measured steps keep Huber's loss; the noise that the probability needs is estimated along with it.
"""

from typing import NamedTuple

import numpy as np
from scipy import special

from scaling_jax.fitting.hyperbolas import NUM_PARAMETERS, Hyperbolas, fit_hyperbolas, log_overhead
from scaling_jax.fitting.robust import huber_weights

NUM_ITERATIONS = 25
PER_POINT = (0, 0, 1, 0, 1, 1)  # fields of Hyperbolas with an axis more than one number a row
SMALLEST_NOISE = 1e-4  # of log steps; noiseless data would make a bound a wall that Newton's steps can't climb


class BoundedHyperbolas(NamedTuple):
    """Fits, and the noise of log steps that they took, `[..., 1]`."""

    hyperbolas: Hyperbolas
    noise: np.ndarray


def fit_bounded(log_batch, log_steps, mask, bound, start=None, num_rounds=3, num_iterations=6) -> BoundedHyperbolas:
    """Fits each row to measured points and bounds.

    Args:
      log_batch, log_steps: `[..., n]`; a lower bound of log steps where `bound` is True.
      mask: `[..., n]`, True where steps were measured.
      bound: `[..., n]`, True where they are known to be more than `log_steps`; never True where `mask` is.
      start, num_rounds, num_iterations: of the fit to measured points alone, which this one starts from.
    """
    alone = fit_hyperbolas(log_batch, log_steps, mask, start, num_rounds, num_iterations)
    position, level, limit = alone.log_b_crit[..., None], alone.log_s_min[..., None], alone.limit
    noise = noise_of(alone.residuals, mask, limit, NUM_PARAMETERS)
    for _ in range(NUM_ITERATIONS):
        overhead, slope = log_overhead(position, log_batch)
        pull, weights = pull_of(log_steps - overhead - level, mask, bound, limit, noise)
        total = weights.sum(-1, keepdims=True)
        centred = slope - (weights * slope).sum(-1, keepdims=True) / total
        step = (pull * centred).sum(-1, keepdims=True) / np.maximum(
            (weights * centred**2).sum(-1, keepdims=True), 1e-12
        )
        step = np.clip(step, -0.5, 0.5)
        level = level + np.clip((pull - weights * slope * step).sum(-1, keepdims=True) / total, -0.5, 0.5)
        position = position + step
        noise = noise_of(log_steps - log_overhead(position, log_batch)[0] - level, mask, limit, NUM_PARAMETERS)
    overhead, slope = log_overhead(position, log_batch)
    residuals = log_steps - overhead - level
    _, weights = pull_of(residuals, mask, bound, np.inf, noise)
    centred = slope - (weights * slope).sum(-1, keepdims=True) / weights.sum(-1, keepdims=True)
    information = (weights * centred**2).sum(-1)
    fits = Hyperbolas(position[..., 0], level[..., 0], residuals * mask, information, limit, weights)
    return BoundedHyperbolas(fits, noise)


def deviance_with_bounds(log_b_crit, fit: BoundedHyperbolas, log_batch, log_steps, mask, bound) -> np.ndarray:
    """How much worse than the fit a given log B_crit is, like `hyperbolas.deviance`."""
    worse = _loss_at(log_b_crit, fit, log_batch, log_steps, mask, bound)
    best = _loss_at(fit.hyperbolas.log_b_crit, fit, log_batch, log_steps, mask, bound)
    return 2.0 * np.maximum(worse - best, 0.0) / fit.noise[..., 0] ** 2


def fit_rows(log_batch, log_steps, mask, bound, start=None, num_rounds=3, num_iterations=6) -> Hyperbolas:
    """Fits `[..., G, n]` rows, of which those with a bound (`mask` and `bound` are `[G, n]`) by `fit_bounded`."""
    fits = fit_hyperbolas(log_batch, log_steps, mask, start, num_rounds, num_iterations)
    rows = bound.any(-1)
    if not rows.any():
        return fits
    bounded, _ = fit_bounded(
        log_batch[rows],
        log_steps[..., rows, :],
        mask[rows],
        bound[rows],
        None if start is None else start[..., rows],
        num_rounds,
        num_iterations,
    )
    merged = []
    for field, changed, per_point in zip(fits, bounded, PER_POINT, strict=True):
        whole = np.broadcast_to(field, (*fits.log_b_crit.shape, *field.shape[field.ndim - per_point :])).copy()
        whole[(..., rows, slice(None)) if per_point else (..., rows)] = changed
        merged.append(whole)
    return Hyperbolas(*merged)


def _loss_at(log_b_crit, fit: BoundedHyperbolas, log_batch, log_steps, mask, bound) -> np.ndarray:
    """Huber's loss of the measured points less noise² · log probability of the bounds, at the best log S_min."""
    overhead, _ = log_overhead(np.asarray(log_b_crit)[..., None], log_batch)
    limit, remainder = fit.hyperbolas.limit, log_steps - overhead
    level = (mask * remainder).sum(-1, keepdims=True) / mask.sum(-1, keepdims=True)
    for _ in range(NUM_ITERATIONS):
        pull, weights = pull_of(remainder - level, mask, bound, limit, fit.noise)
        level = level + np.clip(pull.sum(-1, keepdims=True) / weights.sum(-1, keepdims=True), -2.0, 2.0)
    return loss_of(remainder - level, mask, bound, limit, fit.noise).sum(-1)


def loss_of(residuals, mask, bound, limit, noise) -> np.ndarray:
    """Each point's loss: Huber's where steps were measured, -noise²·log probability where there is a bound."""
    size = np.abs(residuals)
    clipped = np.minimum(size, limit)
    measured = mask * clipped * (size - 0.5 * clipped)
    return measured - bound * noise**2 * special.log_ndtr(np.clip(-residuals / noise, -1e6, None))


def pull_of(residuals, mask, bound, limit, noise) -> tuple[np.ndarray, np.ndarray]:
    """Minus the slope of each point's loss in its fitted value, and the curvature that Newton's step takes."""
    z = np.clip(residuals / noise, -30.0, 1e6)
    hazard = np.exp(-0.5 * z**2 - 0.5 * np.log(2 * np.pi) - special.log_ndtr(-z))
    weights = mask * (huber_weights(residuals, limit) if np.isfinite(limit).any() else 1.0)
    curvature = np.clip(hazard * (hazard - z), 0.0, 1.0)
    held_back = np.minimum(1.0, limit / np.maximum(noise * hazard, 1e-300))
    return weights * residuals + bound * noise * hazard * held_back, weights + bound * curvature * held_back


def noise_of(residuals, mask, limit, num_parameters: int, axis: int | tuple[int, ...] = -1) -> np.ndarray:
    """Standard deviation of log steps along `axis`, which is kept, with outliers held back."""
    count = mask.sum(axis, keepdims=True)
    pull = mask * np.clip(residuals, -limit, limit)
    inside = (mask & (np.abs(residuals) <= limit)).sum(axis, keepdims=True) / count
    variance = (pull**2).sum(axis, keepdims=True) / np.maximum(count - num_parameters, 1) / np.maximum(inside, 0.5)
    return np.maximum(np.sqrt(variance), SMALLEST_NOISE)
