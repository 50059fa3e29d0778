"""A step of several calls: the same moments as a step of one call, with clipping, loss scales and bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from experiments import noisy_quadratic as quadratic
from scaling_jax.noise_scale import Accumulator, tracker, value_and_grad

M, B = 4, 8
X = quadratic.draw(jax.random.key(0), 2 * M * B).reshape(2, M, B, quadratic.ROWS, quadratic.COLUMNS)


def whole_step(x, loss=quadratic.loss, params=quadratic.PARAMS):
    return value_and_grad(loss, num_microbatches=M, axis_name=())(params, x.reshape(M * B, *x.shape[2:]))


def assert_same(got, want, rtol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=1e-6), got, want)


def test_calls_of_a_step_give_what_one_call_gives_and_the_tracker_sees_steps():
    """With `optax.MultiSteps`, which clips: the norms are from before."""
    accumulator, (init, update, _) = Accumulator(M, B), tracker(10)
    optimizer = optax.MultiSteps(optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(0.1)), M)
    params = quadratic.PARAMS

    @jax.jit
    def call(params, opt_state, state, noise, x):
        grads = jax.grad(quadratic.loss)(params, x)
        moments, mean, state = accumulator.update(grads, state)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, state, update(moments, noise), moments, mean

    opt_state, state, noise = optimizer.init(params), accumulator.init(params), init()
    for step in range(2):
        (_, want), want_grads = whole_step(X[step], params=params)
        for k in range(M):
            params, opt_state, state, noise, moments, mean = call(params, opt_state, state, noise, X[step, k])
            assert (moments.small_batch > 0) == (k == M - 1)
            assert noise.steps == step + (k == M - 1)
        assert_same((moments, mean), (want, want_grads))
    assert noise.flagged_steps == 0


def test_loss_scale_and_bfloat16_gradients_are_summed_in_float32():
    accumulator = Accumulator(num_microbatches=1_024, microbatch=1)
    state = accumulator.init({"w": jnp.zeros(8, jnp.bfloat16)})

    def call(state, _):
        moments, mean, state = accumulator.update({"w": jnp.full(8, 2.0**10, jnp.bfloat16)}, state, loss_scale=2.0**10)
        return state, (moments, mean)

    _, (moments, mean) = jax.jit(lambda state: jax.lax.scan(call, state, length=1_024))(state)
    assert mean["w"].dtype == jnp.float32
    assert_same((mean["w"][-1], moments.big_sq_norm[-1], moments.small_sq_norm[-1]), (np.ones(8), 8.0, 8.0))


def test_weighted_sums_and_groups():
    weights = jnp.asarray(np.random.default_rng(0).random(M * B), jnp.float32).reshape(M, B)

    def weighted(params, batch):
        x, w = batch
        squares = ((params["norm"][None] - x) ** 2).sum((1, 2))
        return jnp.sum(w * squares), jnp.sum(w)

    accumulator = Accumulator(M, B, groups=lambda name: name)
    state = accumulator.init(quadratic.PARAMS)
    for k in range(M):
        grads, weight = jax.grad(weighted, has_aux=True)(quadratic.PARAMS, (X[0, k], weights[k]))
        moments, mean, state = accumulator.update(grads, state, weight=weight)
    fn = value_and_grad(weighted, weighted=True, num_microbatches=M, axis_name=(), groups=lambda name: name)
    (_, want), want_grads = fn(quadratic.PARAMS, (X[0].reshape(-1, *X.shape[3:]), weights.reshape(-1)))
    assert_same((moments, mean), (want, want_grads))
    assert state.calls == 0


@pytest.mark.parametrize("check_vma", [True, False])
def test_devices_pass_their_own_gradients(check_vma):
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    accumulator = Accumulator(2, B // 4, axis_name="data")

    def step(params, x):
        state = accumulator.init(params)
        for half in (x[0], x[1]):
            own = jax.lax.pcast(params, "data", to="varying") if check_vma else params
            moments, mean, state = accumulator.update(jax.grad(quadratic.loss)(own, half), state)
        return moments, mean

    specs = {"in_specs": (P(), P(None, "data")), "out_specs": P()}
    got = jax.jit(jax.shard_map(step, mesh=mesh, check_vma=check_vma, **specs))(quadratic.PARAMS, X[0, :2])
    parts = X[0, :2].reshape(2 * B, *X.shape[3:])
    (_, want), want_grads = value_and_grad(quadratic.loss, num_microbatches=8, axis_name=())(quadratic.PARAMS, parts)
    assert_same(got, (want, want_grads))


def test_gradients_that_are_summed_already_are_refused():
    mesh = jax.make_mesh((4,), ("data",), (AxisType.Auto,), devices=jax.devices()[:4])
    accumulator = Accumulator(2, B // 4, axis_name="data")

    def step(params, x):
        return accumulator.update(jax.grad(quadratic.loss)(params, x), accumulator.init(params))[0]

    fn = jax.shard_map(step, mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
    with pytest.raises(ValueError, match=r"'norm' is already summed over \['data'\]"):
        jax.eval_shape(fn, quadratic.PARAMS, X[0, 0])


@pytest.mark.parametrize("sizes", [(0, 8), (4, 0), (1, 8)])
def test_sizes_that_measure_nothing_are_refused(sizes):
    with pytest.raises(ValueError, match="microbatch"):
        Accumulator(*sizes)
