"""The noise scale of a stretch of training, and how sure we are of it."""

import dataclasses
import math

import numpy as np

from scaling_jax.noise_scale import interval


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A noise scale tr(Σ)/|G|² with its confidence interval, in examples.

    Where |G|² can't be told from zero nothing bounds the noise scale from above: `resolved` is False, `value` is NaN,
    `high` is inf, and "at least `low`" holds with the stated confidence.
    """

    value: float
    low: float
    high: float
    resolved: bool
    confidence: float
    grad_sq_norm: float  # mean |G|² over the steps
    trace_cov: float  # mean tr(Σ) over the steps
    steps: int  # steps that were averaged
    effective_steps: float  # independent steps that would tell as much
    flagged_steps: int  # steps left out because a moment was NaN or infinite

    def scaled(self, factor: float) -> "Estimate":
        """The same estimate in other units: tokens, if `factor` is tokens per example."""
        return dataclasses.replace(
            self,
            value=self.value * factor,
            low=self.low * factor,
            high=self.high * factor,
            trace_cov=self.trace_cov * factor,
        )

    def __str__(self):
        if self.resolved:
            return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"
        return f"unresolved: at least {self.low:.4g}"


def estimate(g2_series, tr_series, confidence: float = 0.95) -> Estimate:
    """The noise scale mean(tr(Σ))/mean(|G|²) of a series of steps, with Fieller's interval.

    Args:
      g2_series: (T,) unbiased |G|² per step, negative values and all.
      tr_series: (T,) unbiased tr(Σ) per step.
      confidence: of the two-sided interval; neighbouring steps may be correlated.

    Returns:
      An `Estimate`. It is unresolved if the interval is unbounded, or if |G|² is significantly negative.

    Raises:
      ValueError: if the series differ in shape, or confidence isn't between 0 and 1.

    Units: examples; `.scaled(tokens per example)` gives tokens. Source: Fieller 1954; `interval` for the covariance.
    """
    from scipy.special import stdtrit

    g2, tr = np.asarray(g2_series, np.float64), np.asarray(tr_series, np.float64)
    if g2.ndim != 1 or g2.shape != tr.shape:
        raise ValueError(f"g2_series and tr_series need one common length, not shapes {g2.shape} and {tr.shape}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence} must lie between 0 and 1")
    finite = np.isfinite(g2) & np.isfinite(tr)
    num_steps = int(finite.sum())
    tr_g2_Tx2 = np.stack([tr[finite], g2[finite]], axis=1)
    trace_cov, grad_sq_norm = map(float, tr_g2_Tx2.mean(0)) if num_steps else (math.nan, math.nan)
    low, high, resolved, effective_steps = 0.0, math.inf, False, float(num_steps)
    if num_steps >= 3:
        long_run_cov, dof = interval.long_run_covariance(tr_g2_Tx2)
        t = float(stdtrit(dof, 0.5 + confidence / 2))
        low, high, resolved = interval.fieller(trace_cov, grad_sq_norm, long_run_cov / num_steps, t)
        if resolved and grad_sq_norm < 0:
            low, high, resolved = 0.0, math.inf, False
        effective_steps = _effective_steps(tr_g2_Tx2, long_run_cov)
    return Estimate(
        value=trace_cov / grad_sq_norm if resolved else math.nan,
        low=low,
        high=high,
        resolved=resolved,
        confidence=confidence,
        grad_sq_norm=grad_sq_norm,
        trace_cov=trace_cov,
        steps=num_steps,
        effective_steps=effective_steps,
        flagged_steps=len(g2) - num_steps,
    )


def _effective_steps(tr_g2_Tx2, long_run_cov):
    # Of the linearised ratio, up to scale: Q̄·S − S̄·Q.
    trace_cov, grad_sq_norm = tr_g2_Tx2.mean(0)
    direction = np.array([grad_sq_norm, -trace_cov])
    one_step = direction @ np.cov(tr_g2_Tx2.T) @ direction
    long_run = direction @ long_run_cov @ direction
    return float(len(tr_g2_Tx2) * one_step / long_run) if long_run > 0 else float(len(tr_g2_Tx2))
