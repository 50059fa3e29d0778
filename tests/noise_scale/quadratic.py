"""A noisy quadratic whose gradient moments are known in closed form; rotated, so nothing is diagonal by luck.

loss(w, x) = ½ (w − x)ᵀ H (w − x) averaged over x ~ N(0, S): G = H w, Σ = H S H.
"""

import jax
import jax.numpy as jnp
import numpy as np

from scaling_jax.noise_scale import taps

ROWS, COLUMNS = 3, 2
DIM = ROWS * COLUMNS

_rng = np.random.default_rng(0)


def _rotated(eigenvalues):
    q, _ = np.linalg.qr(_rng.standard_normal((DIM, DIM)))
    return (q * eigenvalues) @ q.T


HESSIAN = _rotated([0.3, 0.5, 0.8, 1.2, 2.0, 3.0])
SAMPLE_COV = _rotated([4.0, 2.0, 1.0, 1.0, 0.5, 0.2])
W = _rng.standard_normal(DIM)
G = HESSIAN @ W
COV = HESSIAN @ SAMPLE_COV @ HESSIAN
GRAD_SQ_NORM, TRACE_COV = G @ G, np.trace(COV)
_ROOT = np.linalg.cholesky(SAMPLE_COV)

PARAMS = {"norm": jnp.asarray(W.reshape(ROWS, COLUMNS), jnp.float32)}


def draw(key, batch):
    """Samples (batch, ROWS, COLUMNS)."""
    x = jax.random.normal(key, (batch, DIM)) @ jnp.asarray(_ROOT.T, jnp.float32)
    return x.reshape(batch, ROWS, COLUMNS)


def loss(params, x):
    """Mean over examples; with taps, so that it serves every method."""
    difference = taps.add(-x, params["norm"]).reshape(-1, DIM)
    h = jnp.asarray(HESSIAN, jnp.float32)
    return 0.5 * jnp.mean(jnp.sum((difference @ h) * difference, axis=-1))


def assert_mean(draws, truth, standard_errors=3.0):
    """The mean of draws lies within so many standard errors of the truth."""
    draws = np.asarray(draws, np.float64)
    z = (draws.mean() - truth) / (draws.std(ddof=1) / np.sqrt(len(draws)))
    assert abs(z) < standard_errors, f"mean {draws.mean():.5g}, truth {truth:.5g}: {z:.2f} standard errors off"
