"""`value_and_grad` as a drop-in: the same numbers on every kind of mapped axis, and one clear line on bad input."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from experiments import noisy_quadratic as quadratic
from scaling_jax.noise_scale import (
    Moments,
    check_mean_loss,
    curvature,
    fixed_denominator,
    sq_norm,
    tracker,
    unbiased,
    value_and_grad,
)

BATCH = 32
VALUE_AND_GRAD, GRAD = jax.jit(jax.value_and_grad(quadratic.loss)), jax.jit(jax.grad(quadratic.loss))


def mesh_of(num_devices):
    return jax.make_mesh((num_devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:num_devices])


def on_devices(how, num_devices, fn):
    """`fn(params, x)` with x split over devices, its replicated result."""
    if how.startswith("shard_map"):
        check = how == "shard_map_check_vma"
        return jax.jit(
            jax.shard_map(fn, mesh=mesh_of(num_devices), in_specs=(P(), P("data")), out_specs=P(), check_vma=check)
        )
    if how == "pmap":
        mapped = jax.pmap(fn, "data", in_axes=(None, 0), out_axes=None, devices=jax.devices()[:num_devices])
    else:
        mapped = jax.jit(jax.vmap(fn, in_axes=(None, 0), out_axes=None, axis_name="data"))
    return lambda params, x: mapped(params, x.reshape(num_devices, -1, *x.shape[1:]))


QUICK = [(1, 2), (4, 4), (8, 1)]
SPLITS = [(d, m) for d in (1, 2, 4, 8) for m in (1, 2, 4) if d * m > 1]


@pytest.mark.parametrize(
    ("num_devices", "num_microbatches"),
    [pytest.param(*split, marks=() if split in QUICK else pytest.mark.slow) for split in SPLITS],
)
@pytest.mark.parametrize("how", ["pmap", "shard_map", "shard_map_check_vma", "vmap"])
def test_every_split_gives_the_whole_batch_gradient_and_its_own_small_norms(how, num_devices, num_microbatches):
    """With `shard_map_check_vma` this fails if JAX sums the gradients of replicated parameters over devices."""
    x = quadratic.draw(jax.random.key(0), BATCH)
    fn = value_and_grad(quadratic.loss, num_microbatches=num_microbatches, axis_name="data")
    (loss, m), grads = on_devices(how, num_devices, fn)(quadratic.PARAMS, x)

    want_loss, want = VALUE_AND_GRAD(quadratic.PARAMS, x)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    np.testing.assert_allclose(grads["norm"], want["norm"], rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(m.big_sq_norm, sq_norm(want), rtol=1e-6)
    chunks = x.reshape(num_devices * num_microbatches, -1, *x.shape[1:])
    small = jax.vmap(lambda chunk: sq_norm(GRAD(quadratic.PARAMS, chunk)))(chunks)
    np.testing.assert_allclose(m.small_sq_norm, np.mean(small), rtol=1e-5)
    assert (m.small_batch, m.big_batch) == (BATCH // len(chunks), BATCH)


@pytest.mark.parametrize("how", ["pmap", "shard_map_check_vma", "vmap"])
@pytest.mark.parametrize("method", ["per_example", "curvature"])
def test_other_methods_agree_on_every_kind_of_axis(how, method):
    x = quadratic.draw(jax.random.key(0), BATCH)

    def fn(params, x):
        norm = curvature(quadratic.loss, params, x) if method == "curvature" else None
        chosen = "two_batch" if method == "curvature" else method
        return value_and_grad(quadratic.loss, axis_name="data", method=chosen, num_microbatches=2, norm=norm)(params, x)

    (_, m), _ = on_devices(how, 4, fn)(quadratic.PARAMS, x)
    example_grads = jax.vmap(lambda e: jax.grad(quadratic.loss)(quadratic.PARAMS, e[None])["norm"])(x)
    grads = example_grads.reshape(8 if method == "curvature" else BATCH, -1, quadratic.DIM).mean(1)
    h = quadratic.HESSIAN if method == "curvature" else np.eye(quadratic.DIM)
    np.testing.assert_allclose(m.small_sq_norm, np.mean([g @ h @ g for g in grads]), rtol=1e-5)
    np.testing.assert_allclose(m.big_sq_norm, grads.mean(0) @ h @ grads.mean(0), rtol=1e-5)


def test_two_mapped_axes_together_are_one_batch():
    x = quadratic.draw(jax.random.key(0), BATCH)
    mesh = jax.make_mesh((2, 4), ("hosts", "chips"), (AxisType.Auto,) * 2)
    fn = value_and_grad(quadratic.loss, axis_name=("hosts", "chips"))
    fn = jax.jit(jax.shard_map(fn, mesh=mesh, in_specs=(P(), P(("hosts", "chips"))), out_specs=P()))
    (_, m), grads = fn(quadratic.PARAMS, x)
    (_, want), want_grads = value_and_grad(quadratic.loss, num_microbatches=8, axis_name=())(quadratic.PARAMS, x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), (m, grads), (want, want_grads))


def test_a_population_inside_scan_gives_every_run_its_own_moments():
    """An outer vmap over runs and a scan over steps, as the training loop has them."""
    x = quadratic.draw(jax.random.key(0), 3 * BATCH).reshape(3, BATCH, quadratic.ROWS, quadratic.COLUMNS)
    params = {"norm": jnp.stack([quadratic.PARAMS["norm"] * scale for scale in (1.0, 2.0, -1.0)])}
    fn = value_and_grad(quadratic.loss, num_microbatches=4)

    def step(params, _):
        (_, moments), grads = jax.vmap(fn)(params, x)
        return jax.tree.map(lambda p, g: p - 0.1 * g, params, grads), moments

    _, moments = jax.jit(lambda p: jax.lax.scan(step, p, length=2))(params)
    assert moments.small_sq_norm.shape == (2, 3)
    one_run = jax.jit(fn)
    for run in range(3):
        (_, want), _ = one_run(jax.tree.map(lambda p, run=run: p[run], params), x[run])
        np.testing.assert_allclose(moments.small_sq_norm[0, run], want.small_sq_norm, rtol=1e-5)
        np.testing.assert_allclose(moments.big_sq_norm[0, run], want.big_sq_norm, rtol=1e-5)


def test_aux_is_averaged_and_extra_arguments_reach_the_loss():
    def loss(params, x, shift):
        return quadratic.loss(params, x + shift), {"first": jnp.mean(x[:, 0, 0])}

    x = quadratic.draw(jax.random.key(0), BATCH)
    fn = value_and_grad(loss, num_microbatches=2, axis_name="data", has_aux=True)
    (value, _, aux), _ = on_devices("pmap", 2, lambda p, x: fn(p, x, 0.5))(quadratic.PARAMS, x)
    np.testing.assert_allclose(aux["first"], x[:, 0, 0].mean(), rtol=1e-5)
    np.testing.assert_allclose(value, quadratic.loss(quadratic.PARAMS, x + 0.5), rtol=1e-5)


def test_bfloat16_parameters_get_bfloat16_gradients_and_float32_moments():
    """Sums over microbatches are kept in float32: in bfloat16 the sum of 1,024 ones stops at 256."""
    loss = lambda p, x: jnp.mean(jnp.sum(p["w"].astype(jnp.float32)[None] * x, axis=-1))  # noqa: E731
    fn = value_and_grad(loss, num_microbatches=1024)
    (_, m), grads = fn({"w": jnp.ones(8, jnp.bfloat16)}, jnp.full((1024, 8), 1 + 2**-7))
    assert grads["w"].dtype == jnp.bfloat16
    assert m.big_sq_norm.dtype == jnp.float32
    np.testing.assert_allclose(m.big_sq_norm, 8 * (1 + 2**-7) ** 2, rtol=1e-6)


X = np.ones((8, 3, 2), np.float32)


@pytest.mark.parametrize(
    ("params", "batch", "options", "message"),
    [
        (quadratic.PARAMS, X, {}, "both 8 examples.*num_microbatches >= 2"),
        (quadratic.PARAMS, X[:1], {}, "both 1 examples.*a larger batch"),
        (quadratic.PARAMS, X[:1], {"method": "per_example"}, "both 1 examples.*a larger batch"),
        (quadratic.PARAMS, X[:0], {}, "batch of 0 examples"),
        (quadratic.PARAMS, X, {"num_microbatches": 3}, "8 examples doesn't split into 3"),
        (quadratic.PARAMS, X, {"num_microbatches": 0}, "num_microbatches=0"),
        (quadratic.PARAMS, {}, {}, "no arrays"),
        ({}, X, {"num_microbatches": 2}, "parameters have no arrays"),
        (quadratic.PARAMS, {"x": X, "y": X[:4]}, {"num_microbatches": 2}, "common leading axis"),
        (quadratic.PARAMS, {"x": X, "n": 8}, {"num_microbatches": 2}, "common leading axis"),
        ({"norm": np.ones((3, 2), np.int32)}, X, {"num_microbatches": 2}, "'norm' is int32"),
        (quadratic.PARAMS, X, {"axis_name": "nowhere"}, "'nowhere' isn't a mapped axis"),
        ({"weight": jnp.ones((3, 2))}, X, {"method": "norm_layers"}, "picks none"),
        (
            {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(2)},
            X,
            {"num_microbatches": 2},
            "two parameters have the path 'a/b'",
        ),
    ],
)
def test_bad_input_is_refused_when_traced(params, batch, options, message):
    fn = value_and_grad(quadratic.loss, **options)
    with pytest.raises((ValueError, TypeError), match=message) as error:
        jax.eval_shape(fn, params, batch)
    assert "\n" not in str(error.value)


def test_options_that_do_not_go_together_are_refused():
    with pytest.raises(ValueError, match="method='one_batch'"):
        value_and_grad(quadratic.loss, method="one_batch")
    with pytest.raises(ValueError, match=r"norm .*method='two_batch'"):
        value_and_grad(quadratic.loss, method="per_example", norm=sq_norm)
    aux_loss = lambda p, x: (quadratic.loss(p, x), {"count": jnp.int32(3)})  # noqa: E731
    with pytest.raises(TypeError, match="aux leaf 'count' is int32"):
        value_and_grad(aux_loss, num_microbatches=2, has_aux=True)(quadratic.PARAMS, X)


@pytest.mark.parametrize(
    ("axis_name", "in_specs", "loss", "message"),
    [
        (None, (P(), P("data")), quadratic.loss, "axis_name doesn't name"),
        ("data", (P(), P()), quadratic.loss, "holds the same batch"),
        (
            "data",
            (P(), P("data")),
            lambda p, x: jax.lax.pmean(quadratic.loss(p, x), "data"),
            "collective of its own.*psum.*test_moments",
        ),
    ],
)
def test_shard_map_mistakes_are_refused_where_jax_tracks_what_varies(axis_name, in_specs, loss, message):
    fn = value_and_grad(loss, axis_name=axis_name, num_microbatches=2)
    fn = jax.shard_map(fn, mesh=mesh_of(2), in_specs=in_specs, out_specs=P())
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(fn, quadratic.PARAMS, X)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_bad_microbatch_shows_in_the_moments(bad):
    x = X.copy()
    x[-1] = bad
    with jax.debug_nans(False):
        (_, m), _ = value_and_grad(quadratic.loss, num_microbatches=4)(quadratic.PARAMS, x)
        assert not np.isfinite(m.small_sq_norm)
        assert not np.isfinite(m.big_sq_norm)


def test_zero_gradients_give_zero_moments():
    (_, m), _ = value_and_grad(lambda p, x: 0.0 * quadratic.loss(p, x), num_microbatches=4)(quadratic.PARAMS, X)
    assert (m.small_sq_norm, m.big_sq_norm) == (0, 0)


def test_a_loss_with_the_batch_own_denominator_is_found_and_the_fixed_one_passes():
    batch = {"x": quadratic.draw(jax.random.key(0), 8), "weight": np.arange(8.0, dtype=np.float32)}
    weighted_sum = lambda p, b: jnp.sum(b["weight"][:, None, None] * (p["norm"][None] - b["x"]) ** 2)  # noqa: E731
    own_denominator = lambda p, b: weighted_sum(p, b) / jnp.sum(b["weight"])  # noqa: E731
    with pytest.raises(ValueError, match="fixed denominator"):
        check_mean_loss(own_denominator, quadratic.PARAMS, batch)
    with pytest.raises(ValueError, match="fixed denominator"):
        check_mean_loss(weighted_sum, quadratic.PARAMS, batch)
    check_mean_loss(fixed_denominator(weighted_sum, weight_per_example=3.5), quadratic.PARAMS, batch)


@pytest.mark.parametrize(
    ("how", "method"),
    [
        ("shard_map_check_vma", "two_batch"),
        ("vmap", "per_example"),
        pytest.param("pmap", "two_batch", marks=pytest.mark.slow),
        pytest.param("shard_map_check_vma", "per_example", marks=pytest.mark.slow),
    ],
)
def test_every_kth_step_is_measured_and_gradients_are_always_the_same(how, method):
    x = quadratic.draw(jax.random.key(0), BATCH)
    options = {"method": method, "num_microbatches": 2, "axis_name": "data"}
    sometimes = value_and_grad(quadratic.loss, every=3, **options)
    want = on_devices(how, 4, value_and_grad(quadratic.loss, **options))(quadratic.PARAMS, x)
    state = tracker(5).init()
    for step in range(4):
        fn = on_devices(how, 4, lambda p, x, step=step: sometimes(p, x, step=jnp.int32(step)))
        (loss, m), grads = fn(quadratic.PARAMS, x)
        np.testing.assert_allclose(grads["norm"], want[1]["norm"], rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(loss, want[0][0], rtol=1e-6)
        measured = want[0][1] if step % 3 == 0 else jax.tree.map(jnp.zeros_like, want[0][1])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), m, measured)
        with jax.debug_nans(False):
            state = tracker(5).update(m, state)
    assert (state.steps, state.flagged_steps) == (2, 0)


def test_every_and_step_go_together():
    with pytest.raises(TypeError, match="keyword step go together"):
        value_and_grad(quadratic.loss, every=2, num_microbatches=2)(quadratic.PARAMS, X)
    with pytest.raises(ValueError, match="every=0"):
        value_and_grad(quadratic.loss, every=0)


def test_equal_batch_sizes_are_refused_in_words_and_steps_without_a_measurement_are_not():
    for small, big in ((8, 8), (np.array([4.0, 8.0]), 8), (np.float32(8), np.array([8, 16]))):
        with pytest.raises(ValueError, match="small_batch and big_batch are both 8 examples"):
            unbiased(Moments(1.0, 1.0, small, big))
    with np.errstate(all="ignore"):
        g2, _ = unbiased(Moments(np.array([2.0, 0.0]), np.ones(2), np.array([4.0, 0.0]), np.array([8.0, 0.0])))
    assert g2[0] == 0.0
