"""The gradient of a task's loss on a batch, with the noise scale's moments, the model's new state and the random keys.

Microbatches and devices compute their own losses, as if each were a batch: a loss with `key` gets another key in each,
and BatchNorm sees the statistics of each. Their new states are averaged. With `whole_batch`, a device's batch is one
loss, and the moments come from a second pass over microbatches.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from scaling_jax.io import UserError
from scaling_jax.noise_scale import Moments, value_and_grad
from scaling_jax.tasks import Trainable

Axis = str | tuple[()] | None


class Gradients(NamedTuple):
    loss: jax.Array
    moments: Moments  # by part of the model
    grads: Any
    model_state: Any  # after the step


def gradients_of(
    task: Trainable,
    num_microbatches: int,
    axis_name: Axis,
    differentiate: Callable = value_and_grad,
    loss: Callable | None = None,
) -> Callable[..., Gradients]:
    """`(params, model_state, batch, key) -> Gradients`, means over microbatches and devices.

    Args:
      axis_name, differentiate, loss: see `program.one_step`.
    """
    options: dict[str, Any] = {
        "num_microbatches": num_microbatches,
        "axis_name": axis_name,
        "groups": task.part_of,
        "stacked": task.is_stacked,
    }

    def gradients(params, model_state, batch, key) -> Gradients:
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), batch)
        weighted = task.weighted(params, model_state, shapes, key)
        if weighted and loss is not None:
            raise UserError(f"{task.name} can't be trained with sharding fsdp: its loss must be a mean, not a sum")
        if task.is_plain:

            def plain(params, batch):
                return task.loss(params, None, batch, None)[0]

            try:
                (value, moments), grads = differentiate(loss or plain, weighted=weighted, **options)(params, batch)
            except ValueError as error:
                if "divides by a number" not in str(error):
                    raise
                raise UserError(
                    f"loss of task {task.name} divides by a number that depends on the whole batch, so it isn't a mean "
                    "over examples: return (sum, weight), or divide by a constant; set whole_batch if this is a "
                    "statistic of the batch, such as BatchNorm's"
                ) from error
            return Gradients(value, moments, grads, model_state)

        # Not a mean over examples, whose statistics or keys they share: so it goes as a sum and its weight.
        def summed(params, keyed, model_state):
            batch, keys = keyed
            value, new = task.loss(params, model_state, batch, None if keys is None else keys[0])
            total, weight = value if weighted else (value * _count(batch), jnp.float32(_count(batch)))
            return (total, weight), jax.tree.map(lambda x: x.astype(jnp.float32) * weight, new)

        keyed = batch, None if key is None else jax.random.split(_of_device(key, axis_name), _count(batch))
        of_parts = differentiate(summed, weighted=True, has_aux=True, **options)
        (value, moments, new), grads = of_parts(params, keyed, model_state)
        if task.task.whole_batch:
            value, grads, new = _at_once(summed, params, keyed, model_state, axis_name)
        return Gradients(value, moments, grads, jax.tree.map(_as_before, new, model_state))

    return gradients


def _at_once(summed: Callable, params, keyed, model_state, axis_name: Axis) -> tuple[Any, Any, Any]:
    """(loss, gradient, new state), with a device's batch as one loss."""

    def total_of(params):
        (total, weight), new = summed(params, keyed, model_state)
        return total, (weight, new)

    (total, (weight, new)), grads = jax.value_and_grad(total_of, has_aux=True)(params)
    if axis_name:
        total, weight, new, grads = jax.lax.psum((total, weight, new, grads), axis_name)
    return jax.tree.map(lambda x: (x / weight).astype(x.dtype), (total, grads, new))


def _of_device(key, axis_name: Axis):
    return jax.random.fold_in(key, jax.lax.axis_index(axis_name)) if axis_name else key


def _as_before(mean, before):
    """A mean over microbatches in the type that the state has: flags and counts are equal in all, or rounded."""
    if jnp.issubdtype(before.dtype, jnp.floating):
        return mean.astype(before.dtype)
    return jnp.round(mean).astype(before.dtype)


def _count(batch) -> int:
    return jax.tree.leaves(batch)[0].shape[0]
