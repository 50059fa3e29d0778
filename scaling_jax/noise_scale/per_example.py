"""Every example's own squared gradient norm, by taps: the small batch of one that makes the moments sharpest."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from scaling_jax.noise_scale.accumulate import mark_varying, path_name, varying
from scaling_jax.noise_scale.quadratic_forms import leaf_sq_norms
from scaling_jax.noise_scale.taps import Tapped


def is_norm_layer(name: str) -> bool:
    """Whether a parameter path belongs to a LayerNorm or RMSNorm: a part of it holds "norm" or starts with "ln"."""
    return any("norm" in part.lower() or part.lower().startswith("ln") for part in name.split("/"))


def loss_and_leaf_norms(loss_fn, params, batch, extra, *, has_aux, tapped, stacked):
    """A microbatch's loss, gradients and, per tapped parameter, mean squared norm of its examples' own gradients.

    Args:
      loss_fn: `(params, batch, *extra) -> mean loss`, over parameters some of which are `Tapped`.
      tapped, stacked: predicates of the parameter path: which to tap, which have a leading axis of scanned layers.

    Returns:
      `(value, grads, {path: () or, where stacked, (L,) float32})`.
    """
    batch_size = jax.tree.leaves(batch)[0].shape[0]
    batch_axes = frozenset().union(*map(varying, jax.tree.leaves(batch)))
    zeros_B = mark_varying(jnp.zeros(batch_size), batch_axes)
    probes = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        if tapped(name := path_name(path)):
            probes[name] = jnp.tile(zeros_B[None], (leaf.shape[0], 1)) if stacked(name) else zeros_B

    def loss_of(params, probes):
        def tap(path, leaf):
            return Tapped(leaf, probes[path_name(path)]) if path_name(path) in probes else leaf

        return loss_fn(jax.tree_util.tree_map_with_path(tap, params), batch, *extra)

    value, (grads, sq_norms) = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=has_aux)(params, probes)
    # Each example enters the mean loss with weight 1/B, so its own squared norm is B² the tapped one.
    return value, grads, {name: batch_size * jnp.sum(x, axis=-1) for name, x in sq_norms.items()}


def check_taps(
    loss_fn: Callable,
    params: Any,
    batch: Any,
    *extra,
    stacked: Callable[[str], bool] = lambda name: False,
    rtol: float = 1e-3,
) -> None:
    """Compare the taps with `jax.vmap(jax.grad)` on a small batch, parameter by parameter, once before training.

    Args:
      loss_fn, stacked: as for `value_and_grad(method="per_example")`.
      rtol: of each parameter's mean squared norm; a few percent for bfloat16 compute.

    Raises:
      ValueError: naming the parameters whose per-example norms are wrong: untapped, or used twice.
    """

    def one(example):
        return leaf_sq_norms(jax.grad(loss_fn)(params, jax.tree.map(lambda x: x[None], example), *extra), stacked)

    _, _, tapped = loss_and_leaf_norms(
        loss_fn, params, batch, extra, has_aux=False, tapped=lambda name: True, stacked=stacked
    )
    wrong = []
    for name, norms in jax.vmap(one)(batch).items():
        got, want = tapped[name], jnp.mean(norms, axis=0)
        if not jnp.all(jnp.abs(got - want) <= rtol * want):
            wrong.append(f"{name} (tapped {jnp.sum(got):.4g}, exact {jnp.sum(want):.4g})")
    if wrong:
        raise ValueError(f"per-example norms are wrong for {', '.join(wrong)}: tap every use, tie with embed_tied")
