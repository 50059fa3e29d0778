"""Per-example squared norms from taps against `jax.vmap(jax.grad)`."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_jax.noise_scale import check_taps, sq_norm, taps, unbiased, value_and_grad
from scaling_jax.noise_scale.norms import with_example_norms
from tests.noise_scale import language_model as lm


def per_example_grads(loss, params, batch):
    return jax.vmap(lambda example: jax.grad(loss)(params, example[None]))(batch)


def tapped_and_exact(loss, params, batch):
    """{path: norms} both ways; only means over examples leave the taps, so examples go through one at a time."""

    def one(example):
        _, _, norms = with_example_norms(
            lambda params, batch: (loss(params, batch), ()), params, example[None], lambda name: True, lm.is_stacked
        )
        return norms

    grads = jax.tree_util.tree_leaves_with_path(per_example_grads(loss, params, batch))
    exact = {}
    for path, g in grads:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        first = 2 if lm.is_stacked(name) else 1
        exact[name] = jnp.sum(jnp.square(g), axis=tuple(range(first, g.ndim)))
    return jax.lax.map(one, batch), exact


@pytest.mark.parametrize("remat", [pytest.param(False, marks=pytest.mark.slow), True])
def test_norms_of_every_layer_match_vmap_grad(remat):
    """In float64: some gradients are small differences, of which float32 leaves machines up to 1e-4 to differ by."""
    params, batch = lm.init(jax.random.key(0)), lm.tokens(jax.random.key(1), 8)
    with jax.enable_x64(True):
        params = jax.tree.map(lambda x: x.astype(jnp.float64), params)
        loss = lm.make_loss(remat, jnp.float64)
        got, want = jax.jit(lambda p, b: tapped_and_exact(loss, p, b))(params, batch)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("dtype", "rtol"), [(jnp.float32, 1e-5), pytest.param(jnp.bfloat16, 0.02, marks=pytest.mark.slow)]
)
def test_moments_and_gradients_with_taps_are_those_without(dtype, rtol):
    """Eight examples at once equal one at a time: no example leaks into another's norm. bf16 compute: float32 norms."""
    params, batch = lm.init(jax.random.key(0)), lm.tokens(jax.random.key(1), 8)
    loss = lm.make_loss(dtype=dtype)
    fn = value_and_grad(loss, method="per_example", stacked=lm.is_stacked, num_microbatches=2)
    (_, moments), grads = jax.jit(fn)(params, batch)
    exact = jax.jit(lambda p, x: per_example_grads(loss, p, x))(params, batch)
    np.testing.assert_allclose(moments.small_sq_norm, jnp.mean(jax.vmap(sq_norm)(exact)), rtol=rtol)
    mean = jax.tree.map(lambda g: g.mean(0), exact)
    difference = jax.tree.map(jnp.subtract, grads, mean)
    assert sq_norm(difference) < rtol**2 * sq_norm(mean)
    assert {x.dtype for x in jax.tree.leaves((moments, grads))} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize(
    ("spec", "x", "w"),
    [
        ("bi,io->bo", (4, 3), (3, 5)),  # Gram: one position
        ("bti,io->bto", (4, 40, 3), (3, 5)),  # materialised: many positions, few weights
        ("bti,io->bto", (4, 2, 30), (30, 50)),  # Gram: two positions
        ("bsti,io->bsto", (4, 2, 2, 30), (30, 50)),  # Gram over two position axes
        ("bthk,hkj->bthj", (4, 2, 3, 20), (3, 20, 20)),  # Gram, a matrix a head
        ("bti,oi->bto", (4, 2, 30), (50, 30)),
        ("btij,io->bto", (4, 2, 3, 4), (3, 5)),  # an axis of x that only it has
    ],
)
def test_einsum_norms_match_vmap_grad(spec, x, w):
    x, w = jax.random.normal(jax.random.key(0), x), jax.random.normal(jax.random.key(1), w)

    def loss(w, x):
        return jnp.mean(jnp.square(jnp.tanh(taps.einsum(spec, x, w))))

    (_, moments), _ = jax.jit(value_and_grad(loss, method="per_example"))(w, x)
    exact = jnp.mean(jax.vmap(sq_norm)(jax.jit(lambda w, x: per_example_grads(loss, w, x))(w, x)))
    np.testing.assert_allclose(moments.small_sq_norm, exact, rtol=1e-5)


@pytest.mark.parametrize("most", [1, 30])  # one example at a time, two
def test_large_layers_take_examples_in_turns(monkeypatch, most):
    x, w = jax.random.normal(jax.random.key(0), (4, 40, 3)), jax.random.normal(jax.random.key(1), (3, 5))

    def moments():
        loss = lambda w, x: jnp.mean(jnp.square(taps.einsum("bti,io->bto", x, w)))  # noqa: E731
        return jax.jit(value_and_grad(loss, method="per_example"))(w, x)

    at_once = moments()
    monkeypatch.setattr(taps, "MAX_ELEMENTS_ON_CPU", most)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), moments(), at_once)


@pytest.mark.parametrize("method", ["two_batch", "per_example"])
def test_layers_and_groups_add_up_to_the_whole(method):
    def loss(params, x):
        h, _ = jax.lax.scan(lambda h, w: (taps.einsum("bi,io->bo", h, w), None), x, params["layers"]["w"])
        return jnp.mean(jnp.square(taps.scale(h, params["scale"])))

    w, x = jax.random.normal(jax.random.key(0), (2, 3, 3)), jax.random.normal(jax.random.key(1), (8, 3))
    params = {"layers": {"w": w}, "scale": jnp.ones(3)}
    options = {"method": method, "num_microbatches": 2, "stacked": lm.is_stacked}
    (_, whole), _ = jax.jit(value_and_grad(loss, **options))(params, x)
    (_, parts), _ = jax.jit(value_and_grad(loss, **options, groups=str))(params, x)
    assert set(parts.big_sq_norm) == {"layers/w/0", "layers/w/1", "scale"}
    for small, big in zip((*parts[:2], *unbiased(parts)), (*whole[:2], *unbiased(whole)), strict=True):
        np.testing.assert_allclose(sum(small.values()), big, rtol=1e-4)


def test_layer_groups_hold_their_own_layer():
    """Of two layers, the one whose output is cut off has no gradient."""

    def loss(w, x):
        h, _ = jax.lax.scan(lambda h, layer: (taps.einsum("bi,io->bo", h, layer), None), x, w)
        return jnp.mean(jnp.square(h))

    w = jnp.stack([jnp.eye(3), jnp.zeros((3, 3))])
    fn = value_and_grad(lambda w, x: loss(w["w"], x), method="per_example", stacked=lambda name: True, groups=str)
    (_, moments), _ = fn({"w": w + 0.0}, jnp.arange(12.0).reshape(4, 3))
    assert set(moments.small_sq_norm) == {"w/0", "w/1"}
    assert moments.small_sq_norm["w/0"] == 0


@pytest.mark.slow
def test_norm_layers_use_the_norm_layers_only():
    params, batch = lm.init(jax.random.key(0)), lm.tokens(jax.random.key(1), 8)
    fn = value_and_grad(lm.make_loss(), method="norm_layers", stacked=lm.is_stacked)
    (_, moments), grads = jax.jit(fn)(params, batch)
    norms = (grads["layers"]["norm_scale"], grads["layers"]["norm_bias"], grads["final_norm_scale"])
    np.testing.assert_allclose(moments.big_sq_norm, sq_norm(norms), rtol=1e-5)
    exact = per_example_grads(lm.make_loss(), params, batch)
    norms = (exact["layers"]["norm_scale"], exact["layers"]["norm_bias"], exact["final_norm_scale"])
    np.testing.assert_allclose(moments.small_sq_norm, jnp.mean(jax.vmap(sq_norm)(norms)), rtol=1e-5)


def test_check_taps_finds_an_untapped_use_and_a_missing_cross_term():
    x = jax.random.normal(jax.random.key(0), (4, 3))
    w = {"w": jax.random.normal(jax.random.key(1), (3, 3))}
    dense = lambda x, w: taps.einsum("bi,io->bo", x, w)  # noqa: E731
    check_taps(lambda p, x: jnp.mean(jnp.square(dense(x, p["w"]))), w, x)
    with pytest.raises(ValueError, match="per-example norms are wrong for w"):
        check_taps(lambda p, x: jnp.mean(jnp.square(dense(dense(x, p["w"]), p["w"]))), w, x)
    with pytest.raises(ValueError, match="per-example norms are wrong for w"):
        check_taps(lambda p, x: jnp.mean(jnp.square(x @ getattr(p["w"], "value", p["w"]))), w, x)


def test_a_forgotten_stack_is_refused():
    fn = value_and_grad(lm.make_loss(), method="per_example")
    with pytest.raises(ValueError, match="`stacked`"):
        fn(lm.init(jax.random.key(0)), lm.tokens(jax.random.key(1), lm.LAYERS))


@pytest.mark.parametrize("spec", ["bti,io", "bti,bio->bto", "bti,io->tbo", "bti,ijo->bto", "...i,io->...o"])
def test_einsums_that_taps_cannot_follow_are_refused(spec):
    with pytest.raises(ValueError, match="einsum"):
        taps.einsum(spec, jnp.ones((2, 2, 2)), taps.Tapped(jnp.ones((2, 2)), jnp.zeros(2)))


def test_taps_work_inside_flax_linen_modules():
    class Layer(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            w = self.param("kernel", nn.initializers.normal(0.5), (3, 3))
            return jnp.tanh(taps.einsum("bti,io->bto", x, w)), None

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            layers = nn.scan(Layer, variable_axes={"params": 0}, split_rngs={"params": True}, length=2)
            return layers(name="layers")(x, None)[0]

    x = jax.random.normal(jax.random.key(0), (4, 5, 3))
    params = Net().init(jax.random.key(1), x)
    loss = lambda params, x: jnp.mean(jnp.square(Net().apply(params, x)))  # noqa: E731
    check_taps(loss, params, x, stacked=lambda name: "layers" in name, rtol=1e-5)
