"""Noise scales in the norms of other optimizers: ℓ1 for sign descent and Adam, spectral for Muon.

arXiv 2602.03001 defines them. B_ℓ1 = ‖σ‖₁²/‖G‖₁²; σ are the standard deviations of the coordinates of the one-example
gradient. B_spectral = (tr C^{1/2})²/‖G‖_*²; C is the covariance of that gradient along a matrix's shorter side.

Noise makes the norm of an average gradient too large, so this module gives two bounds on ‖G‖. The upper bound is
E‖ĝ‖ ≥ ‖G‖ (Jensen). The lower bound is E⟨dual(h₁), h₂⟩ ≤ ‖G‖, where h₁ and h₂ are the gradients of two independent
halves of the batch and dual is the sign or the polar factor, whose dual norm is at most 1.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_jax.noise_scale import accumulate, losses
from scaling_jax.noise_scale.accumulate import path_name

RIDGE = 3e-7  # as a part of the trace of the raw second moment; a few rounding errors of float32


class NormBounds(NamedTuple):
    """One step's noise, and bounds on the norm of the gradient; float32 scalars. Average each of them over steps."""

    noise: jax.Array  # ‖σ‖₁ or tr C^{1/2}, bias corrected
    grad_low: jax.Array  # its expectation is at most ‖G‖; may be negative
    grad_high: jax.Array  # its expectation is at least ‖G‖


def bounds(series: NormBounds) -> tuple[float, float]:
    """(low, high) of the noise scale in examples, from the averages over a series of steps.

    The range comes from the bounds on ‖G‖ only; the bias correction of the noise is taken as exact. `high` is inf if
    the mean of `grad_low` isn't positive.
    """
    noise, grad_low, grad_high = (float(np.mean(np.asarray(x, np.float64))) for x in series)
    return noise**2 / grad_high**2, noise**2 / grad_low**2 if grad_low > 0 else math.inf


def l1(loss_fn: Callable, *, num_microbatches: int, axis_name=None) -> Callable[..., NormBounds]:
    """‖σ‖₁ and bounds on ‖G‖₁, from the spread of small gradients.

    The standard deviation of each coordinate over n small batches is divided by c₄(n). This correction is exact for
    normally distributed gradients.

    Args:
      loss_fn, axis_name: as for `value_and_grad`.
      num_microbatches: even; the first half of the microbatches is the first independent half.

    Returns:
      `(params, batch, *extra) -> NormBounds`. It costs one more gradient of the batch; see `every`.
    """

    def measure(params, batch, *extra):
        split = _split(loss_fn, params, batch, extra, num_microbatches, axis_name)

        def one(microbatch):
            grads = _gradients(loss_fn, split, microbatch, extra)
            return grads, jax.tree.map(jnp.square, grads)

        n = _count(num_microbatches, split.num_devices, at_least=2)
        (first, first_sq), (second, second_sq) = _halves(one, split)
        mean = jax.tree.map(_mid, first, second)

        def std(sq1, sq2, g):
            # Only rounding makes this negative, where all small gradients agree.
            return jnp.sqrt(jnp.maximum(_mid(sq1, sq2) - jnp.square(g), 0.0) * (n / (n - 1)))

        small_batch = split.local_batch // num_microbatches
        noise = _sum(jax.tree.map(std, first_sq, second_sq, mean)) * math.sqrt(small_batch) / _c4(n)
        low = _mid(_sum(jax.tree.map(_sign_dot, first, second)), _sum(jax.tree.map(_sign_dot, second, first)))
        return NormBounds(noise, low, _sum(jax.tree.map(jnp.abs, mean)))

    return measure


def spectral(
    loss_fn: Callable,
    *,
    num_microbatches: int,
    axis_name=None,
    stacked: Callable[[str], bool] = lambda name: False,
    select: Callable[[str], bool] = lambda name: True,
) -> Callable[..., NormBounds]:
    """tr C^{1/2} and bounds on ‖G‖_*, summed over all matrices among the parameters.

    C is the covariance along a matrix's shorter side. The paper doesn't say which side to take. Along either side,
    tr C^{1/2} is at least the mean ‖·‖_* of the noise; for noise without structure, the shorter side is closer to it.

    tr Ĉ^{1/2} is too small by about a/(degrees of freedom). The halves of the batch have about half of the degrees of
    freedom, so comparing them with the whole batch gives a (Richardson extrapolation).

    The cost grows as the cube of the shorter side; leave embeddings out, as Muon does.

    Args:
      loss_fn, axis_name: as for `value_and_grad`.
      num_microbatches: even; at least 4 small batches on all devices together.
      stacked: parameter path -> True if the leading axis counts layers, each with its own matrix.
      select: parameter path -> True if the matrix is used.

    Returns:
      `(params, batch, *extra) -> NormBounds`. It costs one more gradient of the batch; see `every`.
    """

    def matrices(tree) -> list[jax.Array]:
        leaves = [(path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree)]
        wanted = [x if stacked(name) else x[None] for name, x in leaves if select(name) and x.ndim == 2 + stacked(name)]
        if not wanted:
            raise ValueError(f"none of the parameters {[name for name, _ in leaves]} is a selected matrix")
        return [x if x.shape[1] <= x.shape[2] else x.swapaxes(1, 2) for x in wanted]

    def measure(params, batch, *extra):
        split = _split(loss_fn, params, batch, extra, num_microbatches, axis_name)

        def one(microbatch):
            grads = matrices(_gradients(loss_fn, split, microbatch, extra))
            return grads, [_gram(g) for g in grads]

        n = _count(num_microbatches, split.num_devices, at_least=4)
        (first, first_sq), (second, second_sq) = _halves(one, split)
        mean = jax.tree.map(_mid, first, second)
        small_batch = split.local_batch // num_microbatches

        def noise(count, mean_sq, mean):
            def covariance(sq, g):
                # Rounding may make an eigenvalue slightly negative, and then the iteration would diverge.
                ridge = RIDGE * jnp.trace(sq, axis1=1, axis2=2)[:, None, None] * jnp.eye(sq.shape[-1])[None]
                return (sq - _gram(g) + ridge) * (small_batch * count / (count - 1))

            return _over_matrices(trace_sqrt, jax.tree.map(covariance, mean_sq, mean))

        whole = noise(n, jax.tree.map(_mid, first_sq, second_sq), mean)
        half = _mid(noise(n // 2, first_sq, first), noise(n // 2, second_sq, second))
        corrected = ((n - 1) * whole - (n // 2 - 1) * half) / (n - n // 2)
        low = _mid(_over_matrices(_polar_dot, first, second), _over_matrices(_polar_dot, second, first))
        return NormBounds(corrected, low, _over_matrices(nuclear_norm, mean))

    return measure


def every(k: int, step: jax.Array, measure: Callable[..., Any], *args) -> tuple[jax.Array, Any]:
    """`(True, measure(*args))` if k divides `step`, else `(False, zeros)` at no cost.

    `step` must be the same on all devices. Don't map `step` with `vmap`, which would run `measure` at every step.
    """
    zeros = jax.tree.map(accumulate.zeros_like, jax.eval_shape(measure, *args))
    measured = step % k == 0
    return measured, jax.lax.cond(measured, lambda: measure(*args), lambda: zeros)


def trace_sqrt(a_NxN: jax.Array, num_iterations: int = 18) -> jax.Array:
    """tr A^{1/2} of a positive semidefinite matrix, by the coupled Newton–Schulz iteration.

    An eigenvalue below (2/3)^{2·num_iterations} of the Frobenius norm (below 2e-7 of it after 18 iterations)
    contributes too little. More iterations would amplify float32's rounding errors in eigenvalues near zero.

    Source: Higham 2008, "Functions of Matrices", eq. 6.35.
    """
    size = jnp.sqrt(jnp.sum(jnp.square(a_NxN)))
    size = jnp.where(size > 0, size, 1.0)
    identity = jnp.eye(a_NxN.shape[-1], dtype=a_NxN.dtype)

    def step(_, yz):
        y, z = yz
        t = 1.5 * identity - 0.5 * _matmul(z, y)
        return _matmul(y, t), _matmul(t, z)

    # z starts at the identity. Adding 0·a makes shard_map see that z varies along the same axes as `a`.
    y, _ = jax.lax.fori_loop(0, num_iterations, step, (a_NxN / size, identity + 0 * a_NxN))
    return jnp.trace(y) * jnp.sqrt(size)


def polar_factor(g_MxN: jax.Array, num_iterations: int = 30) -> jax.Array:
    """UVᵀ of the singular value decomposition UDVᵀ, by the Newton–Schulz iteration. Its spectral norm is at most 1.

    A singular value below (2/3)^num_iterations of the Frobenius norm becomes less than 1. A zero matrix gives zeros.

    Source: Higham 2008, "Functions of Matrices", eq. 8.20.
    """
    g = g_MxN if g_MxN.shape[0] <= g_MxN.shape[1] else g_MxN.T
    size = jnp.sqrt(jnp.sum(jnp.square(g)))
    x = g / jnp.where(size > 0, size, 1.0)
    x = jax.lax.fori_loop(0, num_iterations, lambda _, x: 1.5 * x - 0.5 * _matmul(_matmul(x, x.T), x), x)
    return x if g.shape == g_MxN.shape else x.T


def nuclear_norm(g_MxN: jax.Array) -> jax.Array:
    """Sum of singular values."""
    return jnp.sum(polar_factor(g_MxN) * g_MxN)


def _split(loss_fn, params, batch, extra, num_microbatches, axis_name):
    split = accumulate.split(params, batch, num_microbatches, axis_name)
    if gathered := losses.examine(lambda params, part: loss_fn(params, part, *extra), split):
        raise ValueError(f"l1 and spectral need whole gradients, but loss_fn gathers {sorted(gathered)}")
    return split


def _gradients(loss_fn, split, microbatch, extra):
    grads = jax.grad(loss_fn)(split.params, microbatch, *extra)
    return jax.tree.map(lambda g: g.astype(jnp.float32), grads)


def _halves(one, split):
    half = jax.tree.leaves(split.batch_MxB)[0].shape[0] // 2
    return tuple(
        accumulate.mean(one, split._replace(batch_MxB=jax.tree.map(lambda x, s=s: x[s], split.batch_MxB)))
        for s in (slice(None, half), slice(half, None))
    )


def _count(num_microbatches, num_devices, at_least):
    n = num_microbatches * num_devices
    if num_microbatches % 2 or n < at_least:
        raise ValueError(
            f"{num_microbatches} microbatches on {num_devices} devices don't make two halves of at least "
            f"{at_least // 2} small batches: use an even num_microbatches >= {at_least}"
        )
    return n


def _c4(n):
    return math.sqrt(2 / (n - 1)) * math.exp(math.lgamma(n / 2) - math.lgamma((n - 1) / 2))


def _sign_dot(a, b):
    return jnp.sign(a) * b


def _polar_dot(a, b):
    return jnp.sum(polar_factor(a) * b)


def _over_matrices(fn, *lists):
    return sum((jnp.sum(jax.vmap(fn)(*xs)) for xs in zip(*lists, strict=True)), start=jnp.zeros(()))


def _gram(g_LxMxN):
    return jnp.einsum("lmn,lkn->lmk", g_LxMxN, g_LxMxN, precision="highest")


def _mid(a, b):
    return (a + b) / 2


def _sum(tree):
    return sum((jnp.sum(x) for x in jax.tree.leaves(tree)), start=jnp.zeros(()))


def _matmul(a, b):
    return jnp.matmul(a, b, precision="highest")
