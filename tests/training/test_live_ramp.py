import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_jax.io import UserError
from scaling_jax.noise_scale import Moments, geometries, unbiased, value_and_grad
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import OptimizerConfig
from scaling_jax.training.live_ramp import METRICS, measure
from scaling_jax.training.program import Program, batch_loss
from scaling_jax.training.run import Metric

MODEL = ModelConfig(1, 16, 1, context=16)
TOKENS = np.random.default_rng(0).integers(0, 257, (64, 17)).astype(np.uint16)


def state_of(optimizer="adam"):
    return Program(MODEL, OptimizerConfig(optimizer), 8, 2, 4, 1).init(0)


@pytest.fixture(scope="module")
def adam_state():
    """With second moments of one: its metric is the Euclidean one."""
    state = state_of()
    adam = state.opt_state[0]
    return state._replace(opt_state=(adam._replace(nu=jax.tree.map(jnp.ones_like, adam.nu)), *state.opt_state[1:]))


def test_every_metric_but_the_training_steps_own_can_be_measured():
    assert {"simple", *METRICS} == set(typing.get_args(Metric))


@pytest.mark.parametrize("metric", ["adam_half", "adam_full"])
def test_moments_give_a_noise_scale_in_tokens(adam_state, metric):
    """16 times that in sequences, each of 16 tokens."""
    loss = value_and_grad(batch_loss(MODEL), num_microbatches=8)
    (_, moments), _ = jax.jit(loss)(adam_state.params, TOKENS)
    grad_sq_norm, trace_cov = map(float, unbiased(moments))
    found = unbiased(Moments(*measure(MODEL, metric, adam_state, TOKENS)))
    np.testing.assert_allclose(found[1] / found[0], 16 * trace_cov / grad_sq_norm, rtol=1e-3)


def test_bounds_in_l1_give_a_noise_scale_in_tokens(adam_state):
    in_l1 = jax.jit(geometries.l1(batch_loss(MODEL), num_microbatches=8))
    expected = geometries.bounds(jax.tree.map(lambda x: x[None], in_l1(adam_state.params, TOKENS)))
    found = geometries.bounds(geometries.NormBounds(*np.array(measure(MODEL, "l1", adam_state, TOKENS))[:, None]))
    np.testing.assert_allclose(found[0], 16 * expected[0], rtol=1e-4)


@pytest.mark.slow
def test_the_spectral_norm_is_that_of_the_matrices_inside_layers(adam_state):
    _, _, grad_high = measure(MODEL, "spectral", adam_state, TOKENS)
    grads = jax.jit(jax.grad(batch_loss(MODEL)))(adam_state.params, TOKENS)["layers"]
    matrices = [x for stack in jax.tree.leaves(grads) if stack.ndim == 3 for x in stack]
    assert len(matrices) == 4
    nuclear = sum(np.linalg.norm(x, "nuc") for x in matrices)
    np.testing.assert_allclose(grad_high, nuclear, rtol=0.02)


@pytest.mark.slow
def test_curvature_is_that_of_the_second_half_and_gradients_those_of_the_first(adam_state):
    loss, (first, second) = batch_loss(MODEL), np.split(TOKENS, 2)
    grads = jax.jit(jax.grad(loss))(adam_state.params, first)
    _, product = jax.jit(lambda *at: jax.jvp(lambda p: jax.grad(loss)(p, second), at[:1], at[1:]))(
        adam_state.params, grads
    )
    expected = sum(float(jnp.sum(g * h)) for g, h in zip(*map(jax.tree.leaves, (grads, product)), strict=True))
    _, big, small_batch, big_batch = measure(MODEL, "curvature", adam_state, TOKENS)
    np.testing.assert_allclose(big, expected, rtol=1e-3)
    assert (small_batch, big_batch) == (4 * 16, 32 * 16)


def test_adams_metric_without_adam_is_refused():
    with pytest.raises(UserError, match=r"live_ramp\.metric = 'adam_half' takes second moments of every parameter"):
        measure(MODEL, "adam_half", state_of("sgd"), TOKENS)
