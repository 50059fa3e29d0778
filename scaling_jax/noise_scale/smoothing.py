"""Smoothing offline, from the raw series of moments, which are always kept: averages first, one ratio last."""

import numpy as np

from scaling_jax.noise_scale.estimate import Estimate, estimate


def ema(series, half_life: float) -> np.ndarray:
    """Exponential moving average of one moment, (T,) -> (T,), debiased: at step t the weights of steps ≤ t sum to 1.

    Divide two smoothed moments; never smooth a ratio. Steps that are NaN or infinite have no weight; before the first
    finite one the average is NaN. `half_life` in steps.
    """
    if not half_life > 0:
        raise ValueError(f"half_life={half_life} steps must be positive")
    decay = 0.5 ** (1 / half_life)
    total = weight = 0.0
    averages = np.full(len(series), np.nan)
    for t, x in enumerate(np.asarray(series, np.float64)):
        total, weight = decay * total, decay * weight
        if np.isfinite(x):
            total, weight = total + (1 - decay) * x, weight + (1 - decay)
        if weight > 0:
            averages[t] = total / weight
    return averages


def windows(g2_series, tr_series, num_steps: int, confidence: float = 0.95) -> list[tuple[int, int, Estimate]]:
    """The noise scale over consecutive windows: [(first step, step after the last, `Estimate`), ...].

    A remainder shorter than `num_steps` joins the last window.
    """
    if not 3 <= num_steps <= len(g2_series):
        raise ValueError(f"windows of {num_steps} steps: pass between 3 and the series' {len(g2_series)}")
    starts = range(0, len(g2_series) - num_steps + 1, num_steps)
    stops = [*starts[1:], len(g2_series)]
    return [
        (start, stop, estimate(g2_series[start:stop], tr_series[start:stop], confidence))
        for start, stop in zip(starts, stops, strict=True)
    ]
