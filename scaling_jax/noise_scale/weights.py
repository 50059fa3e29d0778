"""Losses whose examples carry unequal weights (padding, masks), made fit for unbiased moments."""

from collections.abc import Callable

import jax
import numpy as np


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
