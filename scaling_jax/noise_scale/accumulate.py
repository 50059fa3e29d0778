"""The whole batch's mean from its parts: microbatches on a device, devices on a mapped axis.

`jax.shard_map` with `check_vma=True` turns the gradient of replicated parameters into its sum over devices. Here the
parameters are first marked as varying, so every device keeps its own gradient under both settings.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


def path_name(path) -> str:
    """A parameter's path as text: `layers/0/attention/query`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


class Split(NamedTuple):
    """One device's share of a batch, ready to be differentiated part by part."""

    params: Any  # marked as varying over `axes` where shard_map tracks that
    batch_MxB: Any
    axes: tuple[str, ...]
    tracked: frozenset[str]  # the axes over which shard_map tracks what varies
    local_batch: int
    num_devices: int


def split(params, batch, num_microbatches, axis_name) -> Split:
    """Check a batch and its mapped axes at trace time and cut it into microbatches; ValueError or TypeError if not."""
    axes = () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)
    try:
        num_devices = jax.lax.axis_size(axes) if axes else 1
    except NameError as error:
        raise ValueError(
            f"axis_name={axis_name!r} isn't a mapped axis here ({error}): use pmap, shard_map or vmap's"
        ) from None
    local_batch = _local_batch(batch, num_microbatches)
    _check_params(params)
    tracked = frozenset(axis for axis in axes if axis in varying(jax.lax.axis_index(axis)))
    _check_axes(params, batch, axes, tracked)
    params = jax.tree.map(lambda x: mark_varying(x, tracked), params)
    batch_MxB = jax.tree.map(lambda x: x.reshape(num_microbatches, -1, *x.shape[1:]), batch)
    return Split(params, batch_MxB, axes, tracked, local_batch, num_devices)


def mean(one, split: Split):
    """Mean of `one(microbatch)` over microbatches and devices, accumulated in float32 or wider."""
    num_microbatches = jax.tree.leaves(split.batch_MxB)[0].shape[0]
    first = jax.tree.map(lambda x: x[0], split.batch_MxB)
    if num_microbatches == 1:
        total = jax.tree.map(_widen, one(first))
    else:
        zeros = jax.tree.map(
            lambda s: mark_varying(jnp.zeros(s.shape, _wide(s.dtype)), varying(s)), jax.eval_shape(one, first)
        )

        def add(total, microbatch):
            return jax.tree.map(lambda t, x: t + _widen(x), total, one(microbatch)), None

        total, _ = jax.lax.scan(add, zeros, split.batch_MxB)
    return mean_over_devices(jax.tree.map(lambda x: x / num_microbatches, total), split)


def mean_over_devices(tree, split: Split):
    """`jax.lax.pmean` along the split's axes; the tree itself where there are none."""
    if not split.axes:
        return tree
    return jax.lax.pmean(jax.tree.map(lambda x: mark_varying(x, split.tracked), tree), split.axes)


def names(params) -> list[str]:
    """Paths of all parameters."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def check_outputs(loss, aux, split: Split):
    """Refuse a loss that already is a mean over devices, and an aux that can't be averaged."""
    if missing := split.tracked - varying(loss):
        raise ValueError(
            f"loss_fn already reduces over {sorted(missing)}: return the mean over the device's own examples"
        )
    for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"aux leaf {path_name(path)!r} is {jnp.result_type(leaf)}: aux is averaged, so return floats"
            )
    return loss, jax.tree.map(jnp.asarray, aux)


def varying(x) -> frozenset[str]:
    """The axes over which shard_map tracks that x differs between devices; none where it doesn't track."""
    aval: Any = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    if not hasattr(aval, "manual_axis_type"):
        return aval.vma  # before JAX 0.10.2; any other JAX had better fail here than sum gradients silently
    return aval.manual_axis_type.varying if aval.manual_axis_type else frozenset()


def mark_varying(x, axes):
    """Mark x as differing between devices along axes that shard_map tracks."""
    missing = tuple(sorted(frozenset(axes) - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


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
                f"parameter {path_name(path)!r} is {jnp.result_type(x)}: gradients need floats; pass it in extra"
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
            f"the batch varies over {sorted(unnamed)}, which axis_name doesn't name: its gradients would be summed"
        )


def _wide(dtype):
    return jnp.promote_types(dtype, jnp.float32)


def _widen(x):
    return x.astype(_wide(x.dtype))


def fixed_denominator(sum_loss_fn: Callable, weight_per_example: float, has_aux: bool = False) -> Callable:
    """A mean loss from a weighted sum: divided by a constant times the examples, never by the batch's own weights.

    With the batch's own sum of weights in the denominator, the gradient of the whole batch isn't the mean of its parts'
    and both moments are biased by terms of order 1/B.

    Args:
      sum_loss_fn: `(params, batch, *extra) -> sum over examples and tokens of weight · loss`, or `(sum, aux)`.
      weight_per_example: the constant; the expected weight of an example makes the result a mean per unit of weight.

    Returns:
      A `loss_fn` for `value_and_grad`.
    """
    if not weight_per_example > 0:
        raise ValueError(f"weight_per_example={weight_per_example} must be positive")

    def loss_fn(params, batch, *extra):
        denominator = weight_per_example * jax.tree.leaves(batch)[0].shape[0]
        if has_aux:
            total, aux = sum_loss_fn(params, batch, *extra)
            return total / denominator, aux
        return sum_loss_fn(params, batch, *extra) / denominator

    return loss_fn


def check_mean_loss(loss_fn: Callable, params, batch, *extra, num_parts: int = 2, rtol: float = 1e-5) -> None:
    """Make sure, once before training, that the loss of a batch is the mean of its parts' losses.

    Pass a batch with the weights and padding that training will meet; `loss_fn` returns a scalar.

    Raises:
      ValueError: if it isn't: the loss divides by the batch's own weights, or sums over examples.
    """
    whole = float(loss_fn(params, batch, *extra))
    parts = [
        float(loss_fn(params, jax.tree.map(lambda x, i=i: np.split(x, num_parts)[i], batch), *extra))
        for i in range(num_parts)
    ]
    if not abs(np.mean(parts) - whole) <= rtol * max(abs(whole), np.max(np.abs(parts))):
        raise ValueError(
            f"the loss of the batch is {whole:.6g}, the mean of its {num_parts} parts' {np.mean(parts):.6g}: it is "
            "no mean over examples; divide by a fixed denominator (noise_scale.fixed_denominator)"
        )
