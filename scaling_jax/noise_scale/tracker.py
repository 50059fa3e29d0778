"""The noise scale so far, kept on the device inside the training state and checkpointed with it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

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
