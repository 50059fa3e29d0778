"""The noise scale of a series of steps: averages of both moments on the device, or offline, and one ratio last."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_jax.noise_scale.estimate import Estimate, estimate
from scaling_jax.noise_scale.moments import Moments, unbiased


class TrackerState(NamedTuple):
    """Exponential moving averages of both moments; all float32 but the counts, which are int32."""

    grad_sq_norm: Any  # not yet debiased
    trace_cov: Any
    weight: jax.Array  # sum of the averages' weights, which debiases them
    steps: jax.Array  # that entered the averages
    flagged_steps: jax.Array  # left out because a moment was NaN or infinite


class Tracker(NamedTuple):
    """A pair of pure functions, as in Optax, and a third to read the state."""

    init: Callable[..., TrackerState]
    update: Callable[[Moments, TrackerState], TrackerState]
    read: Callable[[TrackerState], tuple[Any, Any]]


def tracker(half_life: float) -> Tracker:
    """Follow both moments by debiased moving averages; works under jit, vmap over runs, and scan.

    Args:
      half_life: in steps.

    Returns:
      `init(like=0.0)`: `like` is a pytree like the moments' norms: a scalar, or {group: scalar}.
      `update(moments, state)`: a step with a NaN or infinite moment changes nothing but `flagged_steps`.
      `read(state)`: averaged (|G|², tr(Σ)); their ratio is the noise scale in examples. Zeros before the first step.
    """
    if not half_life > 0:
        raise ValueError(f"half_life={half_life} steps must be positive")
    decay = 0.5 ** (1 / half_life)

    def init(like: Any = 0.0) -> TrackerState:
        def zeros():
            return jax.tree.map(lambda x: jnp.zeros(jnp.shape(x), jnp.float32), like)

        return TrackerState(zeros(), zeros(), jnp.float32(0), jnp.int32(0), jnp.int32(0))

    def update(moments: Moments, state: TrackerState) -> TrackerState:
        new = unbiased(moments)
        finite = jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(new)]).all()

        def average(old, x):
            return jnp.where(finite, decay * old + (1 - decay) * jnp.where(finite, x, 0.0), old)

        grad_sq_norm, trace_cov = jax.tree.map(average, (state.grad_sq_norm, state.trace_cov), new)
        return TrackerState(
            grad_sq_norm,
            trace_cov,
            weight=average(state.weight, 1.0),
            steps=state.steps + finite,
            flagged_steps=state.flagged_steps + ~finite,
        )

    def read(state: TrackerState) -> tuple[Any, Any]:
        weight = jnp.where(state.weight > 0, state.weight, 1.0)
        return jax.tree.map(lambda x: x / weight, (state.grad_sq_norm, state.trace_cov))

    return Tracker(init, update, read)


class MovingAverage:
    """An exponential moving average of one moment, offline, debiased: the weights of what was added sum to 1.

    NaN before the first finite value; values that are NaN or infinite have no weight. `half_life` in steps.
    """

    def __init__(self, half_life: float):
        if not half_life > 0:
            raise ValueError(f"half_life={half_life} steps must be positive")
        self._decay = 0.5 ** (1 / half_life)
        self._total = self._weight = 0.0

    def add(self, value: float) -> float:
        """The average with one more step's value."""
        self._total, self._weight = self._decay * self._total, self._decay * self._weight
        if np.isfinite(value):
            self._total += (1 - self._decay) * value
            self._weight += 1 - self._decay
        return self._total / self._weight if self._weight > 0 else math.nan


def ema(series, half_life: float) -> np.ndarray:
    """`MovingAverage` of one moment after each step, (T,) -> (T,).

    Divide two smoothed moments; never smooth a ratio. `half_life` in steps.
    """
    average = MovingAverage(half_life)
    return np.array([average.add(x) for x in np.asarray(series, np.float64)])


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
