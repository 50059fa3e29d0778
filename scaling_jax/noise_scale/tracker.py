"""What a training loop carries along: the sums of a step that takes several calls, and moving averages over steps.

Always average the moments first and divide once at the end; the average of ratios is biased.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_jax.noise_scale.accumulate import axes_of, names, tracked_axes, varying, wide, zeros_like
from scaling_jax.noise_scale.estimate import Estimate, estimate
from scaling_jax.noise_scale.moments import Moments, unbiased
from scaling_jax.noise_scale.norms import add_up, leaf_sq_norms


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
            return jnp.where(finite, decay * old + (1 - decay) * jnp.where(finite, x, 0.0), old).astype(jnp.float32)

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


class AccumulatorState(NamedTuple):
    """Sums over the calls of the current step."""

    grads: Any  # float32 or wider, like the parameters
    small_sq_norm: Any  # a float32 scalar, or {group: scalar}
    weight: jax.Array  # float32
    calls: jax.Array  # int32


@dataclasses.dataclass(frozen=True)
class Accumulator:
    """Two pure functions, `init` and `update`, for a step of several calls. The state takes the memory of one gradient.

        accumulator = sj.noise_scale.Accumulator(num_microbatches=8, microbatch=32)
        state = accumulator.init(params)
        moments, mean_grads, state = accumulator.update(grads, state)  # in each call, with its own gradients

    Attributes:
      num_microbatches: calls in a step.
      microbatch: examples of a call on this device, or under jit over sharded arrays on all devices.
      axis_name: mapped axis (or axes) along which devices hold different examples. `update` then gets each device's own
        gradients, before they are averaged.
      groups, stacked: as for `value_and_grad`.
    """

    num_microbatches: int
    microbatch: int
    axis_name: str | tuple[str, ...] | None = None
    groups: Callable[[str], str] | None = None
    stacked: Callable[[str], bool] = lambda name: False

    def __post_init__(self):
        if self.num_microbatches < 1 or self.microbatch < 1:
            raise ValueError(
                f"num_microbatches={self.num_microbatches} and microbatch={self.microbatch} must be at least 1"
            )
        if self.num_microbatches == 1 and self.axis_name is None:
            raise ValueError("one microbatch on one device is the whole batch: there is nothing to compare")

    def init(self, params) -> AccumulatorState:
        """The state before the first call."""
        grads = jax.tree.map(lambda x: zeros_like(x, wide(x.dtype)), params)
        nothing = jax.tree.map(jnp.zeros_like, jax.eval_shape(self._sq_norm, grads))
        return AccumulatorState(grads, nothing, jnp.float32(0), jnp.int32(0))

    def update(
        self, grads, state: AccumulatorState, *, weight: jax.Array | None = None, loss_scale: jax.Array | float = 1.0
    ) -> tuple[Moments, Any, AccumulatorState]:
        """Adds one call's gradients, as they are before clipping.

        Args:
          grads: of the microbatch's mean loss; with `weight`, of the sum of its weighted losses.
          weight: sum of the microbatch's weights.
          loss_scale: what the loss was multiplied by before it was differentiated.

        Returns:
          (moments, mean gradients of the step, state). Moments and mean gradients are zeros, and so are the moments'
          batch sizes, except in the last call of a step; `tracker` passes over them.

        Raises:
          ValueError: at trace time, if the gradients are already summed over devices.
        """
        tracked = tracked_axes(axes_of(self.axis_name))
        for name, g in zip(names(grads), jax.tree.leaves(grads), strict=True):
            if missing := tracked - varying(g):
                raise ValueError(
                    f"the gradient of {name!r} is already summed over {sorted(missing)}: pass each device's own, as "
                    "shard_map gives it with check_vma=False"
                )
        grads = jax.tree.map(lambda g: g.astype(wide(g.dtype)) / loss_scale, grads)
        total = AccumulatorState(
            jax.tree.map(jnp.add, state.grads, grads),
            jax.tree.map(jnp.add, state.small_sq_norm, self._sq_norm(grads)),
            state.weight + jnp.asarray(1.0 if weight is None else weight, jnp.float32),
            state.calls + 1,
        )
        last = total.calls == self.num_microbatches
        empty = jax.tree.map(zeros_like, total)
        moments, mean = jax.lax.cond(last, self._whole, self._nothing, total)
        return moments, mean, jax.tree.map(lambda zero, x: jnp.where(last, zero, x), empty, total)

    def _sq_norm(self, grads):
        return add_up(leaf_sq_norms(grads, self.stacked), self.groups)

    def _whole(self, total: AccumulatorState):
        sums = total.grads, total.small_sq_norm, total.weight
        grads, small_sq_norm, weight = jax.tree.map(lambda x: x / self.num_microbatches, sums)
        num_devices = 1
        if self.axis_name is not None:
            num_devices = jax.lax.axis_size(self.axis_name)
            grads, small_sq_norm, weight = jax.lax.pmean((grads, small_sq_norm, weight), self.axis_name)
        grads = jax.tree.map(lambda g: g / weight, grads)
        small_sq_norm = jax.tree.map(lambda x: x / jnp.square(weight), small_sq_norm)
        big_batch = self.microbatch * self.num_microbatches * num_devices
        sizes = jnp.float32(self.microbatch), jnp.float32(big_batch)
        return Moments(small_sq_norm, self._sq_norm(grads), *sizes), grads

    def _nothing(self, total: AccumulatorState):
        return jax.tree.map(zeros_like, jax.eval_shape(self._whole, total))
