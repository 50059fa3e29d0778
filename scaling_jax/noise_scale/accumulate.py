"""Split a batch into parts (microbatches and devices) and average over them; losses that are such averages.

`jax.shard_map` with `check_vma=True` sums the gradient of replicated parameters over devices. This module first marks
the parameters as varying, so every device keeps its own gradient, whatever `check_vma` is.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Split(NamedTuple):
    """The parameters and one device's share of a batch, cut into microbatches."""

    params: Any  # marked as varying over the `tracked` axes
    batch_MxB: Any  # M microbatches of B examples
    axes: tuple[str, ...]
    tracked: frozenset[str]  # those of `axes` along which shard_map tracks which values differ
    local_batch: int  # examples on this device
    num_devices: int


def split(params, batch, num_microbatches, axis_name) -> Split:
    """Cut this device's batch into microbatches.

    Raises:
      ValueError, TypeError: at trace time, if the batch, the parameters or the mapped axes don't fit together.
    """
    axes = () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)
    try:
        num_devices = jax.lax.axis_size(axes) if axes else 1
    except NameError as error:
        raise ValueError(
            f"axis_name={axis_name!r} isn't a mapped axis here ({error}): pass the axis name of pmap, shard_map or vmap"
        ) from None
    local_batch = _local_batch(batch, num_microbatches)
    _check_params(params)
    tracked = frozenset(axis for axis in axes if axis in varying(jax.lax.axis_index(axis)))
    _check_axes(params, batch, axes, tracked)
    params = jax.tree.map(lambda x: mark_varying(x, tracked), params)
    batch_MxB = jax.tree.map(lambda x: x.reshape(num_microbatches, -1, *x.shape[1:]), batch)
    return Split(params, batch_MxB, axes, tracked, local_batch, num_devices)


def mean(one, split: Split):
    """Mean of `one(microbatch)` over all microbatches and devices; sums are float32 or wider."""
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


def check_outputs(loss, aux, split: Split):
    """Returns (loss, aux as arrays).

    Raises:
      ValueError: if the loss is already a mean or sum over devices.
      TypeError: if a leaf of aux isn't floating point, so it can't be averaged.
    """
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
    """The mapped axes along which shard_map knows that x differs between devices; empty if it doesn't track this."""
    aval: Any = x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
    if not hasattr(aval, "manual_axis_type"):
        return aval.vma  # before JAX 0.10.2; with an unknown JAX this fails, which is better than summed gradients
    return aval.manual_axis_type.varying if aval.manual_axis_type else frozenset()


def mark_varying(x, axes):
    """x, marked as differing between devices along the given axes."""
    missing = tuple(sorted(frozenset(axes) - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def fixed_denominator(sum_loss_fn: Callable, weight_per_example: float, has_aux: bool = False) -> Callable:
    """A mean loss made from a weighted sum: the sum divided by (examples · weight_per_example).

    Don't divide by the batch's own sum of weights. The gradient of the whole batch is then not the mean of the
    gradients of its parts, which biases both moments by terms of order 1/B.

    Args:
      sum_loss_fn: `(params, batch, *extra) -> sum over examples and tokens of weight · loss`, or `(sum, aux)`.
      weight_per_example: a constant. With the expected weight of an example, the result is a mean per unit of weight.
      has_aux: `sum_loss_fn` returns `(sum, aux)`.

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
    """Check that the loss of a batch is the mean of the losses of its parts. Call it once before training.

    Pass a batch with the weights and padding that occur in training. `loss_fn` must return a scalar.

    Raises:
      ValueError: if it isn't the mean: the loss divides by the batch's own weights, or sums over examples.
    """
    whole = float(loss_fn(params, batch, *extra))
    parts = [
        float(loss_fn(params, jax.tree.map(lambda x, i=i: np.split(x, num_parts)[i], batch), *extra))
        for i in range(num_parts)
    ]
    if not abs(np.mean(parts) - whole) <= rtol * max(abs(whole), np.max(np.abs(parts))):
        raise ValueError(
            f"the loss of the batch is {whole:.6g}, but the mean of its {num_parts} parts' losses is "
            f"{np.mean(parts):.6g}, so the loss isn't a mean over examples: divide by a fixed denominator "
            "(noise_scale.fixed_denominator)"
        )


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
