"""Norms for `value_and_grad(norm=…)` other than |g|²: preconditioned by Adam, and weighted by the curvature.

Any quadratic form q(g) = gᵀAg obeys E q(g_B) = GᵀAG + tr(AΣ)/B, so the same two-batch algebra gives its two moments
without bias (McCandlish et al. 2018, arXiv 1812.06162, eq. 2.7 for A = H), if A doesn't depend on g's own batch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from scaling_jax.noise_scale.accumulate import mark_varying, varying
from scaling_jax.noise_scale.norms import sq_norm


def adam_norms(nu: Any, eps: float = 1e-8) -> Callable[[Any], dict[str, jax.Array]]:
    """A norm giving both |P^{-1/2}g|² ("adam_half") and |P⁻¹g|² ("adam_full"), with P = √ν̂ + eps.

    The first is the noise scale in Adam's own metric, gᵀP⁻¹g; the second that of the update vector P⁻¹g.

    Args:
      nu: bias-corrected second moments, a pytree like the parameters, from before this step: ones that hold the step's
        own gradient would bias both.
      eps: Adam's.
    """

    def norm(grads):
        precond = jax.tree.map(lambda v: jnp.sqrt(v) + eps, nu)
        half = jax.tree.map(lambda g, p: g / jnp.sqrt(p), grads, precond)
        full = jax.tree.map(lambda g, p: g / p, grads, precond)
        return {"adam_half": sq_norm(half), "adam_full": sq_norm(full)}

    return norm


def curvature(loss_fn: Callable, params: Any, batch: Any, *extra) -> Callable[[Any], jax.Array]:
    """The norm gᵀHg, whose noise scale is B_noise = tr(HΣ)/(GᵀHG); one Hessian-vector product per gradient.

    Args:
      loss_fn: `(params, batch, *extra) -> mean loss`.
      batch: data for H, independent of the batch that the gradients come from. Devices may hold different shares:
        each weighs its small gradients by its own Hessian, and the whole gradient is weighed by their mean.

    Returns:
      `grads -> float32 scalar`, which may be negative where the loss isn't convex.
    """
    axes = frozenset().union(*map(varying, jax.tree.leaves(batch)))
    params = jax.tree.map(lambda x: mark_varying(x, axes), params)

    def norm(grads):
        tangent = jax.tree.map(lambda g, p: mark_varying(g.astype(p.dtype), varying(p)), grads, params)
        _, hvp = jax.jvp(lambda p: jax.grad(loss_fn)(p, batch, *extra), (params,), (tangent,))
        products = jax.tree.map(lambda g, h: jnp.sum(g.astype(jnp.float32) * h.astype(jnp.float32)), tangent, hvp)
        return sum(jax.tree.leaves(products), start=jnp.zeros(()))

    return norm
