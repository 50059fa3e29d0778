"""The estimator under `jax.jit` over sharded arrays, where XLA divides the work: the same numbers at the same cost."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, get_abstract_mesh, reshard
from jax.sharding import PartitionSpec as P

from scaling_jax.compile.ahead_of_time import collectives
from scaling_jax.noise_scale import taps, unbiased, value_and_grad
from scaling_jax.noise_scale.accumulate import microbatches
from tests.noise_scale.agreement import assert_mean

B, D, H = 64, 16, 32
_rng = np.random.default_rng(0)
PARAMS = {
    "into": jnp.asarray(_rng.normal(size=(D, H)) / 4, jnp.float32),
    "bias": jnp.zeros(H),
    "out": jnp.asarray(_rng.normal(size=(H, D)) / 6, jnp.float32),
}
BATCH = {name: jnp.asarray(_rng.normal(size=(B, D)), jnp.float32) for name in ("x", "y")}
LAYOUTS = {  # of the parameters, on a mesh with the axes "data" and "model"
    "replicated": {"into": P(), "bias": P(), "out": P()},
    "rows": {"into": P("data"), "bias": P("data"), "out": P("data")},
    "columns": {"into": P(None, "data"), "bias": P(), "out": P(None, "data")},
    "tensor": {"into": P(None, "model"), "bias": P("model"), "out": P("model")},
    "mixed": {"into": P("data", "model"), "bias": P("model"), "out": P("model", "data")},
}


def mesh_of(layout, kind):
    shape = (4, 2) if layout in ("tensor", "mixed") else (8, 1)
    return jax.make_mesh(shape, ("data", "model"), (kind,) * 2)


def loss(params, batch):
    """Mean squared error of two layers, with taps. On a mesh with Explicit axes it says where its activations lie."""
    explicit = AxisType.Explicit in get_abstract_mesh().axis_types
    rows, hidden = (P("data", None), P("data", "model")) if explicit else (None, None)

    def whole(name):
        if not explicit:
            return params[name]
        return jax.tree.map(
            lambda x: reshard(x, LAYOUTS["tensor"][name]) if x.ndim == PARAMS[name].ndim else x, params[name]
        )

    h = jnp.tanh(taps.add(taps.einsum("bd,dh->bh", batch["x"], whole("into"), hidden), whole("bias")))
    error = taps.einsum("bh,hd->bd", h, whole("out"), rows) - batch["y"]
    return jnp.mean(jnp.sum(error**2, axis=-1))


def placed(layout, kind):
    """(context, parameters, batch) on 8 devices."""
    mesh = mesh_of(layout, kind)
    params = {k: jax.device_put(x, NamedSharding(mesh, LAYOUTS[layout][k])) for k, x in PARAMS.items()}
    batch = jax.device_put(BATCH, NamedSharding(mesh, P("data")))
    return jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext(), params, batch


@functools.cache
def on_one_device(m, **options):
    return jax.jit(value_and_grad(loss, num_microbatches=m, **options))(PARAMS, BATCH)


def assert_same(got, want):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), jax.device_get(got), want)


SPLITS = [
    pytest.param(layout, m, marks=() if (layout, m) in (("rows", 2), ("mixed", 8)) else pytest.mark.slow)
    for layout in LAYOUTS
    for m in (2, 4, 8)
]


@pytest.mark.parametrize(("layout", "m"), SPLITS)
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_sharded_arrays_give_what_one_device_gives(kind, layout, m):
    context, params, batch = placed(layout, kind)
    with context:
        got = jax.jit(value_and_grad(loss, num_microbatches=m))(params, batch)
    assert_same(got, on_one_device(m))


@pytest.mark.parametrize(("layout", "m"), [("tensor", 1), pytest.param("replicated", 2, marks=pytest.mark.slow)])
def test_devices_are_small_batches_where_the_mesh_axis_is_named(layout, m):
    """Each device's own gradient, before XLA would add it to the others'; the axis of the model is left to XLA."""
    mesh = mesh_of(layout, AxisType.Auto)
    _, params, batch = placed(layout, AxisType.Auto)
    fn = value_and_grad(loss, num_microbatches=m, axis_name="data", batch_sharding=NamedSharding(mesh, P("data")))
    (value, moments), grads = jax.jit(fn)(params, batch)
    (want_value, want), want_grads = jax.jit(
        value_and_grad(loss, num_microbatches=m * mesh.shape["data"], axis_name=())
    )(PARAMS, BATCH)
    assert_same((value, moments, grads), (want_value, want, want_grads))


def test_extra_arguments_reach_the_loss_on_a_mesh_and_a_batch_that_does_not_divide_is_refused():
    mesh = mesh_of("replicated", AxisType.Auto)
    scaled_loss = lambda params, batch, scale, how: loss(params, batch) * scale[how]  # noqa: E731
    fn = value_and_grad(scaled_loss, axis_name="data", batch_sharding=NamedSharding(mesh, P("data")))
    (value, _), _ = jax.jit(lambda *args: fn(*args, "train"))(PARAMS, BATCH, {"train": jnp.float32(2), "test": 0.0})
    np.testing.assert_allclose(value, 2 * loss(PARAMS, BATCH), rtol=1e-6)
    with pytest.raises(ValueError, match="4 examples too many for 8 devices"):
        jax.eval_shape(lambda p, b: fn(p, b, {"train": 1.0}, "train"), PARAMS, jax.tree.map(lambda x: x[:60], BATCH))


@pytest.mark.parametrize(("layout", "m"), [("rows", 1), pytest.param("replicated", 2, marks=pytest.mark.slow)])
def test_explicit_axes_say_which_parameters_devices_must_gather(layout, m):
    context, params, batch = placed(layout, AxisType.Explicit)

    def replicated_loss(params, batch):
        h = jnp.tanh(batch["x"] @ params["into"] + params["bias"][None])
        return jnp.mean(jnp.sum((h @ params["out"] - batch["y"]) ** 2, axis=-1))

    with context:
        got = jax.jit(value_and_grad(replicated_loss, num_microbatches=m, axis_name="data"))(params, batch)
    want = jax.jit(value_and_grad(replicated_loss, num_microbatches=8 * m, axis_name=()))(PARAMS, BATCH)
    assert_same(got, want)
    assert jax.tree.map(lambda g, p: g.sharding.is_equivalent_to(p.sharding, p.ndim), got[1], params)


@pytest.mark.parametrize("layout", ["mixed", pytest.param("rows", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_examples_are_measured_where_they_lie(kind, layout):
    context, params, batch = placed(layout, kind)
    with context:
        got = jax.jit(value_and_grad(loss, num_microbatches=2, method="per_example"))(params, batch)
    assert_same(got, on_one_device(1, method="per_example"))


def accumulated(m, batch_sharding):
    """Gradient accumulation without the noise scale."""

    def fn(params, batch):
        def add(total, part):
            return jax.tree.map(jnp.add, total, jax.value_and_grad(loss)(params, part)), None

        zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, params)
        total, _ = jax.lax.scan(add, zeros, microbatches(batch, m, True, batch_sharding))
        return jax.tree.map(lambda x: x / m, total)

    return fn


@pytest.mark.parametrize(
    ("layout", "said"),
    [
        ("rows", True),
        *(pytest.param(layout, False, marks=pytest.mark.slow) for layout in ("replicated", "rows", "columns")),
    ],
)
def test_the_noise_scale_sends_one_number_more_than_gradient_accumulation(layout, said):
    """Compiled for 8 devices: as many collectives and one more, of numbers; the FLOPs of the norms; no more memory."""
    m, mesh = 4, mesh_of(layout, AxisType.Auto)
    _, params, batch = placed(layout, AxisType.Auto)
    batch_sharding = NamedSharding(mesh, P("data")) if said else None
    shardings = {name: NamedSharding(mesh, spec) for name, spec in LAYOUTS[layout].items()}

    def compiled(fn):
        out = jax.jit(
            lambda *args: (lambda value, grads: (value, jax.lax.with_sharding_constraint(grads, shardings)))(*fn(*args))
        )
        return out.lower(params, batch).compile()

    plain = compiled(accumulated(m, batch_sharding))
    measured = compiled(value_and_grad(loss, num_microbatches=m, batch_sharding=batch_sharding))
    sent, plainly = collectives(measured.as_text()), collectives(plain.as_text())
    assert len(sent) <= len(plainly) + 1
    assert sum(c.num_bytes for c in sent) <= sum(c.num_bytes for c in plainly) + 4 * 2 * len(PARAMS)
    # A norm multiplies and adds each number of a gradient, that of a microbatch and of their sum.
    norms = 2 * 2 * sum(x.size for x in PARAMS.values())
    assert measured.cost_analysis()["flops"] <= 1.02 * plain.cost_analysis()["flops"] + norms + 100
    assert measured.memory_analysis().temp_size_in_bytes <= 1.1 * plain.memory_analysis().temp_size_in_bytes


def _how_often(kind, layout, m):
    if (kind, layout, m) == (AxisType.Auto, "rows", 2):
        return ()
    explicit = (kind, layout, m) == (AxisType.Explicit, "rows", 1)
    auto = kind == AxisType.Auto and m == (1 if layout in ("rows", "tensor") else 2)
    return pytest.mark.slow if explicit or auto else pytest.mark.long


DRAWS = [
    pytest.param(kind, layout, m, axis, marks=_how_often(kind, layout, m))
    for kind in (AxisType.Auto, AxisType.Explicit)
    for layout in ("replicated", "rows", "columns", "tensor")
    for m, axis in ((2, None), (4, None), (8, None), (1, "data"))
]


@pytest.mark.parametrize(("kind", "layout", "m", "axis"), DRAWS)
def test_moments_of_many_draws_are_unbiased(kind, layout, m, axis):
    """The loss ½|w − x|² with x ~ N(0, 1) has the gradient w and the covariance 1."""
    mesh = mesh_of(layout, kind)
    sharding = NamedSharding(mesh, LAYOUTS[layout]["into"])
    params = {"w": jax.device_put(jnp.full((8, 8), 0.2), sharding)}
    half_square = lambda p, x: 0.5 * jnp.mean(jnp.sum((p["w"][None] - x) ** 2, axis=(1, 2)))  # noqa: E731
    batch_sharding = NamedSharding(mesh, P("data")) if kind == AxisType.Auto else None
    fn = value_and_grad(half_square, num_microbatches=m, axis_name=axis, batch_sharding=batch_sharding)
    place = jax.lax.with_sharding_constraint if kind == AxisType.Auto else reshard

    def step(_, key):
        x = place(jax.random.normal(key, (B, 8, 8)), NamedSharding(mesh, P("data")))
        if kind == AxisType.Explicit and layout == "tensor":
            x = reshard(x, P("data", None, "model"))
        elif kind == AxisType.Explicit and axis is None:
            return None, unbiased(fn({"w": reshard(params["w"], P())}, x)[0][1])
        return None, unbiased(fn(params, x)[0][1])

    with jax.set_mesh(mesh) if kind == AxisType.Explicit else contextlib.nullcontext():
        series = jax.jit(lambda keys: jax.lax.scan(step, None, keys)[1])(jax.random.split(jax.random.key(1), 2_000))
    for draws, truth in zip(series, (0.2**2 * 64, 64), strict=True):
        assert_mean(draws, truth, standard_errors=4)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=str)
def test_a_share_that_does_not_split_is_refused(kind):
    context, params, batch = placed("replicated", kind)
    said = NamedSharding(mesh_of("replicated", kind), P("data")) if kind == AxisType.Auto else None
    fn = value_and_grad(loss, num_microbatches=16, batch_sharding=said)
    with context, pytest.raises(ValueError, match="each device holds 8 of 64 examples"):
        jax.eval_shape(fn, params, batch)
