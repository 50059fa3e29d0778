"""Squared norms of gradients: of all parameters or by group, in other metrics, and recorded in the backward pass.

*Recorded* norms are those of gradients that nobody keeps. A parameter comes to the loss with a zero, whose cotangent
becomes the norm. Of single examples: `taps` are layers that know each example's gradient (`Tapped`). Of a device that
holds shards of the parameters, FSDP written by hand under shard_map: the backward pass of `all_gather` has the device's
own gradient of the whole parameter for a moment, before the reduce-scatter (`Shard`).
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from scaling_jax.noise_scale.accumulate import (
    Split,
    axes_of,
    examples_of,
    left_to_xla,
    mark_varying,
    mean_over_devices,
    path_name,
    varying,
)

SCATTER = "noise_scale_reduce_scatter"
GATHER = "noise_scale_all_gather"  # by this name `losses` finds gathers in a loss


class Tapped(NamedTuple):
    """A parameter and its probe: (B,) float32 zeros, one per example of the microbatch."""

    value: jax.Array
    probe: jax.Array

    def astype(self, dtype) -> "Tapped":
        """Cast the value; the probe stays float32."""
        return Tapped(self.value.astype(dtype), self.probe)


def sq_norm(tree: Any) -> jax.Array:
    """Squared Euclidean norm of a pytree, accumulated in float32 or wider."""
    return sum((sum_of_squares(x) for x in jax.tree.leaves(tree)), start=jnp.float32(0))


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
        return sum((jnp.sum(x) for x in sq_norms.values()), start=jnp.float32(0))
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
        return sum(jax.tree.leaves(products), start=jnp.float32(0))

    return norm


class Gathering(NamedTuple):
    """How a loss gathers a parameter."""

    axes: tuple[str, ...]  # mapped axes along which it lies in shards
    in_loop: bool  # in a scan over its leading axis, a layer at a time


class Shard(NamedTuple):
    """A device's shard of a parameter, with a float32 zero: (), or (L,) for L layers that the loss scans over."""

    value: jax.Array
    probe: jax.Array

    def astype(self, dtype) -> "Shard":
        """Cast the value; the probe stays float32."""
        return Shard(self.value.astype(dtype), self.probe)


def all_gather(w_shard, axis_name: str | tuple[str, ...], axis: int = 0):
    """The whole parameter from its shards; the gradient goes back as a reduce-scatter. Use it in the loss.

    With it `value_and_grad` measures sharded parameters too, each device's gradient as a small batch. Outside of
    `value_and_grad` it is `jax.lax.all_gather(..., tiled=True)`.

    Args:
      w_shard: this device's shard: an array, or what `value_and_grad` passes to the loss in place of one; or a pytree
        of them. Cast it before by its `astype`, or cast the result.
      axis_name: mapped axis, or axes, along which the parameter lies in shards.
      axis: dimension of the parameter that is cut into shards.

    Returns:
      The whole parameter, an array; for `method="per_example"` a `Tapped`, to be passed on to the other taps.
    """
    axes = axes_of(axis_name)

    def gather(w):
        if isinstance(w, Shard):
            return _gather(axes, axis, w.value, w.probe)
        if isinstance(w, Tapped):  # the taps record the norms of single examples
            return Tapped(_gather(axes, axis, w.value, None), w.probe)
        return _gather(axes, axis, w, None)

    return jax.tree.map(gather, w_shard, is_leaf=lambda x: isinstance(x, (Shard, Tapped)))


def gather_all(params, shards: Sequence[tuple[int, tuple[str, ...]] | None]):
    """`all_gather` of each parameter that has a (dimension, axes) in `shards`."""
    leaves, tree = jax.tree.flatten(params, is_leaf=lambda x: isinstance(x, (Shard, Tapped)))
    pairs = zip(leaves, shards, strict=True)
    return jax.tree.unflatten(tree, [x if shard is None else all_gather(x, shard[1], shard[0]) for x, shard in pairs])


def with_example_norms(loss_of: Callable, params, batch, tapped: Callable[[str], bool], stacked):
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

    value, (grads, sq_norms) = _with_probes(Tapped, loss_of, params, batch, probes)
    # Each example has weight 1/B in the mean loss, so its own squared norm is B² times the tapped one.
    return value, grads, {name: batch_size * jnp.sum(x, axis=-1) for name, x in sq_norms.items()}


def with_own_norms(loss_of: Callable, params, batch, gathered: Mapping[str, Gathering], stacked):
    """`loss_of`'s value and gradients, and {path: squared norm of this device's own gradient of the whole parameter}.

    Args:
      loss_of: `(params, batch) -> (loss, aux)`; it gets a `Shard` in place of each gathered parameter.
      gathered: by path, the parameters that `loss_of` gathers.
      stacked: parameter path -> True if the leading axis counts layers that the loss scans over.
    """
    leaves = [(path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(params)]
    probes = {
        name: mark_varying(jnp.zeros(x.shape[:1] if gathered[name].in_loop or stacked(name) else ()), varying(x))
        for name, x in leaves
        if name in gathered
    }

    value, (grads, recorded) = _with_probes(Shard, loss_of, params, batch, probes)
    recorded = {name: x if stacked(name) else jnp.sum(x) for name, x in recorded.items()}
    return value, grads, leaf_sq_norms(grads, stacked) | recorded


def _with_probes(kind: type[Tapped] | type[Shard], loss_of: Callable, params, batch, probes: Mapping[str, jax.Array]):
    """`(value, (grads, cotangents of the probes))`; the loss gets a `kind` in place of each parameter with a probe."""

    def probed(params, probes):
        def wrap(path, x):
            return kind(x, probes[path_name(path)]) if path_name(path) in probes else x

        return loss_of(jax.tree_util.tree_map_with_path(wrap, params), batch)

    return jax.value_and_grad(probed, argnums=(0, 1), has_aux=True)(params, probes)


def means_over_devices(rest, grads, split: Split, gathered: Mapping[str, Gathering]):
    """(rest, grads) averaged over the devices. The gradient of a gathered parameter is a sum over devices already."""
    if not gathered:
        return mean_over_devices((rest, grads), split)
    leaves, tree = jax.tree_util.tree_flatten_with_path(grads)
    whole = {name: g for path, g in leaves if (name := path_name(path)) not in gathered}
    rest, whole = mean_over_devices((rest, whole), split)

    def mean(name, g):
        axes = gathered[name].axes
        others = tuple(axis for axis in split.axes if axis not in axes)
        g = g / jax.lax.axis_size(axes)
        return jax.lax.pmean(g, others) if others else g

    means = [whole[name] if (name := path_name(path)) in whole else mean(name, g) for path, g in leaves]
    return rest, jax.tree.unflatten(tree, means)


def whole_norms(sq_norms: Mapping[str, jax.Array], gathered: Mapping[str, Gathering], groups) -> Any:
    """`add_up` of the leaf norms of averaged gradients; norms of shards are added over devices, as one number each."""
    total: Any = {} if groups else jnp.float32(0)
    along = {name: gathered[name].axes if name in gathered else () for name in sq_norms}
    for axes in sorted(set(along.values())):
        part = add_up({name: x for name, x in sq_norms.items() if along[name] == axes}, groups)
        if axes:
            part = jax.lax.psum(part, axes)
        total = {k: total.get(k, 0.0) + part.get(k, 0.0) for k in total | part} if groups else total + part
    return total


def is_norm_layer(name: str) -> bool:
    """True for the parameter path of a LayerNorm or RMSNorm: one of its parts contains "norm" or starts with "ln"."""
    return any("norm" in part.lower() or part.lower().startswith("ln") for part in name.split("/"))


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

    _, _, tapped = with_example_norms(
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


def _all_gather(x, axes, axis):
    return jax.lax.all_gather(x, axes, axis=axis, tiled=True)


def _reduce_scatter(gradient, axes, axis):
    return jax.lax.psum_scatter(gradient, axes, scatter_dimension=axis, tiled=True)


_all_gather.__name__, _reduce_scatter.__name__ = GATHER, SCATTER
_named, _named_scatter = (jax.jit(fn, static_argnums=(1, 2)) for fn in (_all_gather, _reduce_scatter))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(axes, axis, shard, probe):
    return _named(shard, axes, axis)


def _gather_fwd(axes, axis, shard, probe):
    return _gather(axes, axis, shard, probe), (shard, probe)


def _gather_bwd(axes, axis, residuals, gradient):
    shard, probe = residuals
    sq_norm = None if probe is None else sum_of_squares(gradient, keep_first=probe.ndim == 1).astype(jnp.float32)

    def scatter(gradient):
        return (_named_scatter(gradient, axes, axis),)

    return *left_to_xla(scatter, gradient, like=(shard,)), sq_norm


_gather.defvjp(_gather_fwd, _gather_bwd)


def sum_of_squares(x, keep_first=False):
    # Not jnp.vdot: TPUs and GPUs may round the inputs of a dot product to bfloat16 or tf32.
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)
    return jnp.sum(squares, axis=tuple(range(int(keep_first), x.ndim)))
