"""Moving averages of both moments over steps, on the device (`tracker`) and offline; the noise scale of windows.

Always average the moments first and divide once at the end; the average of ratios is biased.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_jax.noise_scale.estimate import Estimate, estimate
from scaling_jax.noise_scale.moments import Moments, unbiased


class TrackerState(NamedTuple):
    """Exponential moving averages of both moments. The averages and the weight are float32, the counts int32."""

    grad_sq_norm: Any  # not yet debiased
    trace_cov: Any  # not yet debiased
    weight: jax.Array  # sum of the weights; dividing by it debiases both averages
    steps: jax.Array  # number of steps in the averages
    flagged_steps: jax.Array  # number of steps left out because a moment was NaN or infinite


class Tracker(NamedTuple):
    """Three pure functions: `init` and `update` as in Optax, and `read` for the averages."""

    init: Callable[..., TrackerState]
    update: Callable[[Moments, TrackerState], TrackerState]
    read: Callable[[TrackerState], tuple[Any, Any]]


def tracker(half_life: float) -> Tracker:
    """Debiased exponential moving averages of both moments. Works under jit, under scan and under vmap over runs.

    Args:
      half_life: in steps.

    Returns:
      `init(like=0.0)`: the first state. `like` is a pytree like the moments' norms: a scalar, or {group: scalar}.
      `update(moments, state)`: the next state. If a moment is NaN or infinite, only `flagged_steps` changes; nothing
        changes in a step that wasn't measured (`value_and_grad(every=k)`), whose batch sizes are 0.
      `read(state)`: averages (|G|², tr(Σ)), zeros before the first step. tr(Σ)/|G|² is the noise scale in examples.

    Raises:
      ValueError: if half_life isn't positive.
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
            flagged_steps=state.flagged_steps + (~finite & (moments.small_batch > 0)),
        )

    def read(state: TrackerState) -> tuple[Any, Any]:
        weight = jnp.where(state.weight > 0, state.weight, 1.0)
        return jax.tree.map(lambda x: x / weight, (state.grad_sq_norm, state.trace_cov))

    return Tracker(init, update, read)


class MovingAverage:
    """A debiased exponential moving average of one moment, offline; `half_life` in steps.

    Values that are NaN or infinite get no weight. The average is NaN before the first finite value.
    """

    def __init__(self, half_life: float):
        if not half_life > 0:
            raise ValueError(f"half_life={half_life} steps must be positive")
        self._decay = 0.5 ** (1 / half_life)
        self._total = self._weight = 0.0

    def add(self, value: float) -> float:
        """Adds one step's value and returns the average."""
        self._total, self._weight = self._decay * self._total, self._decay * self._weight
        if np.isfinite(value):
            self._total += (1 - self._decay) * value
            self._weight += 1 - self._decay
        return self._total / self._weight if self._weight > 0 else math.nan


def ema(series, half_life: float) -> np.ndarray:
    """`MovingAverage` of a series of one moment, (T,) -> (T,); `half_life` in steps."""
    average = MovingAverage(half_life)
    return np.array([average.add(x) for x in np.asarray(series, np.float64)])


def windows(g2_series, tr_series, num_steps: int, confidence: float = 0.95) -> list[tuple[int, int, Estimate]]:
    """The noise scale in consecutive windows of `num_steps`: [(first step, step after the last, `Estimate`), ...].

    The last window also takes the remainder.

    Raises:
      ValueError: if a window has fewer than 3 steps, or more than the series.
    """
    if not 3 <= num_steps <= len(g2_series):
        raise ValueError(
            f"windows of {num_steps} steps can't be cut from {len(g2_series)} steps: pass num_steps between 3 and "
            f"{len(g2_series)}"
        )
    starts = range(0, len(g2_series) - num_steps + 1, num_steps)
    stops = [*starts[1:], len(g2_series)]
    return [
        (start, stop, estimate(g2_series[start:stop], tr_series[start:stop], confidence))
        for start, stop in zip(starts, stops, strict=True)
    ]
