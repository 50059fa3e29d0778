"""Squared norms of gradients, for all parameters or per group, and other quadratic forms of a gradient."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from scaling_jax.noise_scale.accumulate import mark_varying, path_name, varying


def sq_norm(tree: Any) -> jax.Array:
    """Squared Euclidean norm of a pytree, accumulated in float32 or wider."""
    return sum((sum_of_squares(x) for x in jax.tree.leaves(tree)), start=jnp.zeros(()))


def leaf_sq_norms(tree: Any, stacked: Callable[[str], bool]) -> dict[str, jax.Array]:
    """{path: squared norm} of every leaf; for a stacked leaf (L,), one norm per layer."""
    leaves = ((path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree))
    return {name: sum_of_squares(x, keep_first=stacked(name)) for name, x in leaves}


def add_up(sq_norms: Mapping[str, jax.Array], groups: Callable[[str], str] | None) -> Any:
    """Sum of the leaf norms; with `groups`, {group: sum}.

    `groups` maps a parameter path to a group name. It gets each layer of a stacked leaf `layers/query` by itself, as
    `layers/query/0`, `layers/query/1`, ...
    """
    if groups is None:
        return sum((jnp.sum(x) for x in sq_norms.values()), start=jnp.zeros(()))
    total: dict[str, jax.Array] = {}
    for name, value in sq_norms.items():
        for part, sq in [(name, value)] if value.ndim == 0 else [(f"{name}/{i}", x) for i, x in enumerate(value)]:
            total[groups(part)] = total.get(groups(part), 0.0) + sq
    return total


def adam_norms(nu: Any, eps: float = 1e-8) -> Callable[[Any], dict[str, jax.Array]]:
    """A norm that gives both |P^{-1/2}g|² ("adam_half") and |P⁻¹g|² ("adam_full"), with P = √ν̂ + eps.

    "adam_half" gives the noise scale in Adam's own metric, gᵀP⁻¹g; "adam_full" gives that of the update P⁻¹g.

    Args:
      nu: bias-corrected second moments from before this step, a pytree like the parameters. Second moments that
        contain this step's gradient would bias both norms.
      eps: Adam's epsilon.
    """

    def norm(grads):
        precond = jax.tree.map(lambda v: jnp.sqrt(v) + eps, nu)
        half = jax.tree.map(lambda g, p: g / jnp.sqrt(p), grads, precond)
        full = jax.tree.map(lambda g, p: g / p, grads, precond)
        return {"adam_half": sq_norm(half), "adam_full": sq_norm(full)}

    return norm


def curvature(loss_fn: Callable, params: Any, batch: Any, *extra) -> Callable[[Any], jax.Array]:
    """A norm that gives gᵀHg; its noise scale is B_noise = tr(HΣ)/(GᵀHG). Costs a Hessian-vector product per gradient.

    Args:
      loss_fn: `(params, batch, *extra) -> mean loss`.
      batch: data for the Hessian H, independent of the gradients' batch. Devices may hold different parts of it. Each
        device then uses its own H for its small gradients, and the mean of all H for the whole gradient.

    Returns:
      `grads -> float32 scalar`; it may be negative where the loss isn't convex.
    """
    axes = frozenset().union(*map(varying, jax.tree.leaves(batch)))
    params = jax.tree.map(lambda x: mark_varying(x, axes), params)

    def norm(grads):
        tangent = jax.tree.map(lambda g, p: mark_varying(g.astype(p.dtype), varying(p)), grads, params)
        _, hvp = jax.jvp(lambda p: jax.grad(loss_fn)(p, batch, *extra), (params,), (tangent,))
        products = jax.tree.map(lambda g, h: jnp.sum(g.astype(jnp.float32) * h.astype(jnp.float32)), tangent, hvp)
        return sum(jax.tree.leaves(products), start=jnp.zeros(()))

    return norm


def sum_of_squares(x, keep_first=False):
    # Not jnp.vdot: TPUs and GPUs may round the inputs of a dot product to bfloat16 or tf32.
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)
    return jnp.sum(squares, axis=tuple(range(int(keep_first), x.ndim)))
