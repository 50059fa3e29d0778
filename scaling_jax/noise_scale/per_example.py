"""Squared gradient norms of single examples, through `taps`: moments with a small batch of one example.

These are the most precise moments that a batch can give.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from scaling_jax.noise_scale.accumulate import mark_varying, path_name, varying
from scaling_jax.noise_scale.placement import examples_of
from scaling_jax.noise_scale.quadratic_forms import leaf_sq_norms
from scaling_jax.noise_scale.taps import Tapped


def is_norm_layer(name: str) -> bool:
    """True for the parameter path of a LayerNorm or RMSNorm: one of its parts contains "norm" or starts with "ln"."""
    return any("norm" in part.lower() or part.lower().startswith("ln") for part in name.split("/"))


def value_grads_and_norms(loss_of: Callable, params, batch, tapped: Callable[[str], bool], stacked):
    """`loss_of`'s value and gradients, and {path: mean squared gradient norm of the examples} of tapped parameters.

    Args:
      loss_of: `(params, batch) -> (loss, aux)`; it gets `Tapped` in place of each tapped parameter.
      tapped: parameter path -> True if the parameter is tapped.
      stacked: parameter path -> True if the leading axis counts layers that the loss scans over.

    Returns:
      `(value, grads, {path: norm})`; a norm is a float32 scalar, or (L,) if the parameter is stacked.
    """
    batch_size = jax.tree.leaves(batch)[0].shape[0]
    batch_axes = frozenset().union(*map(varying, jax.tree.leaves(batch)))
    zeros_B = mark_varying(examples_of(batch), batch_axes)
    probes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if tapped(name := path_name(path)):
            probes[name] = jnp.tile(zeros_B[None], (leaf.shape[0], 1)) if stacked(name) else zeros_B

    def of_tapped(params, probes):
        def tap(path, leaf):
            return Tapped(leaf, probes[path_name(path)]) if path_name(path) in probes else leaf

        return loss_of(jax.tree_util.tree_map_with_path(tap, params), batch)

    value, (grads, sq_norms) = jax.value_and_grad(of_tapped, argnums=(0, 1), has_aux=True)(params, probes)
    # Each example has weight 1/B in the mean loss, so its own squared norm is B² times the tapped one.
    return value, grads, {name: batch_size * jnp.sum(x, axis=-1) for name, x in sq_norms.items()}


def check_taps(
    loss_fn: Callable,
    params: Any,
    batch: Any,
    *extra,
    stacked: Callable[[str], bool] = lambda name: False,
    rtol: float = 1e-3,
) -> None:
    """Check the taps against `jax.vmap(jax.grad)` on a small batch. Call it once before training.

    Args:
      loss_fn, stacked: as for `value_and_grad(method="per_example")`.
      rtol: relative tolerance of each parameter's mean squared norm; take a few percent for bfloat16 compute.

    Raises:
      ValueError: if the norms of a parameter are wrong, because it isn't tapped or is used twice. Names the parameters.
    """

    def one(example):
        return leaf_sq_norms(jax.grad(loss_fn)(params, jax.tree.map(lambda x: x[None], example), *extra), stacked)

    _, _, tapped = value_grads_and_norms(
        lambda params, batch: (loss_fn(params, batch, *extra), ()), params, batch, lambda name: True, stacked
    )
    wrong = []
    for name, norms in jax.vmap(one)(batch).items():
        got, want = tapped[name], jnp.mean(norms, axis=0)
        if not jnp.all(jnp.abs(got - want) <= rtol * want):
            wrong.append(f"{name} (tapped {jnp.sum(got):.4g}, exact {jnp.sum(want):.4g})")
    if wrong:
        raise ValueError(
            f"per-example norms are wrong for {', '.join(wrong)}: tap every use of a parameter, and use embed_tied and "
            "unembed_tied for a table that is also the output head"
        )
