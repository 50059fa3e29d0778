"""ℓ1 and spectral noise scales on the quadratic, where both are known."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from experiments import noisy_quadratic as quadratic
from scaling_jax.noise_scale import every, geometries
from scaling_jax.noise_scale.geometries import nuclear_norm, polar_factor, trace_sqrt
from tests.noise_scale.agreement import assert_mean

DRAWS = 2_000
TRUTH = {
    "l1": (quadratic.L1_NOISE, quadratic.L1_GRAD),
    "spectral": (quadratic.SPECTRAL_NOISE, quadratic.SPECTRAL_GRAD),
}


@cache
def series(metric, num_microbatches, num_devices=1, batch=64):
    measure = getattr(geometries, metric)(quadratic.loss, num_microbatches=num_microbatches, axis_name="data")

    def one(key):
        x = quadratic.draw(key, batch)
        x = x.reshape(num_devices, -1, *x.shape[1:])
        return jax.vmap(measure, in_axes=(None, 0), axis_name="data", out_axes=None)(quadratic.PARAMS, x)

    return jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), DRAWS))


@pytest.mark.parametrize(("num_devices", "num_microbatches"), [(1, 2), (1, 4), (4, 2)])
def test_l1_noise_is_unbiased_even_from_two_small_batches(num_devices, num_microbatches):
    """Uncorrected it would be 20 % too small at n = 2."""
    assert_mean(series("l1", num_microbatches, num_devices).noise, quadratic.L1_NOISE)


def test_spectral_noise_is_corrected_for_few_small_batches():
    """Within 1 % of truth from 8 small batches, where the plug-in value is too small by more than 3 %."""
    noise = np.asarray(series("spectral", 8).noise, np.float64).mean()
    assert abs(noise / quadratic.SPECTRAL_NOISE - 1) < 0.01, noise / quadratic.SPECTRAL_NOISE


@pytest.mark.parametrize("metric", ["l1", "spectral"])
@pytest.mark.parametrize("batch", [16, pytest.param(256, marks=pytest.mark.slow)])
def test_gradient_bounds_hold_and_close_with_the_batch(metric, batch):
    noise, grad = TRUTH[metric]
    draws = series(metric, 8, batch=batch)
    low, high = draws.grad_low.mean(), draws.grad_high.mean()
    assert low <= grad <= high
    assert (high - low) / grad < (0.6 if batch == 16 else 0.1)
    low, high = geometries.bounds(draws)
    assert 0.99 * low < (noise / grad) ** 2 < 1.01 * high  # the noise is corrected to 1 %, not bounded


def test_bounds_are_one_sided_without_a_gradient():
    noise, zero = np.ones(3), np.zeros(3)
    assert geometries.bounds(geometries.NormBounds(noise, zero, noise)) == (1, np.inf)


@pytest.mark.parametrize("check_vma", [pytest.param(False, marks=pytest.mark.slow), True])
@pytest.mark.parametrize("metric", ["l1", "spectral"])
def test_devices_give_what_microbatches_give(metric, check_vma):
    """Halves are the first and last microbatches of every device, so the order of examples is arranged to match."""
    x = quadratic.draw(jax.random.key(0), 32)
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    make = getattr(geometries, metric)

    def step(params, x):
        return every(2, jnp.int32(4), make(quadratic.loss, num_microbatches=2, axis_name="data"), params, x)

    fn = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P(), check_vma=check_vma))
    measured, got = fn(quadratic.PARAMS, x)
    assert measured
    halves_first = x.reshape(4, 2, 4, *x.shape[1:]).swapaxes(0, 1).reshape(x.shape)
    want = jax.jit(make(quadratic.loss, num_microbatches=8, axis_name=()))(quadratic.PARAMS, halves_first)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4), got, want)


def test_every_measures_on_its_steps_only():
    """The other steps don't run the measurement at all: a callback inside it counts."""
    calls = []

    def measure(x):
        jax.debug.callback(lambda: calls.append(1))
        return {"twice": 2 * x}

    fn = jax.jit(lambda step, x: every(3, step, measure, x))
    outputs = [fn(jnp.int32(step), jnp.float32(5)) for step in range(7)]
    jax.effects_barrier()
    assert [bool(measured) for measured, _ in outputs] == [step % 3 == 0 for step in range(7)]
    assert [float(value["twice"]) for _, value in outputs] == [10.0 if step % 3 == 0 else 0.0 for step in range(7)]
    assert len(calls) == 3


def test_stacked_matrices_count_one_by_one_and_vectors_not_at_all():
    def loss(params, x):
        return quadratic.loss({"norm": params["w"][0] + params["w"][1]}, x) + jnp.sum(params["b"])

    x = quadratic.draw(jax.random.key(0), 16)
    params = {"w": jnp.stack([quadratic.PARAMS["norm"]] * 2), "b": jnp.ones(3)}
    both = jax.jit(geometries.spectral(loss, num_microbatches=4, stacked=lambda name: name == "w"))(params, x)
    one = jax.jit(geometries.spectral(quadratic.loss, num_microbatches=4))({"norm": params["w"].sum(0)}, x)
    np.testing.assert_allclose(both.noise, 2 * one.noise, rtol=1e-4)
    np.testing.assert_allclose(both.grad_high, 2 * one.grad_high, rtol=1e-4)
    with pytest.raises(ValueError, match="selected matrix"):
        geometries.spectral(loss, num_microbatches=4)(params, x)


@pytest.mark.parametrize(("metric", "num_microbatches"), [("l1", 1), ("l1", 3), ("spectral", 2)])
def test_too_few_small_batches_are_refused(metric, num_microbatches):
    with pytest.raises(ValueError, match="two halves"):
        getattr(geometries, metric)(quadratic.loss, num_microbatches=num_microbatches)(
            quadratic.PARAMS, quadratic.draw(jax.random.key(0), 12)
        )


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_newton_schulz_matches_the_singular_value_decomposition(shape):
    rng = np.random.default_rng(0)
    u, _, vt = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    singular = np.array([[1, 2, 3, smallest] for smallest in (1.0, 1e-2, 0.0)])
    g = jnp.asarray((u * singular[:, None, :]) @ vt, jnp.float32)
    np.testing.assert_allclose(jax.vmap(nuclear_norm)(g), singular.sum(1), rtol=1e-4)
    np.testing.assert_allclose(jax.vmap(trace_sqrt)(g @ g.mT), singular.sum(1), rtol=1e-3)
    np.testing.assert_allclose(jax.vmap(polar_factor)(g[:2]), np.stack([u @ vt] * 2), atol=1e-4)


def test_newton_schulz_of_zero_is_zero():
    assert trace_sqrt(jnp.zeros((3, 3))) == 0
    assert nuclear_norm(jnp.zeros((3, 4))) == 0
