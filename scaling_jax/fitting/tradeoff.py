"""The trade-off between optimizer steps and tokens at one loss, and its turning point, B_crit.

McCandlish et al. 2018 (arXiv 1812.06162), eq. 2.11; Kaplan et al. 2020 (arXiv 2001.08361), eq. 5.1 to 5.3.
"""

import dataclasses
import functools
from collections.abc import Callable

import numpy as np
from scipy import special

from scaling_jax.fitting.bounds import deviance_with_bounds, fit_bounded
from scaling_jax.fitting.hyperbolas import (
    NUM_PARAMETERS,
    deviance,
    fit_hyperbolas,
    log_covariances,
    one_sided,
    profile_intervals,
)


@dataclasses.dataclass(frozen=True, eq=False)
class Tradeoff:
    """(S/S_min - 1)(E/E_min - 1) = 1 with E = B·S: steps in optimizer steps, batches and E in tokens."""

    s_min: float
    e_min: float
    b_crit: float  # E_min/S_min: twice the least steps, twice the least tokens
    b_crit_interval: tuple[float, float]  # ends are 0 or infinity where the data reject no smaller or no larger B_crit
    one_sided: bool  # the data don't show batches on both sides of B_crit: read the interval, not the number
    confidence: float
    batch_tokens: np.ndarray = dataclasses.field(repr=False)
    steps: np.ndarray = dataclasses.field(repr=False)
    residuals: np.ndarray = dataclasses.field(repr=False)  # log(steps measured/steps fitted)
    bound_batch_tokens: np.ndarray = dataclasses.field(repr=False)  # runs that ended above the loss
    bound_steps: np.ndarray = dataclasses.field(repr=False)  # and the steps that they had
    log_covariance: np.ndarray = dataclasses.field(repr=False)  # `[2, 2]`, of log s_min and log b_crit

    def steps_at(self, batch_tokens):
        """Steps to the loss at a batch size in tokens, S_min·(1 + B_crit/B)."""
        return self.s_min * (1.0 + self.b_crit / np.asarray(batch_tokens, float))

    def tokens_at(self, batch_tokens):
        """Tokens to the loss at a batch size in tokens, E_min·(1 + B/B_crit)."""
        return self.e_min * (1.0 + np.asarray(batch_tokens, float) / self.b_crit)

    def steps_interval(self, batch_tokens) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the interval of `steps_at`, by the delta method in logs (Student t)."""
        batch_tokens = np.asarray(batch_tokens, float)
        along = np.stack([np.ones_like(batch_tokens), self.b_crit / (self.b_crit + batch_tokens)], axis=-1)
        variance = np.einsum("...i,ij,...j->...", along, self.log_covariance, along)
        t = special.stdtrit(max(self.steps.size - NUM_PARAMETERS, 1), 0.5 + self.confidence / 2)
        factor = np.exp(t * np.sqrt(np.maximum(variance, 0.0)))
        return self.steps_at(batch_tokens) / factor, self.steps_at(batch_tokens) * factor

    def batch_at_overhead(self, overhead: float) -> float:
        """Batch size in tokens that needs (1 + overhead)·E_min tokens; overhead 1 is B_crit itself."""
        return overhead * self.b_crit

    @property
    def cbs20(self) -> float:
        """Batch size in tokens at 20 % over linear scaling (Zhang et al. 2024, arXiv 2410.21676): not B_crit.

        Read off this hyperbola, whose linear scaling is the limit of small batches; Zhang et al. start from the best
        small batch that they ran.
        """
        return self.batch_at_overhead(0.2)


def fit_tradeoff(batch_tokens, steps, *, steps_tried=None, confidence: float = 0.95) -> Tradeoff:
    """Fits S_min and E_min to the steps that runs at several batch sizes took to one loss, robustly in log space.

    Args:
      batch_tokens: `[n]`, tokens per step; a batch size may repeat (seeds).
      steps: `[n]`, optimizer steps to the loss; NaN for a run that ended above it.
      steps_tried: `[n]`, the steps that such a run had: it enters as a bound, steps > steps_tried. Read only where
        `steps` is NaN; NaN there too leaves the run out.
      confidence: of `b_crit_interval`, the set of B_crit that an F test on Huber's loss doesn't reject.

    Raises:
      ValueError: for values that aren't positive and finite, unequal lengths, or steps measured at fewer than three
        distinct batch sizes.
    """
    batch_tokens, steps, tried = _checked(batch_tokens, steps, steps_tried)
    mask = np.isfinite(steps)
    bound = ~mask & np.isfinite(tried)
    log_steps = np.log(np.where(mask, steps, np.where(bound, tried, 1.0)))
    return fit_tradeoffs(np.log(batch_tokens)[None], log_steps[None], mask[None], confidence, bound[None])[0]


def fit_tradeoffs(log_batch, log_steps, mask, confidence: float, bound=None) -> list[Tradeoff]:
    """One fit for each row of `[rows, n]` natural logs; nothing is checked.

    Steps were measured where `mask` is True and are known to be more than `log_steps` where `bound` is.
    """
    bound = np.zeros_like(mask) if bound is None else bound
    tradeoffs: dict[int, Tradeoff] = {}
    for with_bounds in (False, True):
        rows = np.flatnonzero(bound.any(-1) == with_bounds)
        if rows.size:
            found = _fit_alike(
                log_batch[rows], log_steps[rows], mask[rows], confidence, bound[rows] if with_bounds else None
            )
            tradeoffs |= dict(zip(rows.tolist(), found, strict=True))
    return [tradeoffs[row] for row in range(len(mask))]


def _fit_alike(log_batch, log_steps, mask, confidence, bound) -> list[Tradeoff]:
    deviance_at: Callable[[np.ndarray], np.ndarray]
    if bound is None:
        fits = fit_hyperbolas(log_batch, log_steps, mask)
        deviance_at = functools.partial(deviance, fit=fits, log_batch=log_batch, log_steps=log_steps, mask=mask)
        bound = np.zeros_like(mask)
    else:
        bounded = fit_bounded(log_batch, log_steps, mask, bound)
        fits = bounded.hyperbolas
        deviance_at = functools.partial(
            deviance_with_bounds, fit=bounded, log_batch=log_batch, log_steps=log_steps, mask=mask, bound=bound
        )
    lows, highs = profile_intervals(fits.log_b_crit, deviance_at, log_batch, mask, confidence)
    flags = one_sided(fits.log_b_crit, deviance_at, log_batch, mask)
    covariances = log_covariances(fits, log_batch, mask)
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
        )
        for row in range(len(mask))
    ]


def _checked(batch_tokens, steps, steps_tried) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    batch_tokens, steps = np.asarray(batch_tokens, float), np.asarray(steps, float)
    tried = np.full(steps.shape, np.nan) if steps_tried is None else np.asarray(steps_tried, float)
    if batch_tokens.ndim != 1 or not batch_tokens.shape == steps.shape == tried.shape:
        raise ValueError(
            f"batch_tokens {batch_tokens.shape}, steps {steps.shape} and steps_tried {tried.shape} should be lists of "
            "one length"
        )
    for name, values in (("batch_tokens", batch_tokens), ("steps", steps), ("steps_tried", tried)):
        missing = np.isnan(values) & (name != "batch_tokens")
        bad = np.flatnonzero(~(missing | (np.isfinite(values) & (values > 0))))
        if bad.size:
            raise ValueError(f"{name}[{bad[0]}] is {values[bad[0]]:g}; should be positive and finite")
    distinct = np.unique(batch_tokens[np.isfinite(steps)]).size
    if distinct < 3:
        raise ValueError(
            f"{distinct} distinct batch sizes that got there can't show a trade-off of two parameters: give at least 3"
        )
    return batch_tokens, steps, tried
