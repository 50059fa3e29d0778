"""The loops of docs/training_loop.md measure the noise scale that is known, and train as a loop without it does."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import scaling_jax as sj
from experiments import dependent_examples
from tests.test_docs import DOCS, blocks

BLOCKS = {re.match(r"# (\w+)", block).group(1): block for block in blocks(DOCS / "training_loop.md", "python")}
QUADRATIC = ["jit_auto", "jit_explicit", "jit_fsdp", "devices", "shard_map", "shard_map_fsdp", "multi_steps"]
BATCH, STEPS, DIM = 64, 200, 16
DISTANCE = jnp.linspace(0.05, 0.35, DIM)  # of the parameters from the best ones: the gradient
PARAMS = {"w": DISTANCE, "b": -DISTANCE}
NOISE_SCALE = DIM / float(jnp.sum(DISTANCE**2))  # examples: both parameters have the same


def loss_fn(params, batch):
    """½ |w − x|² + ½ |b − y|² for x, y ~ N(0, 1): gradients w and b, and a variance of 1 for each number."""
    errors = (params[name][None] - batch[name] for name in ("w", "b"))
    return 0.5 * jnp.mean(sum(jnp.sum(error**2, axis=-1) for error in errors))


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def quadratic_batches(count, batch=BATCH):
    return [{"w": normal((i, 0), batch, DIM), "b": normal((i, 1), batch, DIM)} for i in range(count)]


class OneAtATime:
    """Batches, each given when all steps before it are done: virtual devices on few cores may wait for ever else."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        for batch in self.batches:
            jax.block_until_ready(jax.live_arrays())
            yield batch


def run(name, **yours):
    """The names that a loop of the page leaves behind."""
    namespace = {"loss_fn": loss_fn, "params": PARAMS, "optimizer": optax.sgd(0.0)} | yours
    namespace["batches"] = OneAtATime(namespace["batches"])
    exec(BLOCKS["imports"], namespace)
    exec(BLOCKS[name], namespace)
    return namespace


def found(namespace):
    return sj.noise_scale.estimate(namespace["grad_sq_norm"], namespace["trace_cov"], confidence=0.999)


def assert_found(namespace, truth, width=1.7):
    estimate = found(namespace)
    assert estimate.resolved
    assert estimate.low < truth < estimate.high
    assert estimate.high / estimate.low < width


def true_noise_scale(loss_of_one, params, examples):
    """tr(Σ)/|G|² from the gradients of many single examples."""
    grads = jax.jit(jax.vmap(jax.grad(loss_of_one), (None, 0)))(params, examples)
    flat = np.concatenate([np.asarray(g, np.float64).reshape(len(g), -1) for g in jax.tree.leaves(grads)], axis=1)
    trace_cov = flat.var(0, ddof=1).sum()
    return trace_cov / (np.sum(flat.mean(0) ** 2) - trace_cov / len(flat))


def adam_by_hand(loss, params, batches, learning_rate=0.01):
    optimizer = optax.adam(learning_rate)
    state = optimizer.init(params)
    for batch in batches:
        updates, state = optimizer.update(jax.grad(loss)(params, batch), state, params)
        params = optax.apply_updates(params, updates)
    return params


def in_microbatches(batches, calls=4):
    return [jax.tree.map(lambda x, i=i: np.split(x, calls)[i], batch) for batch in batches for i in range(calls)]


@pytest.mark.parametrize("name", QUADRATIC)
def test_the_known_noise_scale_is_found(name):
    """At a learning rate of zero the parameters stay where it is known."""
    batches = quadratic_batches(STEPS)
    assert_found(run(name, batches=in_microbatches(batches) if name == "multi_steps" else batches), NOISE_SCALE)


@pytest.mark.parametrize("name", QUADRATIC)
def test_parameters_train_as_without_the_noise_scale(name):
    batches = quadratic_batches(5)
    parts = in_microbatches(batches) if name == "multi_steps" else batches
    params = run(name, optimizer=optax.adam(0.01), batches=parts)["params"]
    want = adam_by_hand(loss_fn, PARAMS, batches)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), jax.device_get(params), want)
    for x in params.values():
        assert x.addressable_shards[0].data.size == (DIM // 8 if "fsdp" in name else DIM)


def test_every_tenth_step_is_tracked():
    batches = quadratic_batches(STEPS)
    after = run("every", optimizer=optax.sgd(0.1), batches=batches)
    all_steps = run("jit_auto", optimizer=optax.sgd(0.1), batches=batches)
    for moment in ("grad_sq_norm", "trace_cov"):
        want = sj.noise_scale.ema(all_steps[moment][::10], half_life=50)[-1]
        np.testing.assert_allclose(after[moment], want, rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(after["params"]["w"], jax.device_get(all_steps["params"]["w"]), rtol=1e-3, atol=1e-5)


def images(count, batch=BATCH):
    """Labels that can be learned, from images whose mean is 1."""
    x = [1 + normal(i, batch, 16) for i in range(count)]
    return [{"image": x, "label": np.argmax(x[:, :4], axis=-1)} for x in x]


def test_nnx_trains_parameters_and_nothing_else_decays():
    after = run("nnx", optimizer=optax.adamw(0.01), batches=images(150))
    before = after["Net"](nnx.Rngs(0, dropout=1))
    assert after["loss"] < 0.75 * np.log(4)
    assert np.abs(after["model"].into.kernel[...] - before.into.kernel[...]).max() > 0.1
    assert np.abs(after["model"].norm.mean[...] - before.norm.mean[...]).max() > 0.1
    assert {path[-1].key for path, _ in jax.tree.leaves_with_path(nnx.to_pure_dict(after["params"]))} == {
        *("kernel", "bias", "scale")
    }
    at_rest = run("nnx", optimizer=optax.adamw(0.0), batches=images(150))["stats"]["norm"]["mean"][...]
    assert np.abs(after["stats"]["norm"]["mean"][...] - at_rest).max() > 0.01  # those of the parameters in training


def test_one_step_of_nnx_averages_the_statistics_of_the_microbatches():
    (batch,) = images(1)
    after = run("nnx", batches=[batch])
    into = nnx.Linear(16, 32, rngs=nnx.Rngs(0, dropout=1))
    parts_MxBxD = jnp.swapaxes(into(jnp.asarray(batch["image"])).reshape(16, 4, 32), 0, 1)
    np.testing.assert_allclose(after["stats"]["norm"]["mean"][...], 0.01 * parts_MxBxD.mean((0, 1)), rtol=1e-4)
    var = 0.99 + 0.01 * parts_MxBxD.var(1).mean(0)
    np.testing.assert_allclose(after["stats"]["norm"]["var"][...], var, rtol=1e-4)


def test_dropout_is_noise_in_nnx():
    """With one image 64 times over, dropout is all the noise there is; with one key for all it wouldn't be noise."""
    one = {"image": np.repeat(normal(0, 1, 16), BATCH, axis=0), "label": np.full(BATCH, 3)}
    estimate = found(run("nnx", batches=[one] * 60))
    assert estimate.trace_cov > 0.01
    assert estimate.grad_sq_norm > 0


def test_equinox_finds_the_noise_scale_of_single_examples_and_trains():
    examples = {"x": normal(0, 40_000, 16), "y": 0.2 + normal(1, 40_000, 4)}
    batches = [jax.tree.map(lambda x, i=i: x[i * BATCH :][:BATCH], examples) for i in range(STEPS)]
    after = run("equinox", batches=batches)

    def loss_of_one(params, one):
        return after["loss_fn"](params, jax.tree.map(lambda x: x[None], one))

    assert_found(after, true_noise_scale(loss_of_one, after["params"], examples))
    trained = run("equinox", optimizer=optax.adam(0.01), batches=batches[:5])
    want = adam_by_hand(after["loss_fn"], after["params"], batches[:5])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), trained["params"], want)
    assert trained["model"].activation is after["model"].activation


def test_lora_finds_the_noise_scale_of_the_adapters_alone():
    base = {"kernel": jnp.asarray(normal(0, 16, 8) / 4, jnp.bfloat16)}
    x = normal(1, 40_000, 16)
    examples = {"x": x, "y": x @ (0.3 * normal(2, 16, 8)) + 2 * normal(3, 40_000, 8)}
    batches = [jax.tree.map(lambda x, i=i: x[i * BATCH :][:BATCH], examples) for i in range(STEPS)]
    after = run("lora", base=base, batches=batches)

    def loss_of_one(adapters, one):
        return after["loss_fn"](adapters, jax.tree.map(lambda x: x[None], one), base)

    assert_found(after, true_noise_scale(loss_of_one, after["adapters"], examples))
    trained = run("lora", base=base, optimizer=optax.adam(0.01), batches=batches[:5])
    assert set(trained["adapters"]) == {"down", "up"}
    assert np.abs(trained["adapters"]["up"]).max() > 0.01


def test_masked_tokens_have_the_moments_of_the_mean_over_all_tokens():
    """By hand: big is the gradient of the mean over unmasked tokens; small are those of the parts, with its weight."""
    vocabulary, length = 8, 12
    params = {"table": jnp.asarray(normal(0, vocabulary, vocabulary))}
    draws = np.random.default_rng(0)
    lengths = draws.integers(2, length + 1, (3, BATCH, 1))
    tokens = draws.integers(0, vocabulary, (3, BATCH, length + 1))
    batches = [
        {"tokens": t[:, :-1], "targets": t[:, 1:], "mask": (np.arange(length) < n).astype(np.float32)}
        for t, n in zip(tokens, lengths, strict=True)
    ]
    after = run("masked", params=params, logits_of=lambda params, x: params["table"][x], batches=batches)

    def summed(params, batch):
        losses = -jax.nn.log_softmax(params["table"][batch["tokens"]])
        return jnp.sum(batch["mask"][..., None] * losses * jax.nn.one_hot(batch["targets"], vocabulary))

    gradient = jax.jit(jax.vmap(jax.grad(summed), (None, 0)))
    for batch, g2, tr in zip(batches, after["grad_sq_norm"], after["trace_cov"], strict=True):
        of_examples = gradient(params, jax.tree.map(lambda x: x[:, None], batch))["table"] / batch["mask"].sum()
        big = jnp.sum(of_examples.sum(0) ** 2)
        small = np.mean([jnp.sum((4 * of_examples[j::4].sum(0)) ** 2) for j in range(4)])
        np.testing.assert_allclose(g2, (64 * big - 16 * small) / 48, rtol=1e-4)
        np.testing.assert_allclose(tr, (small - big) / (1 / 16 - 1 / 64), rtol=1e-4)
    with pytest.raises(ValueError, match="weighted=True"):
        sj.noise_scale.check_mean_loss(
            lambda *args: (lambda total, weight: total / weight)(*after["loss_fn"](*args)), params, batches[0]
        )


def test_weights_that_vary_add_their_squared_coefficient_of_variation():
    """Lengths uniform on (0, 1]; the gradient of a token has the mean G and the variance 1 in each of its numbers."""
    value_and_grad = sj.noise_scale.value_and_grad(
        lambda w, x: (jnp.sum(x["length"] * 0.5 * jnp.sum((w[None] - x["mean"]) ** 2, -1)), jnp.sum(x["length"])),
        num_microbatches=4,
        weighted=True,
    )

    def moments(key):
        of_length, of_mean = jax.random.split(key)
        length = 1 - jax.random.uniform(of_length, (256,))
        x = {"length": length, "mean": jax.random.normal(of_mean, (256, DIM)) / jnp.sqrt(length)[:, None]}
        (_, moments), grads = value_and_grad(10 * DISTANCE, x)
        return sj.noise_scale.unbiased(moments), grads

    (g2, tr), grads = jax.jit(jax.vmap(moments))(jax.random.split(jax.random.key(0), 4_000))
    true_trace_cov = 256 * jnp.var(grads, axis=0).sum()
    extra = (tr.mean() - true_trace_cov) / g2.mean()
    np.testing.assert_allclose(extra, 1 / 3, rtol=0.15)


def summed(params, x):
    return jnp.sum((params[None] - x) ** 2)


def contrastive(params, x):
    similarity = (x * params[None]) @ x.T
    return -jnp.mean(jnp.diagonal(jax.nn.log_softmax(similarity)))


def load_balancing(params, x):
    probabilities = jax.nn.softmax(x * params[None])
    chosen = jax.nn.one_hot(jnp.argmax(probabilities, -1), DIM)
    return jnp.sum(chosen.mean(0) * probabilities.mean(0))


def batch_norm(params, x):
    return jnp.mean(jnp.sum((params[None] * jax.nn.standardize(x, axis=0)) ** 4, -1))


@pytest.mark.parametrize("loss", [summed, contrastive, load_balancing, batch_norm])
def test_check_mean_loss_refuses_what_a_trace_does_not_show(loss):
    x = normal(0, BATCH, DIM)
    sj.noise_scale.value_and_grad(loss, num_microbatches=4)(DISTANCE, x)
    with pytest.raises(ValueError, match="isn't a mean over examples"):
        sj.noise_scale.check_mean_loss(loss, DISTANCE, x)


def test_dependent_examples_give_what_the_formulas_say(monkeypatch):
    monkeypatch.setattr(dependent_examples, "DRAWS", 2_000)
    rows = list(dependent_examples.measure())
    found = {}
    for row in rows:
        assert abs(dependent_examples.standard_errors(row.grad_sq_norm, row.case.grad_sq_norm)) < 4
        assert abs(dependent_examples.standard_errors(row.trace_cov, row.case.trace_cov)) < 4
        found[row.case.what] = row.case.trace_cov / row.case.grad_sq_norm
    assert found["copies in turns, 4 microbatches"] == dependent_examples.TRUTH == 32
    n, b, c = 4, dependent_examples.BATCH, dependent_examples.COPIES
    assert found["shuffled, 4 devices"] == pytest.approx(n * (b - c) / (b - 1 + n * (c - 1)))


def test_every_loop_is_run_here():
    assert set(BLOCKS) == {"imports", *QUADRATIC, "every", "nnx", "equinox", "lora", "masked"}
