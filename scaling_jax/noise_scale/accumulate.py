"""Split a batch into parts (microbatches and devices) and average over them.

`jax.shard_map` with `check_vma=True` sums the gradient of replicated parameters over devices. This module first marks
the parameters as varying, so every device keeps its own gradient, whatever `check_vma` is.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from scaling_jax.noise_scale.placement import explicit_spec, mapped, microbatches, type_of


class Split(NamedTuple):
    """The parameters and one device's share of a batch, cut into microbatches."""

    params: Any  # marked as varying over the `tracked` axes
    batch_MxB: Any  # M microbatches of B examples
    axes: tuple[str, ...]
    tracked: frozenset[str]  # those of `axes` along which shard_map tracks which values differ
    own_params: list[frozenset[str]]  # for each parameter, those of `tracked` along which it differs
    local_batch: int  # examples on this device
    num_devices: int


def split(params, batch, num_microbatches, axis_name, batch_sharding=None) -> Split:
    """Cut this device's batch, or without `axis_name` the whole batch, into microbatches.

    Args:
      axis_name: None, or a mapped axis, or a tuple of them. With (), the batch is all on this device.
      batch_sharding: where the batch lies on a mesh with Auto axes: a sharding, or a pytree prefix of them.

    Raises:
      ValueError, TypeError: at trace time, if the batch, the parameters or the mapped axes don't fit together.
    """
    axes = () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)
    if not mapped(axes):
        raise ValueError(f"axis_name={axis_name!r} isn't a mapped axis here: pass that of pmap, shard_map or vmap")
    num_devices = jax.lax.axis_size(axes) if axes else 1
    local_batch = _local_batch(batch, num_microbatches)
    _check_params(params)
    tracked = frozenset(axis for axis in axes if axis in varying(jax.lax.axis_index(axis)))
    _check_axes(params, batch, axes, tracked)
    own_params = [varying(x) & tracked for x in jax.tree.leaves(params)]
    params = jax.tree.map(lambda x: mark_varying(x, tracked), params)
    batch_MxB = microbatches(batch, num_microbatches, axis_name is None, batch_sharding)
    return Split(params, batch_MxB, axes, tracked, own_params, local_batch, num_devices)


def mean(one, split: Split):
    """Mean of `one(microbatch)` over all microbatches and devices; sums are float32 or wider."""
    return mean_over_devices(mean_over_microbatches(one, split)[0], split)


def mean_over_microbatches(one, split: Split, of_sum=lambda total: ()):
    """(mean of `one(microbatch)` over this device's microbatches, `of_sum` of the sum); sums are float32 or wider.

    `of_sum` is computed with each microbatch, so that XLA can send what it needs from other devices along with what
    `one` needs.
    """
    num_microbatches = jax.tree.leaves(split.batch_MxB)[0].shape[0]
    first = jax.tree.map(lambda x: x[0], split.batch_MxB)
    if num_microbatches == 1:
        total = jax.tree.map(_widen, one(first))
        return total, of_sum(total)
    zeros = jax.tree.map(lambda s: zeros_like(s, _wide(s.dtype)), jax.eval_shape(one, first))

    def add(carry, microbatch):
        total = jax.tree.map(lambda t, x: t + _widen(x), carry[0], one(microbatch))
        return (total, of_sum(total)), None

    nothing = jax.tree.map(zeros_like, jax.eval_shape(of_sum, zeros))
    (total, found), _ = jax.lax.scan(add, (zeros, nothing), split.batch_MxB)
    return jax.tree.map(lambda x: x / num_microbatches, total), found


def mean_over_devices(tree, split: Split):
    """`jax.lax.pmean` of the tree along the split's axes; the tree itself if there are no axes."""
    if not split.axes:
        return tree
    return jax.lax.pmean(jax.tree.map(lambda x: mark_varying(x, split.tracked), tree), split.axes)


def path_name(path) -> str:
    """A parameter's path as text: `layers/0/attention/query`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def names(params) -> list[str]:
    """Paths of all parameters."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def check_aux(aux):
    """Returns aux as arrays.

    Raises:
      TypeError: if a leaf isn't floating point, so it can't be averaged.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"aux leaf {path_name(path)!r} is {jnp.result_type(leaf)}: aux is averaged, so return floats"
            )
    return jax.tree.map(jnp.asarray, aux)


def varying(x) -> frozenset[str]:
    """The mapped axes along which shard_map knows that x differs between devices; empty if it doesn't track this."""
    aval = type_of(x)
    if not hasattr(aval, "manual_axis_type"):
        return aval.vma  # before JAX 0.10.2; with an unknown JAX this fails, which is better than summed gradients
    return aval.manual_axis_type.varying if aval.manual_axis_type else frozenset()


def mark_varying(x, axes):
    """x, marked as differing between devices along the given axes."""
    missing = tuple(sorted(frozenset(axes) - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def zeros_like(x, dtype=None):
    """Zeros of the shape of x, an array or its shape; they differ between devices, and lie on them, as x does."""
    spec, dtype = explicit_spec(x), dtype or x.dtype
    zeros = jnp.zeros(x.shape, dtype) if spec is None else jax.lax.full(x.shape, 0, dtype, sharding=type_of(x).sharding)
    return mark_varying(zeros, varying(x))


def _local_batch(batch, num_microbatches):
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches={num_microbatches} must be at least 1")
    shapes = {path_name(path): jnp.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(batch)}
    if not shapes:
        raise ValueError("the batch has no arrays")
    if any(not shape for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(f"the batch's leaves need one common leading axis of examples, not shapes {shapes}")
    local_batch = next(iter(shapes.values()))[0]
    if local_batch == 0 or local_batch % num_microbatches:
        raise ValueError(
            f"a device's batch of {local_batch} examples doesn't split into {num_microbatches} microbatches"
        )
    return local_batch


def _check_params(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("the parameters have no arrays")
    for path, x in leaves:
        if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            raise TypeError(
                f"parameter {path_name(path)!r} is {jnp.result_type(x)}: gradients need floats; pass it in `extra`"
            )


def _check_axes(params, batch, axes, tracked):
    batch_axes = frozenset().union(*map(varying, jax.tree.leaves(batch)))
    if same := tracked - batch_axes:
        raise ValueError(
            f"every device along {sorted(same)} holds the same batch: shard it, or leave the axis out of axis_name"
        )
    own_params = frozenset.intersection(*map(varying, jax.tree.leaves(params)))
    if unnamed := batch_axes - frozenset(axes) - own_params:
        raise ValueError(
            f"the batch differs along {sorted(unnamed)}, which axis_name doesn't name: add it to axis_name, or its "
            "gradients would be summed"
        )


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _widen(x):
    return x.astype(_wide(x.dtype))
