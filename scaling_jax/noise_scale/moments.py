"""Two-batch moments of the gradient: how large it is, and how noisy.

McCandlish et al. 2018 (arXiv 1812.06162), appendix A.1.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_jax.noise_scale import accumulate, losses, norms
from scaling_jax.noise_scale.norms import add_up, leaf_sq_norms


class Moments(NamedTuple):
    """Squared gradient norms at two batch sizes; batch sizes in examples.

    The norms are float32 scalars. With groups, or a `norm` that returns several numbers, they are pytrees of scalars.
    """

    small_sq_norm: Any  # mean over small batches of |g_small|², never |mean|²
    big_sq_norm: Any  # |g_big|² of the whole batch
    small_batch: Any  # one number; for a series of steps, one number per step
    big_batch: Any


def unbiased(m: Moments) -> tuple[Any, Any]:
    """Unbiased (|G|², tr(Σ)) from one step (A.2, A.3). Either may be negative, and their ratio is biased.

    Raises:
      ValueError: if both batch sizes are the same, in numbers or NumPy arrays; JAX's arrays then give NaN or infinity.
    """
    if not isinstance(m.small_batch, jax.Array) and not isinstance(m.big_batch, jax.Array):
        same = np.equal(m.small_batch, m.big_batch) & np.not_equal(m.big_batch, 0)  # 0: not measured
        if np.any(same):
            raise ValueError(
                f"small_batch and big_batch are both {np.broadcast_to(m.big_batch, np.shape(same))[same].flat[0]:g} "
                "examples: small_batch must be a part of the batch, such as a microbatch"
            )
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
    batch_sharding: Any = None,
    weighted: bool = False,
    has_aux: bool = False,
    method: Literal["two_batch", "per_example", "norm_layers"] = "two_batch",
    norm: Callable[[Any], Any] | None = None,
    groups: Callable[[str], str] | None = None,
    stacked: Callable[[str], bool] = lambda name: False,
    is_norm_layer: Callable[[str], bool] = norms.is_norm_layer,
    every: int | None = None,
):
    """`jax.value_and_grad` of a mean loss that also returns the `Moments` of its gradient.

    Call it under `jax.jit`: outside, JAX compiles it again at every call. It works over arrays sharded in any way,
    inside pmap, shard_map (with and without `check_vma`) and vmap, and inside an outer vmap over runs.

    Args:
      loss_fn: `(params, batch, *extra) -> scalar`, the mean over the leading axis of every leaf of `batch`. It has no
        collectives of its own along `axis_name`. It doesn't divide by a sum over the batch, such as the number of
        tokens that aren't masked: see `weighted`, and `check_mean_loss`. Every microbatch gets the same `extra`; put
        what differs by example (dropout keys) in `batch`.
      num_microbatches: parts of each device's batch, or without `axis_name` of the whole batch. "two_batch" takes their
        gradients as the small ones.
      axis_name: axis (or axes) along which devices hold different parts of the batch. Each device's gradient is then a
        small batch. It is a mapped axis, or under `jax.jit` an axis of the mesh (of `jax.set_mesh`, or that of
        `batch_sharding`). Without it, XLA divides the work of every microbatch over the devices.
      batch_sharding: how the batch lies on a mesh with Auto axes, under jit: a NamedSharding, or a pytree prefix of
        them. Without it XLA is left to find out. Explicit axes say it by themselves.
      weighted: `loss_fn` returns `(sum, weight)`: the sum over the batch of weight · loss, and of the weights. Loss and
        grads are those of the weighted mean, sum / weight of the whole batch. Aux are sums too, divided by the weight.
      has_aux: `loss_fn` returns `(loss, aux)`, or `((sum, weight), aux)`. The leaves of `aux` are floats; they are
        averaged like the loss.
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
      every: measure in every k-th step only. The function then takes the keyword `step`; in the steps between, the
        moments are zeros, their batch sizes too. `tracker` passes over them.

    Returns:
      `(params, batch, *extra) -> ((loss, moments), grads)`, or `((loss, moments, aux), grads)`. Loss, aux and grads
      are means over the whole batch; grads have the dtypes of the parameters.

    Raises:
      ValueError: at trace time, if the small batch is the whole batch or doesn't divide it, if the leaves of the batch
        differ in their number of examples, if devices hold the same batch, or if the loss isn't a mean of its parts:
        see `loss_fn`. Parameters may differ between devices only if the loss gathers them by `taps.all_gather`.
      TypeError: if a parameter isn't floating point.
    """
    if method not in ("two_batch", "per_example", "norm_layers"):
        raise ValueError(f"method={method!r} must be 'two_batch', 'per_example' or 'norm_layers'")
    if norm is not None and (groups is not None or method != "two_batch"):
        raise ValueError("norm works only with method='two_batch' and without groups")
    if every is not None and every < 1:
        raise ValueError(f"every={every} steps must be at least 1")
    two_batch = method == "two_batch"

    def selected(name):
        return method != "norm_layers" or is_norm_layer(name)

    def local(whole, params, batch, step, *extra):
        split = accumulate.split(params, batch, num_microbatches, axis_name, batch_sharding)
        big_batch = split.local_batch * split.num_devices
        small_batch = split.local_batch // num_microbatches if two_batch else 1
        if small_batch == big_batch:
            raise ValueError(
                f"small batch and whole batch are both {big_batch} examples, so there is nothing to compare: use "
                + ("num_microbatches >= 2 or more devices" if two_batch and big_batch > 1 else "a larger batch")
            )
        if not any(map(selected, accumulate.names(params))):
            raise ValueError(f"is_norm_layer picks none of the parameters {accumulate.names(params)}")

        def loss_of(params, microbatch):
            value = loss_fn(whole(params), microbatch, *extra)
            loss, aux = losses.pair(value, "has_aux=True: loss_fn must return (loss, aux)") if has_aux else (value, ())
            loss, weight = (
                losses.pair(loss, "weighted=True: the loss must be (sum, weight)") if weighted else (loss, ())
            )
            return losses.scalar(loss), (jax.tree.map(losses.scalar, weight), accumulate.check_aux(aux))

        gathered = losses.examine(lambda *args: loss_of(*args)[0], split, weighted)
        if gathered and norm is not None:
            raise ValueError(f"norm needs whole gradients, but loss_fn gathers {sorted(gathered)}: leave norm out")
        measured = None if step is None else step % every == 0

        def only_if_measured(fn, *args):
            if measured is None:
                return fn(*args)
            zeros = jax.tree.map(accumulate.zeros_like, jax.eval_shape(fn, *args))
            return jax.lax.cond(measured, fn, lambda *_: zeros, *args)

        def plain(microbatch):
            return jax.value_and_grad(loss_of, has_aux=True)(split.params, microbatch)

        def tapped(microbatch):
            if two_batch:
                found = norms.with_own_norms(loss_of, split.params, microbatch, gathered, stacked)
            else:
                found = norms.with_example_norms(loss_of, split.params, microbatch, selected, stacked)
            value, grads, sq_norms = found
            return value, grads, add_up(sq_norms, groups)

        def leaf_norms(grads):
            return {name: x for name, x in leaf_sq_norms(grads, stacked).items() if selected(name)}

        def norms_of(grads):
            return norm(grads) if norm is not None else add_up(leaf_norms(grads), groups)

        def one(microbatch):
            if two_batch and not gathered:
                value, grads = plain(microbatch)
                return value, grads, only_if_measured(norms_of, grads)
            if measured is None:
                return tapped(microbatch)
            nothing = jax.tree.map(accumulate.zeros_like, jax.eval_shape(tapped, microbatch)[2])
            return jax.lax.cond(measured, tapped, lambda part: (*plain(part), nothing), microbatch)

        def whole_norm(grads):
            if norm is None:
                return norms.whole_norms(leaf_norms(grads), gathered, groups)
            # The caller's norm may depend on the device: `curvature` uses each device's own Hessian.
            return accumulate.mean_over_devices(norm(grads), split)

        # Over sharded gradients each norm is a message between devices: this way the two travel together.
        together = axis_name is None and norm is None
        (value, grads, small), big = accumulate.mean_over_microbatches(
            one, split, (lambda total: only_if_measured(whole_norm, total[1])) if together else lambda total: ()
        )
        ((loss, (weight, aux)), small), grads = norms.means_over_devices((value, small), grads, split, gathered)
        if weighted:
            loss, aux, grads = jax.tree.map(lambda x: x / weight, (loss, aux, grads))
            small = jax.tree.map(lambda x: x / jnp.square(weight), small)
        if together:
            total_weight = num_microbatches * weight if weighted else num_microbatches
            big = jax.tree.map(lambda x: x / jnp.square(total_weight), big)
        else:
            big = only_if_measured(whole_norm, grads)
        sizes = [jnp.float32(small_batch), jnp.float32(big_batch)]
        if measured is not None:
            sizes = [jnp.where(measured, size, 0.0) for size in sizes]
        moments = Moments(small, big, *sizes)
        grads = jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params)
        return ((loss, moments, aux) if has_aux else (loss, moments)), grads

    def wrapped(params, batch, *extra, step=None):
        if (step is None) != (every is None):
            raise TypeError("value_and_grad(every=k) and the keyword step go together: pass both or neither")
        axes = accumulate.axes_of(axis_name)
        if accumulate.mapped(axes):
            return local(lambda params: params, params, batch, step, *extra)
        accumulate.check_batch(batch, num_microbatches)
        shards = accumulate.sharded_dimensions(params, axes)
        whole = functools.partial(norms.gather_all, shards=shards)
        leaves, tree = jax.tree.flatten(extra)
        arrays = [x if isinstance(x, (jax.Array, np.ndarray)) else None for x in leaves]  # the others stay as they are

        def on_device(params, batch, step, arrays):
            filled = [x if array is None else array for array, x in zip(arrays, leaves, strict=True)]
            return local(whole, params, batch, step, *jax.tree.unflatten(tree, filled))

        return accumulate.on_mesh(on_device, axes, batch_sharding, params)(params, batch, step, arrays)

    return wrapped
