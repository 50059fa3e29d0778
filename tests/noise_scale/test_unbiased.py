"""Moments over 20,000 draws of a batch against their closed forms, for every method, metric and split."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import noisy_quadratic as quadratic
from scaling_jax.noise_scale import Moments, curvature, fixed_denominator, unbiased, value_and_grad
from tests.noise_scale.agreement import assert_mean

DRAWS, BATCH = 20_000, 16


def moments_of_draws(fn, num_devices, seed=0, batch=BATCH):
    """Moments of `fn(params, x)` on DRAWS batches, each split over `num_devices` virtual ones."""

    def one(key):
        x = quadratic.draw(key, batch)
        x = x.reshape(num_devices, -1, *x.shape[1:])
        (_, moments), _ = jax.vmap(fn, in_axes=(None, 0), axis_name="data", out_axes=None)(quadratic.PARAMS, x)
        return moments

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(seed), DRAWS))


QUICK = [(1, 2), (1, 4), (4, 1), (8, 2)]
SPLITS = [split for split in itertools.product((1, 2, 4, 8), (1, 2, 4)) if split != (1, 1) and np.prod(split) <= 16]


@pytest.mark.parametrize(
    ("num_devices", "num_microbatches"),
    [pytest.param(*split, marks=() if split in QUICK else pytest.mark.slow) for split in SPLITS],
)
def test_two_batch_moments_are_unbiased(num_devices, num_microbatches):
    fn = value_and_grad(quadratic.loss, num_microbatches=num_microbatches, axis_name="data")
    g2, tr = unbiased(moments_of_draws(fn, num_devices))
    assert_mean(g2, quadratic.GRAD_SQ_NORM)
    assert_mean(tr, quadratic.TRACE_COV)


@pytest.mark.parametrize(
    ("method", "num_devices", "num_microbatches"),
    [
        ("per_example", 1, 1),
        ("norm_layers", 2, 4),
        *(
            pytest.param(method, *split, marks=pytest.mark.slow)
            for method in ("per_example", "norm_layers")
            for split in [(1, 4), (4, 1), (4, 4), (8, 2)]
        ),
    ],
)
def test_per_example_moments_are_unbiased(method, num_devices, num_microbatches):
    fn = value_and_grad(quadratic.loss, method=method, num_microbatches=num_microbatches, axis_name="data")
    g2, tr = unbiased(moments_of_draws(fn, num_devices))
    assert_mean(g2, quadratic.GRAD_SQ_NORM)
    assert_mean(tr, quadratic.TRACE_COV)


def test_adam_norms_are_unbiased_and_apart():
    fn = value_and_grad(quadratic.loss, num_microbatches=2, axis_name="data", norm=quadratic.adam_norm())
    g2, tr = unbiased(moments_of_draws(fn, 2))
    for name, (of_g, of_cov) in quadratic.ADAM_MOMENTS.items():
        assert_mean(g2[name], of_g)
        assert_mean(tr[name], of_cov)


def test_curvature_weighted_moments_are_unbiased_with_a_hessian_per_device():
    """The Hessian is noisy, and every device has its own data for it."""

    def loss(params, x):
        # A scale of mean 1 that differs by example makes the Hessian noisy, without touching its mean.
        scale = 1 + 0.5 * jnp.sign(x[:, :1, 0])
        return quadratic.loss(params, x) + 0.5 * jnp.mean((scale - 1) * jnp.sum(params["norm"]) ** 2)

    def fn(params, x):
        gradient_x, hessian_x = jnp.split(x, 2)
        norm = curvature(loss, params, hessian_x)
        return value_and_grad(quadratic.loss, num_microbatches=2, axis_name="data", norm=norm)(params, gradient_x)

    g2, tr = unbiased(moments_of_draws(fn, 2, batch=2 * BATCH))
    assert_mean(g2, quadratic.GRAD_CURVATURE)
    assert_mean(tr, quadratic.NOISE_CURVATURE)


def test_unequal_weights_are_unbiased_with_a_fixed_denominator():
    """Examples of weight 0, 1 or 2: dividing by the batch's own weights would bias |G|²; a constant doesn't."""

    def weighted_sum(params, batch):
        difference = (params["norm"][None] - batch["x"]).reshape(-1, quadratic.DIM)
        h = jnp.asarray(quadratic.HESSIAN, jnp.float32)
        return 0.5 * jnp.sum(batch["weight"] * jnp.sum((difference @ h) * difference, axis=-1))

    fn = value_and_grad(fixed_denominator(weighted_sum, weight_per_example=1.0), num_microbatches=4)

    def one(key):
        weight = jax.random.randint(jax.random.fold_in(key, 1), (BATCH,), 0, 3).astype(jnp.float32)
        return fn(quadratic.PARAMS, {"x": quadratic.draw(key, BATCH), "weight": weight})[0][1]

    g2, tr = unbiased(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), DRAWS)))
    mean_sq_weight = 5 / 3
    assert_mean(g2, quadratic.GRAD_SQ_NORM)
    sq_norm_of_one = mean_sq_weight * (quadratic.TRACE_COV + quadratic.GRAD_SQ_NORM)
    assert_mean(tr, sq_norm_of_one - quadratic.GRAD_SQ_NORM)


def test_without_replacement_moments_enumerate_exactly():
    """Of all 20 ways to draw 3 of 6 examples, the mean moments equal the finite population's, with its 1/(N − 1)."""
    population = np.asarray(quadratic.draw(jax.random.key(0), 6), np.float64).reshape(6, -1)
    grads = (quadratic.W - population) @ quadratic.HESSIAN
    draws = np.array([grads[list(index)] for index in itertools.permutations(range(6), 3)])
    small = np.mean(np.sum(draws**2, axis=-1), axis=-1)
    big = np.sum(draws.mean(1) ** 2, axis=-1)
    g2, tr = unbiased(Moments(small, big, np.float64(1), np.float64(3)))
    mean, cov_trace = grads.mean(0), grads.var(axis=0, ddof=1).sum()
    np.testing.assert_allclose(tr.mean(), cov_trace, rtol=1e-12)
    np.testing.assert_allclose(g2.mean(), mean @ mean - cov_trace / 6, rtol=1e-12)
