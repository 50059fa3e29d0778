"""The gradient noise scale of any JAX loss, with a confidence interval. Imports nothing else of scaling_jax."""

from scaling_jax.noise_scale import geometries, taps
from scaling_jax.noise_scale.estimate import Estimate, estimate
from scaling_jax.noise_scale.geometries import every
from scaling_jax.noise_scale.losses import check_mean_loss, fixed_denominator
from scaling_jax.noise_scale.moments import Moments, unbiased, value_and_grad
from scaling_jax.noise_scale.norms import adam_norms, check_taps, curvature, sq_norm
from scaling_jax.noise_scale.tracker import (
    Accumulator,
    AccumulatorState,
    MovingAverage,
    Tracker,
    TrackerState,
    ema,
    tracker,
    windows,
)

__all__ = [
    "Accumulator",
    "AccumulatorState",
    "Estimate",
    "Moments",
    "MovingAverage",
    "Tracker",
    "TrackerState",
    "adam_norms",
    "check_mean_loss",
    "check_taps",
    "curvature",
    "ema",
    "estimate",
    "every",
    "fixed_denominator",
    "geometries",
    "sq_norm",
    "taps",
    "tracker",
    "unbiased",
    "value_and_grad",
    "windows",
]
