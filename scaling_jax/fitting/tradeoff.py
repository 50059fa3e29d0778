"""The trade-off between optimizer steps and tokens at one loss, S = S_min·(1 + B_crit/B), fitted to runs and bounds.

McCandlish et al. 2018 (arXiv 1812.06162), eq. 2.11; Kaplan et al. 2020 (arXiv 2001.08361), eq. 5.1 to 5.3. Runs that
ended above the loss enter as bounds: they need more steps than they had.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from scipy import special

from scaling_jax.fitting.hyperbolas import (
    NUM_PARAMETERS,
    Hyperbolas,
    deviance,
    fit_hyperbolas,
    huber_weights,
    log_covariances,
    log_overhead,
    one_sided,
    profile_intervals,
)
from scaling_jax.fitting.shapes import Shape, fit_shapes

NUM_ITERATIONS = 25  # of the fit with bounds
_AT_ONCE = 5_000  # points of rows that are fitted together
SMALLEST_NOISE = 1e-4  # of log steps; with no noise at all, a bound would be a wall that Newton steps can't get past


@dataclasses.dataclass(frozen=True, eq=False)
class Tradeoff:
    """(S/S_min - 1)(E/E_min - 1) = 1 with E = B·S. S is in optimizer steps; B and E are in tokens."""

    s_min: float  # minimum number of steps, with very large batches
    e_min: float  # minimum number of tokens, with very small batches
    b_crit: float  # E_min/S_min; at this batch size a run needs 2·S_min steps and 2·E_min tokens
    b_crit_interval: tuple[float, float]  # 0 or infinity at an end if the data reject no smaller or no larger B_crit
    one_sided: bool  # True: the data don't show batches on both sides of B_crit; read the interval, not the number
    confidence: float
    batch_tokens: np.ndarray = dataclasses.field(repr=False)
    steps: np.ndarray = dataclasses.field(repr=False)
    residuals: np.ndarray = dataclasses.field(repr=False)  # log(steps measured/steps fitted)
    bound_batch_tokens: np.ndarray = dataclasses.field(repr=False)  # runs that ended above the loss
    bound_steps: np.ndarray = dataclasses.field(repr=False)  # the steps that these runs had
    log_covariance: np.ndarray = dataclasses.field(repr=False)  # `[2, 2]`, of log s_min and log b_crit
    shape: Shape = dataclasses.field(repr=False)  # the same runs, fitted with a free shape

    @property
    def shape_p(self) -> float:
        """p of a test that the trade-off is a hyperbola; NaN if steps were measured at three batch sizes only."""
        return self.shape.p_hyperbola

    @property
    def end_slopes(self) -> tuple[float, float]:
        """d log S/d log B at the smallest and the largest batch, by the free shape; a hyperbola's go from -1 to 0."""
        return self.shape.end_slopes

    @property
    def token_minimum(self) -> float | None:
        """B_opt in tokens, if the smallest batch takes significantly more tokens than a larger one; else None."""
        return self.shape.b_opt if self.shape.u_shaped else None

    def steps_at(self, batch_tokens):
        """Steps to the loss at a batch size in tokens: S_min·(1 + B_crit/B)."""
        return self.s_min * (1.0 + self.b_crit / np.asarray(batch_tokens, float))

    def tokens_at(self, batch_tokens):
        """Tokens to the loss at a batch size in tokens: E_min·(1 + B/B_crit)."""
        return self.e_min * (1.0 + np.asarray(batch_tokens, float) / self.b_crit)

    def steps_interval(self, batch_tokens) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) of `steps_at`, by the delta method in logs (Student t)."""
        batch_tokens = np.asarray(batch_tokens, float)
        along = np.stack([np.ones_like(batch_tokens), self.b_crit / (self.b_crit + batch_tokens)], axis=-1)
        variance = np.einsum("...i,ij,...j->...", along, self.log_covariance, along)
        t = special.stdtrit(max(self.steps.size - NUM_PARAMETERS, 1), 0.5 + self.confidence / 2)
        factor = np.exp(t * np.sqrt(np.maximum(variance, 0.0)))
        return self.steps_at(batch_tokens) / factor, self.steps_at(batch_tokens) * factor

    def batch_at_overhead(self, overhead: float, reference_batch_tokens: float = 0.0) -> float:
        """Batch size in tokens at which a run needs (1 + overhead) times the tokens of the reference batch.

        By default the reference is the limit of small batches, E_min; overhead 1 then gives B_crit. For free shapes,
        see `fitting.cbs20`.
        """
        return overhead * self.b_crit + (1.0 + overhead) * reference_batch_tokens

    @property
    def cbs20(self) -> float:
        """Batch size in tokens at which a run needs 20 % more tokens than E_min; this is not B_crit.

        Zhang et al. 2024 (arXiv 2410.21676) count the 20 % from a reference batch: see `fitting.cbs20`.
        """
        return self.batch_at_overhead(0.2)


def fit_tradeoff(batch_tokens, steps, *, steps_tried=None, confidence: float = 0.95) -> Tradeoff:
    """Fits S_min and E_min to the steps to one loss at several batch sizes, robustly and in logs.

    Args:
      batch_tokens: `[n]`, tokens per step; a batch size may repeat (seeds).
      steps: `[n]`, optimizer steps to the loss; NaN if the run ended above it.
      steps_tried: `[n]`, total steps of a run that ended above the loss; it enters as a bound, steps > steps_tried.
        Used only where `steps` is NaN; NaN leaves the run out.
      confidence: of `b_crit_interval`, which holds every B_crit that an F test on Huber's loss doesn't reject.

    Raises:
      ValueError: for values that aren't positive and finite, unequal lengths, or steps measured at fewer than three
        batch sizes.
    """
    batch_tokens, steps, tried = _checked(batch_tokens, steps, steps_tried)
    mask = np.isfinite(steps)
    bound = ~mask & np.isfinite(tried)
    log_steps = np.log(np.where(mask, steps, np.where(bound, tried, 1.0)))
    return fit_tradeoffs(np.log(batch_tokens)[None], log_steps[None], mask[None], confidence, bound[None])[0]


def fit_tradeoffs(log_batch, log_steps, mask, confidence: float, bound=None) -> list[Tradeoff]:
    """One fit for each row of `[rows, n]` natural logs. Doesn't check its arguments.

    Where `mask` is True, `log_steps` were measured. Where `bound` is True, the steps are more than `log_steps`.
    """
    tradeoffs: dict[int, Tradeoff] = {}
    for rows, with_bounds in _parts(mask, bound):
        of_bounds = bound[rows] if with_bounds else None
        found = _fit_alike(log_batch[rows], log_steps[rows], mask[rows], confidence, of_bounds)
        tradeoffs |= dict(zip(rows.tolist(), found, strict=True))
    return [tradeoffs[row] for row in range(len(mask))]


def are_one_sided(log_batch, log_steps, mask, bound) -> np.ndarray:
    """`Tradeoff.one_sided` `[rows]` of the rows of `fit_tradeoffs`, without the rest of their fits."""
    flags = np.zeros(len(mask), bool)
    for rows, with_bounds in _parts(mask, bound):
        of_bounds = bound[rows] if with_bounds else None
        fits, deviance_at = _fitted(log_batch[rows], log_steps[rows], mask[rows], of_bounds)
        flags[rows] = one_sided(fits.log_b_crit, deviance_at, log_batch[rows], mask[rows])
    return flags


class BoundedHyperbolas(NamedTuple):
    """Fits to measured points and bounds."""

    hyperbolas: Hyperbolas
    noise: np.ndarray  # `[..., 1]`, standard deviation of log steps


def fit_bounded(log_batch, log_steps, mask, bound, start=None, num_rounds=3, num_iterations=6) -> BoundedHyperbolas:
    """Fits each row to measured points and bounds.

    Args:
      log_batch, log_steps: `[..., n]`; where `bound` is True, `log_steps` is a lower bound.
      mask: `[..., n]`, True where steps were measured.
      bound: `[..., n]`, True where the steps are more than `log_steps`; never True where `mask` is.
      start, num_rounds, num_iterations: of a first fit, to the measured points only; this fit starts from it.
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
    """`hyperbolas.deviance` of a fit with bounds: how much worse than the fit a given log B_crit is."""
    worse = _loss_at(log_b_crit, fit, log_batch, log_steps, mask, bound)
    best = _loss_at(fit.hyperbolas.log_b_crit, fit, log_batch, log_steps, mask, bound)
    return 2.0 * np.maximum(worse - best, 0.0) / fit.noise[..., 0] ** 2


def fit_rows(log_batch, log_steps, mask, bound, start=None, num_rounds=3, num_iterations=6) -> Hyperbolas:
    """Fits rows `[..., G, n]`: rows with a bound by `fit_bounded`, the others by `fit_hyperbolas`.

    `mask` and `bound` are `[G, n]`.
    """
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
    for field, changed, per_point in zip(
        fits, bounded, (0, 0, 1, 0, 1, 1), strict=True
    ):  # 1: the field has a last axis
        whole = np.broadcast_to(field, (*fits.log_b_crit.shape, *field.shape[field.ndim - per_point :])).copy()
        whole[(..., rows, slice(None)) if per_point else (..., rows)] = changed
        merged.append(whole)
    return Hyperbolas(*merged)


def loss_of(residuals, mask, bound, limit, noise) -> np.ndarray:
    """Loss of each point: Huber's where steps were measured, -noise²·log probability where there is a bound."""
    size = np.abs(residuals)
    clipped = np.minimum(size, limit)
    measured = mask * clipped * (size - 0.5 * clipped)
    return measured - bound * noise**2 * special.log_ndtr(np.clip(-residuals / noise, -1e6, None))


def pull_of(residuals, mask, bound, limit, noise) -> tuple[np.ndarray, np.ndarray]:
    """For each point, minus the derivative of its loss by its fitted value, and the curvature for a Newton step."""
    z = np.clip(residuals / noise, -30.0, 1e6)
    hazard = np.exp(-0.5 * z**2 - 0.5 * np.log(2 * np.pi) - special.log_ndtr(-z))
    weights = mask * (huber_weights(residuals, limit) if np.isfinite(limit).any() else 1.0)
    curvature = np.clip(hazard * (hazard - z), 0.0, 1.0)
    held_back = np.minimum(1.0, limit / np.maximum(noise * hazard, 1e-300))
    return weights * residuals + bound * noise * hazard * held_back, weights + bound * curvature * held_back


def noise_of(residuals, mask, limit, num_parameters: int, axis: int | tuple[int, ...] = -1) -> np.ndarray:
    """Standard deviation of log steps along `axis`, with outliers clipped at `limit`; keeps the axis."""
    count = mask.sum(axis, keepdims=True)
    pull = mask * np.clip(residuals, -limit, limit)
    inside = (mask & (np.abs(residuals) <= limit)).sum(axis, keepdims=True) / count
    variance = (pull**2).sum(axis, keepdims=True) / np.maximum(count - num_parameters, 1) / np.maximum(inside, 0.5)
    return np.maximum(np.sqrt(variance), SMALLEST_NOISE)


def _parts(mask, bound) -> Iterator[tuple[np.ndarray, bool]]:
    """(rows, whether they have bounds): few rows at a time, because arrays in a core's cache are faster."""
    with_bounds = np.zeros(len(mask), bool) if bound is None else bound.any(-1)
    for alike in (False, True):
        rows = np.flatnonzero(with_bounds == alike)
        for part in np.array_split(rows, -(-len(rows) * mask.shape[-1] // _AT_ONCE)) if rows.size else ():
            yield part, alike


def _fitted(log_batch, log_steps, mask, bound) -> tuple[Hyperbolas, Callable[[np.ndarray], np.ndarray]]:
    """The fits of rows that all have bounds, or all none (`bound` is None), and their deviance at log B_crit."""
    if bound is None:
        fits = fit_hyperbolas(log_batch, log_steps, mask)
        return fits, functools.partial(deviance, fit=fits, log_batch=log_batch, log_steps=log_steps, mask=mask)
    bounded = fit_bounded(log_batch, log_steps, mask, bound)
    return bounded.hyperbolas, functools.partial(
        deviance_with_bounds, fit=bounded, log_batch=log_batch, log_steps=log_steps, mask=mask, bound=bound
    )


def _fit_alike(log_batch, log_steps, mask, confidence, bound) -> list[Tradeoff]:
    fits, deviance_at = _fitted(log_batch, log_steps, mask, bound)
    bound = np.zeros_like(mask) if bound is None else bound
    lows, highs = profile_intervals(fits.log_b_crit, deviance_at, log_batch, mask, confidence)
    flags = one_sided(fits.log_b_crit, deviance_at, log_batch, mask)
    covariances = log_covariances(fits, log_batch, mask)
    shapes = fit_shapes(log_batch, log_steps, mask, confidence)
    return [
        Tradeoff(
            s_min=float(np.exp(fits.log_s_min[row])),
            e_min=float(np.exp(fits.log_s_min[row] + fits.log_b_crit[row])),
            b_crit=float(np.exp(fits.log_b_crit[row])),
            b_crit_interval=(float(np.exp(lows[row])), float(np.exp(highs[row]))),
            one_sided=bool(flags[row]),
            confidence=confidence,
            batch_tokens=np.exp(log_batch[row, mask[row]]),
            steps=np.exp(log_steps[row, mask[row]]),
            residuals=fits.residuals[row, mask[row]],
            bound_batch_tokens=np.exp(log_batch[row, bound[row]]),
            bound_steps=np.exp(log_steps[row, bound[row]]),
            log_covariance=covariances[row],
            shape=shapes[row],
        )
        for row in range(len(mask))
    ]


def _checked(batch_tokens, steps, steps_tried) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    batch_tokens, steps = np.asarray(batch_tokens, float), np.asarray(steps, float)
    tried = np.full(steps.shape, np.nan) if steps_tried is None else np.asarray(steps_tried, float)
    if batch_tokens.ndim != 1 or not batch_tokens.shape == steps.shape == tried.shape:
        raise ValueError(
            f"batch_tokens {batch_tokens.shape}, steps {steps.shape} and steps_tried {tried.shape} must be lists of "
            "equal length"
        )
    for name, values in (("batch_tokens", batch_tokens), ("steps", steps), ("steps_tried", tried)):
        missing = np.isnan(values) & (name != "batch_tokens")
        bad = np.flatnonzero(~(missing | (np.isfinite(values) & (values > 0))))
        if bad.size:
            raise ValueError(f"{name}[{bad[0]}] is {values[bad[0]]:g}; must be positive and finite")
    distinct = np.unique(batch_tokens[np.isfinite(steps)]).size
    if distinct < 3:
        raise ValueError(
            f"runs at {distinct} distinct batch sizes reached the loss, but fitting S_min and B_crit needs at least 3"
        )
    return batch_tokens, steps, tried


def _loss_at(log_b_crit, fit: BoundedHyperbolas, log_batch, log_steps, mask, bound) -> np.ndarray:
    """Huber's loss of the measured points minus noise² · log probability of the bounds, at the best log S_min."""
    overhead, _ = log_overhead(np.asarray(log_b_crit)[..., None], log_batch)
    limit, remainder = fit.hyperbolas.limit, log_steps - overhead
    level = (mask * remainder).sum(-1, keepdims=True) / mask.sum(-1, keepdims=True)
    for _ in range(NUM_ITERATIONS):
        pull, weights = pull_of(remainder - level, mask, bound, limit, fit.noise)
        level = level + np.clip(pull.sum(-1, keepdims=True) / weights.sum(-1, keepdims=True), -2.0, 2.0)
    return loss_of(remainder - level, mask, bound, limit, fit.noise).sum(-1)
