"""Matrix square roots and polar factors by products only, for accelerators whose eigensolvers are slow."""

import jax
import jax.numpy as jnp


def trace_sqrt(a_NxN: jax.Array, num_iterations: int = 18) -> jax.Array:
    """tr A^{1/2} of a positive semidefinite matrix, by the coupled Newton–Schulz iteration.

    An eigenvalue below (2/3)^{2·num_iterations} of the Frobenius norm (2e-7 of it after 18 iterations) contributes too
    little. More iterations would amplify float32's rounding of eigenvalues near zero.

    Source: Higham 2008, "Functions of Matrices", eq. 6.35.
    """
    size = jnp.sqrt(jnp.sum(jnp.square(a_NxN)))
    size = jnp.where(size > 0, size, 1.0)
    identity = jnp.eye(a_NxN.shape[-1], dtype=a_NxN.dtype)

    def step(_, yz):
        y, z = yz
        t = 1.5 * identity - 0.5 * _matmul(z, y)
        return _matmul(y, t), _matmul(t, z)

    # z starts at the identity, made from `a` so that shard_map sees it vary wherever `a` does.
    y, _ = jax.lax.fori_loop(0, num_iterations, step, (a_NxN / size, identity + 0 * a_NxN))
    return jnp.trace(y) * jnp.sqrt(size)


def polar_factor(g_MxN: jax.Array, num_iterations: int = 30) -> jax.Array:
    """UVᵀ of the singular value decomposition UDVᵀ, by the Newton–Schulz iteration; its spectral norm is at most 1.

    A singular value below (2/3)^num_iterations of the Frobenius norm gets a factor less than 1. Zero gives zero.

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


def _matmul(a, b):
    return jnp.matmul(a, b, precision="highest")
