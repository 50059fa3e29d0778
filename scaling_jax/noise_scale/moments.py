"""Two-batch moments of the gradient: how large it is, and how noisy.

McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from scaling_jax.noise_scale import accumulate, per_example
from scaling_jax.noise_scale.quadratic_forms import add_up, leaf_sq_norms


class Moments(NamedTuple):
    """Squared gradient norms at two batch sizes; batch sizes in examples.

    The norms are float32 scalars. With groups, or a `norm` that returns several numbers, they are pytrees of scalars.
    """

    small_sq_norm: Any  # mean over small batches of |g_small|², never |mean|²
    big_sq_norm: Any  # |g_big|² of the whole batch
    small_batch: Any  # one number; for a series of steps, one number per step
    big_batch: Any


def unbiased(m: Moments) -> tuple[Any, Any]:
    """Unbiased (|G|², tr(Σ)) from one step (A.2, A.3). Either may be negative, and their ratio is biased."""
    grad_sq_norm = jax.tree.map(
        lambda small, big: (m.big_batch * big - m.small_batch * small) / (m.big_batch - m.small_batch),
        m.small_sq_norm,
        m.big_sq_norm,
    )
    trace_cov = jax.tree.map(
        lambda small, big: (small - big) / (1 / m.small_batch - 1 / m.big_batch), m.small_sq_norm, m.big_sq_norm
    )
    return grad_sq_norm, trace_cov


def value_and_grad(
    loss_fn: Callable,
    *,
    num_microbatches: int = 1,
    axis_name: str | tuple[str, ...] | None = None,
    has_aux: bool = False,
    method: Literal["two_batch", "per_example", "norm_layers"] = "two_batch",
    norm: Callable[[Any], Any] | None = None,
    groups: Callable[[str], str] | None = None,
    stacked: Callable[[str], bool] = lambda name: False,
    is_norm_layer: Callable[[str], bool] = per_example.is_norm_layer,
):
    """`jax.value_and_grad` of a mean loss that also returns the `Moments` of its gradient.

    It works inside jit, pmap, shard_map (with and without `check_vma`) and vmap, and inside an outer vmap over runs.

    Args:
      loss_fn: `(params, batch, *extra) -> scalar`, the mean over the leading axis of every leaf of `batch`. It has no
        collectives of its own. If token weights differ between examples, divide by a fixed denominator, not by the
        batch's own sum of weights (`fixed_denominator`, `check_mean_loss`). Every microbatch gets the same `extra`;
        put what differs by example (dropout keys) in `batch`.
      num_microbatches: parts of each device's batch. "two_batch" takes their gradients as the small ones.
      axis_name: mapped axis (or axes) along which devices hold different parts of the batch; None on one device.
      has_aux: `loss_fn` returns `(loss, aux)`. The leaves of `aux` are floats; they are averaged like the loss.
      method: "two_batch" compares microbatches and devices with the whole batch. "per_example" compares single
        examples with the whole batch: it is the most precise, and needs a loss built from `taps`. "norm_layers" does
        this for the parameters of LayerNorm and RMSNorm only (Gray et al. 2024, arXiv 2411.00999). It is cheap, but
        gives the noise scale of these parameters. In a 2x64 model of bytes, the noise scale of the whole model was
        2.1 times as large at a loss of 2.4 nats and 1.4 times at 1.6 nats. Measure this factor on your model: one run
        of "per_example" with groups gives both.
      norm: for "two_batch": gradients -> scalar or pytree of scalars, each a quadratic form of the gradient. The
        default is `sq_norm`; `adam_norms(...)`, `curvature(...)` and a function that returns a dict of several also do.
      groups: parameter path (`layers/query`) -> group name. The norms become dicts, whose values add up to the whole.
      stacked: parameter path -> True if the leading axis counts layers that the loss scans over. `groups` then gets
        `layers/query/0`, `layers/query/1`, ...
      is_norm_layer: parameter path -> True if "norm_layers" uses the parameter.

    Returns:
      `(params, batch, *extra) -> ((loss, moments), grads)`, or `((loss, moments, aux), grads)`. Loss, aux and grads
      are means over the whole batch; grads have the dtypes of the parameters.

    Raises:
      ValueError: at trace time, if the small batch is the whole batch or doesn't divide it, if the leaves of the batch
        differ in their number of examples, or if devices hold the same batch.
      TypeError: if a parameter isn't floating point.
    """
    if method not in ("two_batch", "per_example", "norm_layers"):
        raise ValueError(f"method={method!r} must be 'two_batch', 'per_example' or 'norm_layers'")
    if norm is not None and (groups is not None or method != "two_batch"):
        raise ValueError("norm works only with method='two_batch' and without groups")
    two_batch = method == "two_batch"

    def selected(name):
        return method != "norm_layers" or is_norm_layer(name)

    def norm_of(grads):
        if norm is not None:
            return norm(grads)
        sq_norms = leaf_sq_norms(grads, stacked)
        return add_up({name: x for name, x in sq_norms.items() if selected(name)}, groups)

    def wrapped(params, batch, *extra):
        split = accumulate.split(params, batch, num_microbatches, axis_name)
        big_batch = split.local_batch * split.num_devices
        small_batch = split.local_batch // num_microbatches if two_batch else 1
        if small_batch == big_batch:
            raise ValueError(
                f"small batch and whole batch are both {big_batch} examples, so there is nothing to compare: use "
                + ("num_microbatches >= 2 or more devices" if two_batch and big_batch > 1 else "a larger batch")
            )
        if not any(map(selected, accumulate.names(params))):
            raise ValueError(f"is_norm_layer picks none of the parameters {accumulate.names(params)}")

        def one(microbatch):
            if two_batch:
                value, grads = jax.value_and_grad(loss_fn, has_aux=has_aux)(split.params, microbatch, *extra)
                small_sq_norm = norm_of(grads)
            else:
                value, grads, leaf_norms = per_example.loss_and_leaf_norms(
                    loss_fn, split.params, microbatch, extra, has_aux=has_aux, tapped=selected, stacked=stacked
                )
                small_sq_norm = add_up(leaf_norms, groups)
            loss, aux = value if has_aux else (value, ())
            return accumulate.check_outputs(loss, aux, split), grads, small_sq_norm

        (loss, aux), grads, small_sq_norm = accumulate.mean(one, split)
        # The caller's norm may depend on the device: `curvature` uses each device's own Hessian.
        big_sq_norm = norm_of(grads) if norm is None else accumulate.mean_over_devices(norm(grads), split)
        moments = Moments(small_sq_norm, big_sq_norm, jnp.float32(small_batch), jnp.float32(big_batch))
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        return ((loss, moments, aux) if has_aux else (loss, moments)), grads

    return wrapped
