"""What a loss may not do is refused when it is traced, in every mapping; losses with weights are exact."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from scaling_jax.noise_scale import check_mean_loss, geometries, sq_norm, taps, value_and_grad

B, T, D = 16, 6, 4
_rng = np.random.default_rng(0)
PARAMS = {"w": jnp.asarray(_rng.normal(size=D), jnp.float32)}
MASK = _rng.random((B, T)) < 0.6
MASK[4:8] = False  # a whole microbatch, and a whole device's batch
BATCH = {
    "x": jnp.asarray(_rng.normal(size=(B, T, D)), jnp.float32),
    "y": jnp.asarray(_rng.normal(size=(B, T)), jnp.float32),
    "mask": jnp.asarray(MASK, jnp.float32),
}


def errors(params, batch):
    return (taps.einsum("btd,d->bt", batch["x"], params["w"]) - batch["y"]) ** 2


def mean_loss(params, batch):
    return jnp.mean(errors(params, batch))


def masked_mean(params, batch):
    return jnp.sum(errors(params, batch) * batch["mask"]) / jnp.sum(batch["mask"])


def summed(params, batch):
    return jnp.sum(errors(params, batch) * batch["mask"]), jnp.sum(batch["mask"])


def on_devices(how, fn, num_devices=4):
    if how.startswith("shard_map"):
        mesh = jax.make_mesh((num_devices,), ("data",), (AxisType.Auto,), devices=jax.devices()[:num_devices])
        specs = {"in_specs": (P(), P("data")), "out_specs": P()}
        return jax.jit(jax.shard_map(fn, mesh=mesh, check_vma=how == "shard_map_check_vma", **specs))
    map_ = jax.pmap if how == "pmap" else jax.vmap
    mapped = map_(fn, in_axes=(None, 0), out_axes=None if how == "vmap" else 0, axis_name="data")
    cut = lambda batch: jax.tree.map(lambda x: x.reshape(num_devices, -1, *x.shape[1:]), batch)  # noqa: E731
    return lambda params, batch: jax.tree.map(lambda x: x if how == "vmap" else x[0], mapped(params, cut(batch)))


MAPPINGS = ["pmap", "vmap", "shard_map", "shard_map_check_vma"]


@pytest.mark.parametrize("how", MAPPINGS)
@pytest.mark.parametrize(
    ("loss", "named"),
    [
        (lambda p, b: jax.lax.psum(mean_loss(p, b), "data"), "psum"),
        (lambda p, b: mean_loss(p, b) + 0.1 * jax.lax.pmean(mean_loss(p, b), "data"), "psum"),
        (lambda p, b: mean_loss(jax.tree.map(lambda w: jax.lax.all_gather(w, "data").mean(0), p), b), "all_gather"),
        (
            lambda p, b: jax.checkpoint(lambda: mean_loss(p, {**b, "x": jax.lax.ppermute(b["x"], "data", [(0, 1)])}))(),
            "ppermute",
        ),
    ],
    ids=["sum", "part", "gather", "permute"],
)
def test_a_collective_in_the_loss_is_refused_by_name_and_line(how, loss, named):
    with pytest.raises(ValueError, match=rf"along \['data'\]: {named}.*\(test_losses.py:\d+\)"):
        jax.eval_shape(on_devices(how, value_and_grad(loss, axis_name="data", num_microbatches=2)), PARAMS, BATCH)


@pytest.mark.parametrize("how", MAPPINGS[:3])
def test_the_number_of_the_device_and_collectives_along_other_axes_are_not(how):
    def loss(params, batch):
        others = jax.vmap(lambda shift: jax.lax.pmean(shift, "others"), axis_name="others")(jnp.arange(-1.0, 2.0))
        return mean_loss(params, batch) + 0.0 * jax.lax.axis_index("data") + others.sum()

    (value, _), _ = on_devices(how, value_and_grad(loss, axis_name="data"))(PARAMS, BATCH)
    np.testing.assert_allclose(value, mean_loss(PARAMS, BATCH), rtol=1e-6)


@jax.custom_vjp
def synchronised(w):
    return w


synchronised.defvjp(lambda w: (w, None), lambda _, g: (jax.lax.pmean(g, "data"),))


@pytest.mark.parametrize("how", MAPPINGS[:3])
def test_a_collective_in_the_backward_pass_is_refused_too(how):
    loss = lambda p, b: mean_loss({"w": synchronised(p["w"])}, b)  # noqa: E731
    with pytest.raises(ValueError, match=r"along \['data'\]: psum"):
        jax.eval_shape(on_devices(how, value_and_grad(loss, axis_name="data")), PARAMS, BATCH)


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (lambda p, b: errors(p, b), {}, "must return a number"),
        (lambda p, b: (mean_loss(p, b), 8), {}, "must return a number"),
        (mean_loss, {"has_aux": True}, r"must return \(loss, aux\)"),
        (mean_loss, {"weighted": True}, r"must be \(sum, weight\)"),
        (lambda p, b: (summed(p, b)[0], b["mask"].sum(-1)), {"weighted": True}, "must return a number"),
    ],
)
def test_what_a_loss_returns_is_checked(loss, options, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(value_and_grad(loss, num_microbatches=2, **options), PARAMS, BATCH)


def test_a_weight_may_be_a_plain_number():
    fn = value_and_grad(lambda p, b: (jnp.sum(errors(p, b)), errors(p, b).size), num_microbatches=2, weighted=True)
    np.testing.assert_allclose(fn(PARAMS, BATCH)[0][0], mean_loss(PARAMS, BATCH), rtol=1e-6)


def test_gradients_tell_where_losses_agree_by_chance():
    params = {"w": jnp.zeros(D)}
    batch = {**BATCH, "y": jnp.ones((B, T))}
    with pytest.raises(ValueError, match="gradients differ"):
        check_mean_loss(masked_mean, params, batch | {"mask": batch["mask"].at[4:8].set(1.0)})
    with pytest.raises(ValueError, match=r"16 examples.* 3 equal parts: leave out 1, or pass num_parts=2"):
        check_mean_loss(mean_loss, params, batch, num_parts=3)
    for rows, way_out in ((31, "leave out 1, or pass num_parts=31"), (1, "give a larger batch")):
        with pytest.raises(ValueError, match=f"{rows} examples.* 2 equal parts: {way_out}"):
            check_mean_loss(mean_loss, params, jax.tree.map(lambda x, n=rows: jnp.ones((n, *x.shape[1:])), batch))


def average(params, batch):
    return jnp.average(errors(params, batch), weights=batch["mask"])


def where(params, batch):
    return jnp.mean(errors(params, batch), where=batch["mask"] > 0)


def guarded(params, batch):
    @jax.jit
    def inner(total, mask):
        return jnp.where(mask.sum() > 0, total / jnp.maximum(mask.sum(), 1), 0.0)

    return inner(jnp.sum(errors(params, batch) * batch["mask"]), batch["mask"])


def scaled(params, batch):
    weights = batch["mask"] / batch["mask"].sum()
    return jnp.sum(errors(params, batch) * weights)


def chunked(params, batch):
    def add(total, part):
        e, mask = part
        return (total[0] + jnp.sum(e * mask), total[1] + mask.sum()), None

    parts = jax.tree.map(lambda x: x.T, (errors(params, batch), batch["mask"]))
    (total, count), _ = jax.lax.scan(add, (0.0, 0.0), parts)
    return total / count


def counted(params, batch):
    total = jnp.sum(errors(params, batch) * batch["mask"])
    rows = jnp.int32(jnp.maximum(batch["x"][0, 0, 0], B))  # not known when traced
    count = jax.lax.fori_loop(0, rows, lambda i, n: n + batch["mask"][i].sum(), 0.0)
    return total / count


def reciprocal(params, batch):
    return jnp.sum(errors(params, batch) * batch["mask"]) * jnp.reciprocal(batch["mask"].sum())


def of_finite(params, batch):
    return jnp.nanmean(jnp.where(batch["mask"] > 0, errors(params, batch), jnp.nan))


@pytest.mark.parametrize(
    "loss", [masked_mean, average, where, guarded, scaled, chunked, counted, reciprocal, of_finite]
)
@pytest.mark.parametrize("method", ["two_batch", "per_example"])
def test_a_division_by_a_sum_over_the_batch_is_refused(loss, method):
    fn = value_and_grad(loss, num_microbatches=2, method=method)
    with pytest.raises(ValueError, match=r"divides by a number that depends on the whole batch.*weighted=True"):
        jax.eval_shape(fn, PARAMS, BATCH)


def of_each_example(params, batch):
    counts = jnp.maximum(batch["mask"].sum(-1), 1)
    return jnp.mean(jnp.sum(errors(params, batch) * batch["mask"], axis=-1) / counts)


def in_a_loop(params, batch):
    one = lambda b: jnp.sum(errors(params, jax.tree.map(lambda x: x[None], b))) / jnp.maximum(b["mask"].sum(), 1)  # noqa: E731
    return jnp.mean(jax.lax.map(one, batch))


def softmax(params, batch):
    return jnp.mean(optax.softmax_cross_entropy(batch["x"] * params["w"][None, None], jax.nn.softmax(batch["x"])))


def normalised(params, batch):
    x = batch["x"] * params["w"][None, None]
    return jnp.mean((x - x.mean()) ** 2 / (x.std() + 1e-3))


def with_dropout(params, batch):
    """A scalar made from the batch, the key, reaches activations; a softmax later divides by them."""
    key = jax.random.wrap_key_data(jax.lax.bitcast_convert_type(batch["mask"][0, :2], jnp.uint32))
    x = batch["x"] * params["w"][None, None]
    x = jnp.where(jax.random.bernoulli(key, 0.9, x.shape), x / 0.9, 0.0)
    return jnp.mean(jax.nn.softmax(x) ** 2)


@pytest.mark.parametrize("loss", [mean_loss, of_each_example, in_a_loop, softmax, normalised, with_dropout])
def test_other_divisions_are_not(loss):
    jax.eval_shape(value_and_grad(loss, num_microbatches=2), PARAMS, BATCH)


def test_what_only_aux_divides_by_is_not_either():
    fn = value_and_grad(lambda p, b: (mean_loss(p, b), masked_mean(p, b)), num_microbatches=2, has_aux=True)
    jax.eval_shape(fn, PARAMS, BATCH)


def test_geometries_refuse_the_same():
    with pytest.raises(ValueError, match="divides by a number"):
        jax.eval_shape(geometries.l1(masked_mean, num_microbatches=4), PARAMS, BATCH)


def test_sums_and_weights_of_parts_must_add_up():
    check_mean_loss(summed, PARAMS, BATCH, weighted=True)
    check_mean_loss(lambda p, b: (summed(p, b), {"aux": 0.0}), PARAMS, BATCH, weighted=True, has_aux=True)
    check_mean_loss(lambda p, b: (mean_loss(p, b), 0.0), PARAMS, BATCH, has_aux=True)
    with pytest.raises(ValueError, match="the sum of its 2 parts"):
        check_mean_loss(lambda p, b: (mean_loss(p, b), summed(p, b)[1]), PARAMS, BATCH, weighted=True)


@pytest.mark.parametrize("num_microbatches", [2, *(pytest.param(m, marks=pytest.mark.slow) for m in (1, 4))])
@pytest.mark.parametrize("how", MAPPINGS)
def test_a_weighted_loss_has_the_gradient_of_the_plain_weighted_mean(how, num_microbatches):
    """Also where a device or a microbatch has no weight at all. The small gradients' mean is the big one exactly."""
    fn = value_and_grad(summed, weighted=True, axis_name="data", num_microbatches=num_microbatches)
    (value, m), grads = on_devices(how, fn)(PARAMS, BATCH)
    want_value, want = jax.value_and_grad(masked_mean)(PARAMS, BATCH)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    np.testing.assert_allclose(grads["w"], want["w"], rtol=1e-5)
    np.testing.assert_allclose(m.big_sq_norm, sq_norm(want), rtol=1e-5)

    count = 4 * num_microbatches
    parts = jax.tree.map(lambda x: x.reshape(count, -1, *x.shape[1:]), BATCH)
    small = jax.vmap(lambda part: jax.grad(lambda p: summed(p, part)[0])(PARAMS)["w"])(parts) * count / MASK.sum()
    np.testing.assert_allclose(small.mean(0), want["w"], rtol=1e-5)
    np.testing.assert_allclose(m.small_sq_norm, jnp.mean(jnp.sum(small**2, axis=-1)), rtol=1e-5)
    assert (m.small_batch, m.big_batch) == (B // count, B)


def test_single_examples_of_a_weighted_loss():
    def with_aux(params, batch):
        total, weight = summed(params, batch)
        return (total, weight), {"loss": total}

    fn = value_and_grad(with_aux, weighted=True, method="per_example", num_microbatches=2, has_aux=True)
    (value, m, aux), grads = jax.jit(fn)(PARAMS, BATCH)
    want_value, want = jax.value_and_grad(masked_mean)(PARAMS, BATCH)
    np.testing.assert_allclose((value, aux["loss"]), (want_value, want_value), rtol=1e-5)
    np.testing.assert_allclose(grads["w"], want["w"], rtol=1e-5)
    one = lambda part: jax.grad(lambda p: summed(p, jax.tree.map(lambda x: x[None], part))[0])(PARAMS)["w"]  # noqa: E731
    small = jax.vmap(one)(BATCH) * B / MASK.sum()
    np.testing.assert_allclose(m.small_sq_norm, jnp.mean(jnp.sum(small**2, axis=-1)), rtol=1e-5)
