"""Parameters that lie in shards on the devices, gathered in the loss: FSDP written by hand under shard_map or pmap.

The backward pass of a gather has the device's own gradient of the whole parameter for a moment, between the model's
backward pass and the reduce-scatter. Its squared norm is recorded there, as the cotangent of a zero. Nothing is kept.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from scaling_jax.noise_scale.accumulate import Split, mark_varying, mean_over_devices, path_name, varying
from scaling_jax.noise_scale.placement import left_to_xla
from scaling_jax.noise_scale.quadratic_forms import add_up, leaf_sq_norms, sum_of_squares

GATHER = "noise_scale_all_gather"  # by this name `losses` finds gathers in a loss


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
      w_shard: this device's shard: an array, or what `value_and_grad` passes to the loss in place of one. Cast it
        before by its `astype`, or cast the result.
      axis_name: mapped axis, or axes, along which the parameter lies in shards.
      axis: dimension of the parameter that is cut into shards.

    Returns:
      The whole parameter, an array; for `method="per_example"` a `Tapped`, to be passed on to the other taps.
    """
    axes = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if isinstance(w_shard, Shard):
        return _gather(axes, axis, w_shard.value, w_shard.probe)
    if isinstance(w_shard, tuple):  # Tapped: the taps record the norms of single examples
        whole: Any = w_shard
        return whole._replace(value=_gather(axes, axis, w_shard[0], None))
    return _gather(axes, axis, w_shard, None)


def gather_all(params, shards: Sequence[tuple[int, tuple[str, ...]] | None]):
    """`all_gather` of each parameter that has a (dimension, axes) in `shards`."""
    leaves, tree = jax.tree.flatten(params, is_leaf=lambda x: hasattr(x, "probe"))
    pairs = zip(leaves, shards, strict=True)
    return jax.tree.unflatten(tree, [x if shard is None else all_gather(x, shard[1], shard[0]) for x, shard in pairs])


def value_grads_and_norms(loss_of: Callable, params, batch, gathered: Mapping[str, Any], stacked):
    """`loss_of`'s value and gradients, and {path: squared norm of this device's own gradient of the whole parameter}.

    Args:
      loss_of: `(params, batch) -> (loss, aux)`; it gets a `Shard` in place of each gathered parameter.
      gathered: its keys are the paths of the parameters that `loss_of` gathers.
      stacked: parameter path -> True if the leading axis counts layers that the loss scans over.
    """
    leaves = [(path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(params)]
    probes = {
        name: mark_varying(jnp.zeros(x.shape[:1] if stacked(name) else ()), varying(x))
        for name, x in leaves
        if name in gathered
    }

    def tapped(params, probes):
        def tap(path, x):
            return Shard(x, probes[path_name(path)]) if path_name(path) in probes else x

        return loss_of(jax.tree_util.tree_map_with_path(tap, params), batch)

    value, (grads, recorded) = jax.value_and_grad(tapped, argnums=(0, 1), has_aux=True)(params, probes)
    return value, grads, leaf_sq_norms(grads, stacked) | recorded


def means_over_devices(rest, grads, split: Split, gathered: Mapping[str, tuple[str, ...]]):
    """(rest, grads) averaged over the devices. The gradient of a gathered parameter is a sum over devices already."""
    if not gathered:
        return mean_over_devices((rest, grads), split)
    leaves, tree = jax.tree_util.tree_flatten_with_path(grads)
    whole = {name: g for path, g in leaves if (name := path_name(path)) not in gathered}
    rest, whole = mean_over_devices((rest, whole), split)

    def mean(name, g):
        axes = gathered[name]
        others = tuple(axis for axis in split.axes if axis not in axes)
        g = g / jax.lax.axis_size(axes)
        return jax.lax.pmean(g, others) if others else g

    means = [whole[name] if (name := path_name(path)) in whole else mean(name, g) for path, g in leaves]
    return rest, jax.tree.unflatten(tree, means)


def whole_norms(sq_norms: Mapping[str, jax.Array], gathered: Mapping[str, tuple[str, ...]], groups) -> Any:
    """`add_up` of the leaf norms of averaged gradients; norms of shards are added over devices, as one number each."""
    total: Any = {} if groups else jnp.zeros(())
    for axes in [(), *sorted(set(gathered.values()))]:
        part = add_up({name: x for name, x in sq_norms.items() if gathered.get(name, ()) == axes}, groups)
        if axes:
            part = jax.lax.psum(part, axes)
        total = {k: total.get(k, 0.0) + part.get(k, 0.0) for k in total | part} if groups else total + part
    return total


def _all_gather(x, axes, axis):
    return jax.lax.all_gather(x, axes, axis=axis, tiled=True)


_all_gather.__name__ = GATHER
_named = jax.jit(_all_gather, static_argnums=(1, 2))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _gather(axes, axis, shard, probe):
    return _named(shard, axes, axis)


def _gather_fwd(axes, axis, shard, probe):
    return _gather(axes, axis, shard, probe), (shard, probe)


def _gather_bwd(axes, axis, residuals, gradient):
    shard, probe = residuals
    sq_norm = None if probe is None else sum_of_squares(gradient, keep_first=probe.ndim == 1).astype(jnp.float32)

    def scatter(gradient):
        return (jax.lax.psum_scatter(gradient, axes, scatter_dimension=axis, tiled=True),)

    return *left_to_xla(scatter, gradient, like=(shard,)), sq_norm


_gather.defvjp(_gather_fwd, _gather_bwd)
