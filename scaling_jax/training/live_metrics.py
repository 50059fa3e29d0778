"""The noise scales that a live ramp can follow besides tr(Σ)/|G|²: each measured at a look, on sequences of its own.

`METRICS` says how; `ramp.next_stage` reads what comes out.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import optax

from scaling_jax.errors import UserError
from scaling_jax.models import ModelConfig
from scaling_jax.noise_scale import Moments, adam_norms, curvature, geometries, value_and_grad
from scaling_jax.training.program import TrainState, batch_loss
from scaling_jax.training.ramp import Metric

PARTS = 8  # gradients that a measurement compares
Measured = geometries.NormBounds | Moments


def measure(model: ModelConfig, metric: Metric, state: TrainState, tokens_BxT1) -> list[float]:
    """Bounds in a norm, or moments, whose noise scale counts in tokens.

    Args:
      metric: any but "simple", which training steps measure.
      tokens_BxT1: B a multiple of 16; the batch that the next step trains on would bias it.

    Raises:
      UserError: for one of Adam's metrics if the optimizer keeps no second moments.
    """
    found = _compile(model, metric)(state.params, state.opt_state, tokens_BxT1)
    values, context = [float(x) for x in found], model.context
    if isinstance(found, geometries.NormBounds):
        noise, grad_low, grad_high = values
        return [noise * math.sqrt(context), grad_low, grad_high]
    small_sq_norm, big_sq_norm, small_batch, big_batch = values
    return [small_sq_norm, big_sq_norm, small_batch * context, big_batch * context]


@functools.cache
def _compile(model: ModelConfig, metric: Metric):
    return jax.jit(METRICS[metric](batch_loss(model)))


def _l1(loss: Callable) -> Callable[..., Measured]:
    in_l1 = geometries.l1(loss, num_microbatches=PARTS)
    return lambda params, opt_state, tokens_BxT1: in_l1(params, tokens_BxT1)


def _spectral(loss: Callable) -> Callable[..., Measured]:
    """Of the matrices inside layers, which are those that Muon orthogonalises."""

    def in_layers(name: str) -> bool:
        return name.startswith("layers/")

    in_spectral = geometries.spectral(loss, num_microbatches=PARTS, stacked=in_layers, select=in_layers)
    return lambda params, opt_state, tokens_BxT1: in_spectral(params, tokens_BxT1)


def _curvature(loss: Callable) -> Callable[..., Measured]:
    """tr(HΣ)/(GᵀHG): the first half of the sequences makes the gradients, the second the Hessian."""

    def measured(params, opt_state, tokens_BxT1):
        half = len(tokens_BxT1) // 2
        norm = curvature(loss, params, tokens_BxT1[half:])
        return _moments(loss, norm, params, tokens_BxT1[:half])

    return measured


def _adam(which: str, loss: Callable) -> Callable[..., Measured]:
    """In the metric of Adam's second moments; their bias correction is a factor that drops out of the ratio."""

    def measured(params, opt_state, tokens_BxT1):
        nu = optax.tree_utils.tree_get(opt_state, "nu")
        if len(jax.tree.leaves(nu)) != len(jax.tree.leaves(params)):
            raise UserError(f"live_ramp.metric = {which!r} takes second moments of every parameter: train with adam")
        norms = adam_norms(nu)
        return _moments(loss, lambda grads: norms(grads)[which], params, tokens_BxT1)

    return measured


def _moments(loss: Callable, norm: Callable[[Any], jax.Array], params, tokens_BxT1) -> Moments:
    (_, moments), _ = value_and_grad(loss, num_microbatches=PARTS, norm=norm)(params, tokens_BxT1)
    return moments


METRICS: dict[Metric, Callable[[Callable], Callable[..., Measured]]] = {
    "l1": _l1,
    "spectral": _spectral,
    "curvature": _curvature,
    "adam_half": functools.partial(_adam, "adam_half"),
    "adam_full": functools.partial(_adam, "adam_full"),
}
