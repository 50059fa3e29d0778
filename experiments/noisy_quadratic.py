"""Is every noise-scale estimator right? A noisy quadratic on which all of them are known in closed form.

    python experiments/noisy_quadratic.py

Loss ½ (w − x)ᵀH(w − x), averaged over x ~ N(0, S): gradient G = Hw, covariance of the one-example gradient Σ = HSH.
H and S are rotated against each other, so that nothing is diagonal by luck. Prints each quantity's truth, the mean of
20,000 draws of a batch, and how many standard errors lie between them.

Takes 20 seconds on two CPU cores. Expect every two-batch and per-example quantity within 3 standard errors, the
spectral noise, whose bias is corrected to second order only, within 1 %, and the ℓ1 and spectral gradient norms between
their bounds.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from scaling_jax.noise_scale import adam_norms, curvature, geometries, taps, unbiased, value_and_grad

ROWS, COLUMNS = 3, 2
DIM = ROWS * COLUMNS
DRAWS, BATCH = 20_000, 32

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
GRAD_CURVATURE, NOISE_CURVATURE = G @ HESSIAN @ G, np.trace(HESSIAN @ COV)

L1_NOISE = np.sqrt(np.diag(COV)).sum()
L1_GRAD = np.abs(G).sum()
_SHORT_SIDE_COV = np.einsum("kikj->ij", COV.reshape(ROWS, COLUMNS, ROWS, COLUMNS))  # of the columns
SPECTRAL_NOISE = np.sqrt(np.linalg.eigvalsh(_SHORT_SIDE_COV)).sum()
SPECTRAL_GRAD = np.linalg.norm(G.reshape(ROWS, COLUMNS), "nuc")

ADAM_NU, ADAM_EPS = np.arange(1.0, 1 + DIM), 0.1
_ADAM_WEIGHT = 1 / (np.sqrt(ADAM_NU) + ADAM_EPS)
ADAM_MOMENTS = {  # name: (of G, of Σ)
    "adam_half": (_ADAM_WEIGHT @ G**2, _ADAM_WEIGHT @ np.diag(COV)),
    "adam_full": (_ADAM_WEIGHT**2 @ G**2, _ADAM_WEIGHT**2 @ np.diag(COV)),
}

PARAMS = {"norm": jnp.asarray(W.reshape(ROWS, COLUMNS), jnp.float32)}


def draw(key, batch):
    """Samples (batch, ROWS, COLUMNS)."""
    root = jnp.asarray(np.linalg.cholesky(SAMPLE_COV).T, jnp.float32)
    return (jax.random.normal(key, (batch, DIM)) @ root).reshape(batch, ROWS, COLUMNS)


def loss(params, x):
    """Mean over examples; with taps, so that it serves every method."""
    difference = taps.add(-x, params["norm"]).reshape(-1, DIM)
    h = jnp.asarray(HESSIAN, jnp.float32)
    return 0.5 * jnp.mean(jnp.sum((difference @ h) * difference, axis=-1))


def adam_norm():
    """The norm whose moments are `ADAM_MOMENTS`."""
    return adam_norms({"norm": jnp.asarray(ADAM_NU.reshape(ROWS, COLUMNS), jnp.float32)}, ADAM_EPS)


class Row(NamedTuple):
    quantity: str
    truth: Any  # a number
    draws: Any  # [DRAWS]


def measure() -> Iterator[Row]:
    """Every quantity with its draws."""
    keys = jax.random.split(jax.random.key(0), DRAWS)

    def draws_of(fn):
        return jax.jit(jax.vmap(lambda key: fn(PARAMS, draw(key, BATCH))))(keys)

    def moments(**kwargs):
        fn = value_and_grad(loss, **kwargs)
        return unbiased(draws_of(lambda params, x: fn(params, x)[0][1]))

    for name, method in (("two batches", {"num_microbatches": 4}), ("per example", {"method": "per_example"})):
        g2, tr = moments(**method)
        yield Row(f"|G|², {name}", GRAD_SQ_NORM, g2)
        yield Row(f"tr Σ, {name}", TRACE_COV, tr)
    g2, tr = moments(num_microbatches=4, norm=adam_norm())
    for name, (of_g, of_cov) in ADAM_MOMENTS.items():
        yield Row(f"{name} of G", of_g, g2[name])
        yield Row(f"{name} of Σ", of_cov, tr[name])
    g2, tr = moments(num_microbatches=4, norm=curvature(loss, PARAMS, draw(jax.random.key(1), BATCH)))
    yield Row("GᵀHG", GRAD_CURVATURE, g2)
    yield Row("tr HΣ", NOISE_CURVATURE, tr)
    for name, noise, grad in (("l1", L1_NOISE, L1_GRAD), ("spectral", SPECTRAL_NOISE, SPECTRAL_GRAD)):
        series = draws_of(getattr(geometries, name)(loss, num_microbatches=8))
        yield Row(f"{name} noise", noise, series.noise)
        yield Row(f"{name} |G|, at least", grad, series.grad_low)
        yield Row(f"{name} |G|, at most", grad, series.grad_high)


def main() -> None:
    print(f"B_simple = {TRACE_COV / GRAD_SQ_NORM:.3f}, B_noise = {NOISE_CURVATURE / GRAD_CURVATURE:.3f} examples,")
    print(f"B_l1 = {(L1_NOISE / L1_GRAD) ** 2:.3f}, B_spectral = {(SPECTRAL_NOISE / SPECTRAL_GRAD) ** 2:.3f} examples")
    print(f"{'':24}{'truth':>10}{'measured':>10}{'standard errors':>17}{'ratio':>8}")
    for quantity, truth, draws in measure():
        draws = np.asarray(draws, np.float64)
        mean, error = draws.mean(), draws.std(ddof=1) / np.sqrt(len(draws))
        print(f"{quantity:24}{truth:10.4f}{mean:10.4f}{(mean - truth) / error:17.2f}{mean / truth:8.3f}", flush=True)


if __name__ == "__main__":
    main()
