"""Fieller's interval for a ratio of two means whose terms may be correlated from step to step.

The long-run covariance is the average of the lowest K cosine-transform periodogram ordinates, which gives a Student t
of K degrees of freedom (Lazarus, Lewis, Stock & Watson 2018, "HAR Inference", eq. 10). K falls with the measured
autocorrelation; without any it is T − 1, where the estimate is the ordinary sample covariance.
"""

import math

import numpy as np

MAX_RELATIVE_BIAS = 0.03  # of the long-run variance, under an AR(1) as persistent as the series


def fieller(numerator: float, denominator: float, cov: np.ndarray, t: float) -> tuple[float, float, bool]:
    """Fieller's set {θ : (S − θQ)² ≤ t²·Var(S − θQ)} for θ = S/Q, as (low, high, bounded).

    Args:
      numerator, denominator: the estimates S and Q.
      cov: their (2, 2) covariance, (S, Q) order.
      t: critical value of Student's t.

    Returns:
      Bounded exactly when Q² > t²·Var(Q). Unbounded sets are given by their part in [0, ∞): (low, inf, False), where
      low is 0 if the set holds no positive lower bound.
    """
    a = denominator**2 - t**2 * cov[1, 1]
    half_b = numerator * denominator - t**2 * cov[0, 1]
    c = numerator**2 - t**2 * cov[0, 0]
    root = math.sqrt(max(half_b**2 - a * c, 0.0))  # negative only by rounding where a > 0
    if a > 0:
        return (half_b - root) / a, (half_b + root) / a, True
    # Opening downwards with roots of either sign, the set is [positive root, ∞) and a part below zero.
    return (c / (half_b + root) if c > 0 else 0.0), math.inf, False


def long_run_covariance(series_TxC: np.ndarray) -> tuple[np.ndarray, int]:
    """Covariance of √T·(mean of a stationary series), (C, C), and its degrees of freedom K.

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
    """1 + 2·Σ autocorrelations, summed over pairs of lags until a pair turns negative (Geyer 1992); at least 1."""
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


def _degrees_of_freedom(series_TxC):
    # An AR(1) of coefficient r bends the spectrum at zero by a factor 1 − (ω²/2)·2r/(1 − r)² to second order, and its
    # mean over the K lowest frequencies ω = πk/T by 1 − (π²K²/6T²)·2r/(1 − r)².
    num_steps = len(series_TxC)
    time = max(autocorrelation_time(column) for column in series_TxC.T)
    r = (time - 1) / (time + 1)
    if r <= 0:
        return num_steps - 1
    dof = num_steps * (1 - r) * math.sqrt(3 * MAX_RELATIVE_BIAS / (math.pi**2 * r))
    return int(min(max(dof, 2), num_steps - 1))
