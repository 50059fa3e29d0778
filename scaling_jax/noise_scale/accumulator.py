"""Moments in a loop in which each call has one microbatch, as with `optax.MultiSteps`."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from scaling_jax.noise_scale.accumulate import names, varying, zeros_like
from scaling_jax.noise_scale.moments import Moments
from scaling_jax.noise_scale.quadratic_forms import add_up, leaf_sq_norms


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
        grads = jax.tree.map(lambda x: zeros_like(x, _wide(x.dtype)), params)
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
        axes = self.axis_name if isinstance(self.axis_name, tuple) else (self.axis_name,) if self.axis_name else ()
        tracked = frozenset(axis for axis in axes if axis in varying(jax.lax.axis_index(axis)))
        for name, g in zip(names(grads), jax.tree.leaves(grads), strict=True):
            if missing := tracked - varying(g):
                raise ValueError(
                    f"the gradient of {name!r} is already summed over {sorted(missing)}: pass each device's own, as "
                    "shard_map gives it with check_vma=False"
                )
        grads = jax.tree.map(lambda g: g.astype(_wide(g.dtype)) / loss_scale, grads)
        total = AccumulatorState(
            jax.tree.map(jnp.add, state.grads, grads),
            jax.tree.map(jnp.add, state.small_sq_norm, self._sq_norm(grads)),
            state.weight + (1.0 if weight is None else weight),
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


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)
