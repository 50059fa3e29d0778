"""The noise scale of a series of steps, with a confidence interval.

The interval is Fieller's (1954). The covariance of the two means comes from the lowest frequencies of the series, so
neighbouring steps may be correlated. A short correlated series and a skewed one make it too narrow; then the estimate
has a warning.
"""

import dataclasses
import math

import numpy as np

MAX_RELATIVE_BIAS = 0.03  # of the long-run variance, for an AR(1) as persistent as the series

# About where the 95 % interval began to hold the truth in less than 90 % of simulated series (docs/noise_scale.md):
HIGH_AUTOCORRELATION = 0.5  # between neighbouring steps; it matters if the steps are few
FEW_STEPS, FEW_EFFECTIVE_STEPS = 50, 6
MAX_SQ_SKEWNESS = 0.1  # per step: the mean of T steps has skewness²/T, and 0.1 is too far from normal


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A noise scale tr(Σ)/|G|² with its confidence interval, in examples.

    If the data can't tell |G|² from zero, the noise scale has no upper bound. Then `resolved` is False, `value` is NaN
    and `high` is inf. The noise scale is at least `low` with the stated confidence.
    """

    value: float
    low: float
    high: float
    resolved: bool
    confidence: float
    grad_sq_norm: float  # mean |G|² over the steps
    trace_cov: float  # mean tr(Σ) over the steps
    steps: int  # steps that were averaged
    effective_steps: float  # number of independent steps with the same information
    flagged_steps: int  # steps left out because a moment was NaN or infinite
    warning: str | None = None  # why the interval may be too narrow; None if the series gives no reason

    def scaled(self, factor: float) -> "Estimate":
        """The same estimate in other units; in tokens if `factor` is the tokens per example."""
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
      g2_series: (T,) unbiased |G|² per step; keep negative values.
      tr_series: (T,) unbiased tr(Σ) per step.
      confidence: of the two-sided interval.

    Returns:
      An `Estimate` in examples; `.scaled(tokens per example)` gives tokens. It is unresolved if the interval has no
      upper end, or if |G|² or tr(Σ) is significantly negative. It has a warning if the series is short and correlated,
      or skewed by a few extreme steps.

    Raises:
      ValueError: if the series differ in shape, or confidence isn't between 0 and 1.
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
    low, high, resolved, effective_steps, warning = 0.0, math.inf, False, float(num_steps), None
    if num_steps >= 3:
        long_run_cov, dof = long_run_covariance(tr_g2_Tx2)
        t = float(stdtrit(dof, 0.5 + confidence / 2))
        low, high, resolved = fieller(trace_cov, grad_sq_norm, long_run_cov / num_steps, t)
        if resolved and (grad_sq_norm < 0 or high < 0):
            low, high, resolved = 0.0, math.inf, False
        low = max(low, 0.0)  # a noise scale is never negative
        effective_steps = _effective_steps(tr_g2_Tx2, long_run_cov)
        warning = _warning(tr_g2_Tx2)
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
        warning=warning,
    )


def fieller(numerator: float, denominator: float, cov: np.ndarray, t: float) -> tuple[float, float, bool]:
    """Fieller's set {θ : (S − θQ)² ≤ t²·Var(S − θQ)} for θ = S/Q, as (low, high, bounded).

    Args:
      numerator, denominator: the estimates S and Q.
      cov: their (2, 2) covariance, (S, Q) order.
      t: critical value of Student's t.

    Returns:
      The set is bounded exactly when Q² > t²·Var(Q). For an unbounded set, the result describes its part in [0, ∞):
      (low, inf, False), with low = 0 if the set has no positive lower bound.
    """
    a = denominator**2 - t**2 * cov[1, 1]
    half_b = numerator * denominator - t**2 * cov[0, 1]
    c = numerator**2 - t**2 * cov[0, 0]
    root = math.sqrt(max(half_b**2 - a * c, 0.0))  # where a > 0, only rounding makes it negative
    if a > 0:
        return (half_b - root) / a, (half_b + root) / a, True
    # The parabola opens downwards and its roots have both signs: the set is [positive root, ∞) and a part below zero.
    # half_b + root is zero only where Q and its variance are; then nothing is known.
    return (c / (half_b + root) if c > 0 and half_b + root > 0 else 0.0), math.inf, False


def long_run_covariance(series_TxC: np.ndarray) -> tuple[np.ndarray, int]:
    """Covariance (C, C) of √T·(mean of a stationary series), and its degrees of freedom K.

    Raises:
      ValueError: for fewer than 3 steps.
    """
    from scipy.fft import dct

    num_steps = len(series_TxC)
    if num_steps < 3:
        raise ValueError(f"{num_steps} steps are too few for an interval: pass at least 3")
    spectrum_TxC = dct(series_TxC - series_TxC.mean(0), norm="ortho", axis=0)
    dof = _degrees_of_freedom(series_TxC)
    low_KxC = spectrum_TxC[1 : dof + 1]
    return low_KxC.T @ low_KxC / dof, dof


def autocorrelation_time(series: np.ndarray) -> float:
    """1 + 2·Σ autocorrelations, at least 1. The sum takes lags in pairs and stops at a negative pair (Geyer 1992)."""
    centred = series - series.mean()
    num_steps = len(series)
    power = np.abs(np.fft.rfft(centred, 2 * num_steps)) ** 2
    autocov = np.fft.irfft(power)[:num_steps]
    if autocov[0] <= 0:
        return 1.0
    pairs = (autocov[: num_steps // 2 * 2] / autocov[0]).reshape(-1, 2).sum(1)
    ends = np.flatnonzero(pairs <= 0)
    pairs = np.minimum.accumulate(pairs[: ends[0] if len(ends) else None])
    return max(1.0, 2 * float(pairs.sum()) - 1)


def _effective_steps(tr_g2_Tx2, long_run_cov):
    direction = _linearised_ratio(tr_g2_Tx2)
    one_step = direction @ np.cov(tr_g2_Tx2.T) @ direction
    long_run = direction @ long_run_cov @ direction
    return float(len(tr_g2_Tx2) * one_step / long_run) if long_run > 0 else float(len(tr_g2_Tx2))


def _linearised_ratio(tr_g2_Tx2):
    # Near its mean, the ratio of means S/Q moves as Q̄·S − S̄·Q, up to a factor.
    trace_cov, grad_sq_norm = tr_g2_Tx2.mean(0)
    return np.array([grad_sq_norm, -trace_cov])


def _warning(tr_g2_Tx2) -> str | None:
    num_steps = len(tr_g2_Tx2)
    series = (tr_g2_Tx2 - tr_g2_Tx2.mean(0)) @ _linearised_ratio(tr_g2_Tx2)
    spread = series.std()
    if not spread > 1e-12 * np.abs(tr_g2_Tx2).max(0).prod():  # constant but for rounding
        return None
    series = series / spread
    correlation = float(series[1:] @ series[:-1]) / num_steps
    # In a short series the sample's correlation is too small, by (1 + 4ρ)/T (Kendall 1954).
    unbiased = min(correlation + (1 + 4 * correlation) / num_steps, 1.0)
    effective = num_steps * (1 - unbiased) / (1 + unbiased)
    reasons = []
    if unbiased > HIGH_AUTOCORRELATION and (num_steps < FEW_STEPS or effective < FEW_EFFECTIVE_STEPS):
        reasons.append(f"{num_steps:,} steps with an autocorrelation of {unbiased:.2f} are few")
    # Skewness of what is new in each step: correlation hides it in the series, but not in the mean.
    new = series[1:] - max(correlation, 0.0) * series[:-1]
    new = (new - new.mean()) / (new.std() or 1.0)
    skewness = float(np.mean(new**3))
    if skewness**2 > max(MAX_SQ_SKEWNESS * num_steps, 2.0):  # below 2, chance alone does it in 20 steps
        reasons.append(f"few of the {num_steps:,} steps dominate (skewness {abs(skewness):.1f})")
    return "the interval may be too narrow: " + "; ".join(reasons) if reasons else None


def _degrees_of_freedom(series_TxC):
    # For an AR(1) of coefficient r, the spectrum at a low frequency ω is the spectrum at zero times
    # 1 − (ω²/2)·2r/(1 − r)², to second order. Its mean over the K lowest frequencies ω = πk/T is the spectrum at zero
    # times 1 − (π²K²/6T²)·2r/(1 − r)².
    num_steps = len(series_TxC)
    time = max(autocorrelation_time(column) for column in series_TxC.T)
    r = (time - 1) / (time + 1)
    if r <= 0:
        return num_steps - 1
    dof = num_steps * (1 - r) * math.sqrt(3 * MAX_RELATIVE_BIAS / (math.pi**2 * r))
    return int(min(max(dof, 2), num_steps - 1))
