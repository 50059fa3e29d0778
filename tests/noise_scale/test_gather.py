"""FSDP by hand: each device's own gradient is a small batch, though no device keeps it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from scaling_jax.noise_scale import sq_norm, taps, value_and_grad

LAYERS, D, B = 3, 16, 32
_rng = np.random.default_rng(0)
PARAMS = {
    "layers": jnp.asarray(_rng.normal(size=(LAYERS, D, D)) / 4, jnp.float32),
    "bias": jnp.asarray(_rng.normal(size=D), jnp.float32),
    "head": jnp.asarray(_rng.normal(size=(D, 5)), jnp.float32),
}
SPECS = {"layers": P(None, "data"), "bias": P(), "head": P(None, None)}
X = jnp.asarray(_rng.normal(size=(B, D)), jnp.float32)
is_stacked = {"layers": True, "bias": False, "head": False}.get


def forward(params, x, gather):
    def layer(x, w):
        return jnp.tanh(taps.einsum("bd,de->be", x, gather(w))), None

    x, _ = jax.lax.scan(layer, taps.add(x, params["bias"]), params["layers"])
    return jnp.mean(jnp.sum(taps.einsum("bd,dc->bc", x, params["head"]) ** 2, axis=-1))


def whole_loss(params, x):
    return forward(params, x, lambda w: w)


def sharded_loss(params, x):
    return forward(params, x, lambda w: taps.all_gather(w, "data"))


def on_devices(fn, check_vma, num_devices=8):
    mesh = jax.make_mesh((num_devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:num_devices])
    specs = {"in_specs": (SPECS, P("data")), "out_specs": (P(), SPECS)}
    return jax.jit(jax.shard_map(fn, mesh=mesh, check_vma=check_vma, **specs))


def assert_same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), jax.device_get(got), want)


@pytest.mark.parametrize(
    ("check_vma", "m", "groups"),
    [
        (True, 1, lambda name: name),
        (False, 2, None),
        pytest.param(True, 2, None, marks=pytest.mark.slow),
        pytest.param(False, 1, lambda name: name, marks=pytest.mark.slow),
    ],
)
def test_devices_with_shards_give_what_devices_with_whole_parameters_give(check_vma, m, groups):
    options = {"groups": groups, "stacked": is_stacked}
    got = on_devices(value_and_grad(sharded_loss, num_microbatches=m, axis_name="data", **options), check_vma)(
        PARAMS, X
    )
    want = jax.jit(value_and_grad(whole_loss, num_microbatches=8 * m, axis_name=(), **options))(PARAMS, X)
    assert_same(got, want)


def test_layers_of_a_scan_need_no_name():
    """`stacked` is for groups only: that a loop gathers a layer at a time shows in the loss."""
    got = on_devices(value_and_grad(sharded_loss, axis_name="data"), True)(PARAMS, X)
    assert_same(got, jax.jit(value_and_grad(whole_loss, num_microbatches=8, axis_name=()))(PARAMS, X))


@pytest.mark.parametrize("check_vma", [True, False])
def test_single_examples_are_measured_through_a_gather(check_vma):
    options = {"method": "per_example", "stacked": is_stacked}
    got = on_devices(value_and_grad(sharded_loss, axis_name="data", **options), check_vma)(PARAMS, X)
    assert_same(got, jax.jit(value_and_grad(whole_loss, **options))(PARAMS, X))


def test_the_same_by_pmap_and_vmap():
    shards = {**PARAMS, "layers": PARAMS["layers"].reshape(LAYERS, 8, 2, D).swapaxes(0, 1)}
    axes = {"layers": 0, "bias": None, "head": None}
    fn = value_and_grad(sharded_loss, axis_name="data", stacked=is_stacked)
    want = jax.jit(value_and_grad(whole_loss, num_microbatches=8, axis_name=()))(PARAMS, X)
    for mapping in (jax.pmap, jax.vmap):
        mapped = (
            mapping(fn, "data", in_axes=(axes, 0)) if mapping is jax.pmap else jax.vmap(fn, (axes, 0), axis_name="data")
        )
        value, grads = mapped(shards, X.reshape(8, 4, D))
        layers = grads["layers"].swapaxes(0, 1).reshape(LAYERS, D, D)
        assert_same(
            (jax.tree.map(lambda x: x[0], (value, grads["bias"])), layers),
            ((want[0], want[1]["bias"]), want[1]["layers"]),
        )


def test_a_pytree_is_gathered_leaf_by_leaf():
    params = {"a": PARAMS["head"], "b": [PARAMS["bias"]]}
    specs = {"a": P("data"), "b": [P("data")]}
    loss = lambda p, x: jnp.mean(jnp.tanh(x @ p["a"] + jnp.sum(p["b"][0]) * x[:, :1]) ** 2)  # noqa: E731
    mesh = jax.make_mesh((8,), ("data",), (AxisType.Auto,))
    fn = value_and_grad(lambda p, x: loss(taps.all_gather(p, "data"), x), axis_name="data")
    fn = jax.shard_map(fn, mesh=mesh, in_specs=(specs, P("data")), out_specs=(P(), specs))
    assert_same(jax.jit(fn)(params, X), jax.jit(value_and_grad(loss, num_microbatches=8, axis_name=()))(params, X))


def test_shards_over_some_of_the_axes():
    """Hybrid sharding: hosts have copies, the chips of a host have shards."""
    mesh = jax.make_mesh((2, 4), ("hosts", "chips"), (AxisType.Auto,) * 2)
    specs = {"layers": P(None, "chips"), "bias": P(), "head": P()}
    loss = lambda params, x: forward(params, x, lambda w: taps.all_gather(w, "chips"))  # noqa: E731
    for check_vma in (True, False):
        fn = value_and_grad(loss, axis_name=("hosts", "chips"), stacked=is_stacked)
        fn = jax.shard_map(
            fn, mesh=mesh, in_specs=(specs, P(("hosts", "chips"))), out_specs=(P(), specs), check_vma=check_vma
        )
        assert_same(
            jax.jit(fn)(PARAMS, X), jax.jit(value_and_grad(whole_loss, num_microbatches=8, axis_name=()))(PARAMS, X)
        )


def test_outside_of_the_estimator_it_is_a_plain_gather():
    (grads,) = (
        on_devices(lambda p, x: (jax.lax.pmean(sharded_loss(p, x), "data"), jax.grad(sharded_loss)(p, x)), False)(
            PARAMS, X
        )[1],
    )
    want = jax.grad(whole_loss)(PARAMS, X)
    np.testing.assert_allclose(grads["layers"] / 8, want["layers"], rtol=1e-5, atol=1e-6)


def test_the_local_gradient_costs_no_message_but_one_number():
    fn = on_devices(value_and_grad(sharded_loss, axis_name="data", stacked=is_stacked), False)
    hlo = fn.lower(PARAMS, X).compile().as_text()
    assert hlo.count(" reduce-scatter(") + hlo.count(" reduce-scatter-start(") == 1


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (
            lambda p, x: jnp.mean(x) * jnp.sum(p["layers"] ** 2),
            {},
            "'layers' differs between the devices along .*taps.all_gather",
        ),
        (sharded_loss, {"norm": sq_norm}, "norm needs whole gradients.*layers"),
        (lambda p, x: sharded_loss(p, x) + jnp.sum(taps.all_gather(p["layers"], "data", 1)), {}, "'layers' twice"),
        (lambda p, x: sharded_loss(p, x) + jnp.sum(p["layers"] ** 2), {}, "uses the shard of 'layers' itself"),
        (lambda p, x: sharded_loss(p, x) + jnp.mean(taps.all_gather(x, "data")), {}, "isn't one parameter"),
    ],
)
def test_shards_that_cannot_be_measured_are_refused(loss, options, message):
    fn = on_devices(value_and_grad(loss, axis_name="data", num_microbatches=2, **options), True)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(fn, PARAMS, X)
