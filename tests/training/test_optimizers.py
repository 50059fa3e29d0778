import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scaling_jax.io import UserError
from scaling_jax.tasks import ModelConfig, evaluator
from scaling_jax.training import OptimizerConfig, Run, read_metrics, run_folder, train
from scaling_jax.training.optimizers import make_optimizer
from scaling_jax.training.program import _evaluator, _init, compiled_steps, program_for
from scaling_jax.training.stages import Stage
from tests.compiling import AS_USERS

MODEL = ModelConfig(n_layer=1, d_model=16, n_head=1, context=16)
RUN = Run(MODEL, batch_tokens=64, learning_rate=1e-2, max_steps=40, eval_tokens=512, steps_per_call=8)
ALL = [
    (OptimizerConfig("adam"), 1e-2),
    (OptimizerConfig("adamw", weight_decay=0.1), 1e-2),
    (OptimizerConfig("sgd"), 3.0),
    (OptimizerConfig("signum"), 3e-3),
    (OptimizerConfig("muon"), 1e-2),
    (OptimizerConfig("adafactor"), 1e-2),
]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "learning_rate"), ALL, ids=lambda x: getattr(x, "name", ""))
def test_every_optimizer_learns(tmp_path, corpus, optimizer, learning_rate):
    run = dataclasses.replace(RUN, optimizer=optimizer, learning_rate=learning_rate)
    train(run, tmp_path, corpus=corpus, num_devices=1)
    losses = [line.test_loss for line in read_metrics(run_folder(tmp_path, run)) if line.evaluated]
    assert losses[-1] < losses[0] - 0.1


def some_gradients():
    params = program_for(RUN).init(0).params
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    return params, tree.unflatten([jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)])


def direction(optimizer, params, grads):
    """The first update at a learning rate of −1, which is added to the parameters."""
    return first_update(make_optimizer(optimizer), params, grads, learning_rate=-1.0)


def first_update(transform, params, grads, **settings):
    def update(params, grads):
        return transform.update(grads, transform.init(params), params, **settings)[0]

    return jax.jit(update)(params, grads)


def test_muon_orthogonalises_the_matrices_of_layers_alone():
    params, grads = some_gradients()
    update = direction(OptimizerConfig("muon"), params, grads)
    kernel_LxDxF = update["layers"]["feed_forward_in"]["dense"]["kernel"]
    for kernel_DxF in kernel_LxDxF:
        values = jnp.linalg.svd(kernel_DxF, compute_uv=False)
        assert float(values.max() / values.min()) < 2.0  # five quintic steps leave singular values within 0.7 … 1.2
    adam = direction(OptimizerConfig("adam"), params, grads)
    np.testing.assert_array_equal(jnp.sign(update["embedding"]), jnp.sign(adam["embedding"]))
    assert (jax.tree.map(lambda u, g: float(jnp.vdot(u, g)) > 0, update, grads)) == jax.tree.map(lambda _: True, grads)


def test_signum_moves_by_the_sign_of_the_averaged_gradient():
    params, grads = some_gradients()
    update = direction(OptimizerConfig("signum", beta1=0.5), params, grads)
    jax.tree.map(lambda u, g: np.testing.assert_array_equal(u, jnp.sign(g)), update, grads)


def test_weight_decay_shrinks_matrices_alone_by_the_learning_rate_times_itself():
    params, _ = some_gradients()
    nothing = jax.tree.map(jnp.zeros_like, params)
    update = direction(OptimizerConfig("adamw", weight_decay=0.1), params, nothing)
    np.testing.assert_allclose(update["embedding"], 0.1 * params["embedding"], rtol=1e-6)
    np.testing.assert_allclose(
        update["layers"]["qkv"]["dense"]["kernel"], 0.1 * params["layers"]["qkv"]["dense"]["kernel"], rtol=1e-6
    )
    assert not np.any(update["layers"]["feed_forward_norm"]["layer_norm"]["scale"])
    assert not np.any(update["norm"]["layer_norm"]["scale"])


def test_half_lives_in_tokens_are_the_same_at_every_batch_size_and_in_every_stage():
    optimizer = OptimizerConfig(beta1_half_life_tokens=1_000, beta2_half_life_tokens=50_000)
    for batch_tokens in (64, 512):
        run = dataclasses.replace(RUN, batch_tokens=batch_tokens, optimizer=optimizer)
        for now in (run, run.at(Stage(0, 4 * batch_tokens))):
            betas = program_for(now).optimizer
            assert betas.beta1 ** (1_000 / now.batch_tokens) == pytest.approx(0.5)
            assert betas.beta2 ** (50_000 / now.batch_tokens) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("rule", "batch", "rate", "growth"),
    [
        ("run", 4, 2.0, 1.0),
        ("sqrt", 4, 2.0, 2.0),
        ("sqrt", 4, 1.0, 2.0),
        ("timescale", 4, 2.0, 2.0),  # the learning rate as √B
        ("timescale", 4, 1.0, 4.0),  # as it is
        ("timescale", 1, 0.5, 2.0),  # a stage that changes only the rate
    ],
)
def test_a_stage_decays_weights_by_its_rule(rule, batch, rate, growth):
    """One step without a gradient takes ηλ of a matrix; "timescale" keeps what is left after as many tokens."""
    adamw = OptimizerConfig("adamw", weight_decay=0.1)
    run = dataclasses.replace(RUN, optimizer=adamw, weight_decay_rule=rule, learning_rate=1e-3)
    params, _ = some_gradients()
    nothing = jax.tree.map(jnp.zeros_like, params)

    def left_after_a_step(now):
        taken = direction(program_for(now).optimizer, params, nothing)["embedding"] / params["embedding"]
        return 1 - now.learning_rate * float(taken[0, 0])

    now = run.at(Stage(1_000, batch * run.batch_tokens, rate))
    assert left_after_a_step(now) == pytest.approx(1 - 1e-3 * rate * 0.1 * growth, rel=1e-9)
    per_token = [math.log(left_after_a_step(at)) / at.batch_tokens for at in (run, now)]
    assert (per_token[0] == pytest.approx(per_token[1], rel=1e-3)) == (rule == "timescale" or growth * rate == batch)


def test_the_evaluated_average_is_that_of_the_weights_after_each_step(corpus):
    run = dataclasses.replace(RUN, average_half_life_tokens=128.0)
    program, decay = program_for(run), 0.5 ** (64 / 128)
    order = np.arange(3 * 4).reshape(3, 4)
    state, params = program.init(0), []
    for k in range(3):
        state, _ = program.steps(state, corpus.train_RxT1, order[k : k + 1], 1e-2, 2)
        params.append(jax.tree.map(np.asarray, state.params))
    weights = np.array([decay**2, decay, 1.0])
    expected = jax.tree.map(lambda *xs: sum(w * x for w, x in zip(weights, xs, strict=True)) / weights.sum(), *params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), state.evaluated_params, expected)


@pytest.fixture
def compiled_as_users_programs_are(monkeypatch):
    """Here alone: what tests compile elsewhere is made with other emitters, which round differently."""
    caches = (_init, compiled_steps, _evaluator, evaluator)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(jax, "jit", functools.partial(jax.jit, compiler_options=AS_USERS))
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.long
@pytest.mark.usefixtures("compiled_as_users_programs_are")
def test_an_average_changes_what_is_evaluated_and_not_the_training(tmp_path, corpus):
    plain, averaged = RUN, dataclasses.replace(RUN, average_half_life_tokens=1_000.0)
    lines = []
    for run in (plain, averaged):
        train(run, tmp_path, corpus=corpus, num_devices=1, backend="shard_map")  # pmap takes no compiler options
        lines.append(read_metrics(run_folder(tmp_path, run)))
    assert [line.train_loss.tolist() for line in lines[0]] == [line.train_loss.tolist() for line in lines[1]]
    assert lines[0][-1].test_loss != lines[1][-1].test_loss


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "lion"}, "optimizer.name = 'lion': choose from .*adam, adamw, sgd.* optax:lion"),
        ({"name": "adamw"}, "optimizer.weight_decay = 0.0 .*adamw"),
        ({"weight_decay": 0.1}, "optimizer.weight_decay = 0.1 .*adam"),
        ({"beta2": 1.0}, r"optimizer.beta2 = 1.0"),
        ({"beta1_half_life_tokens": 0.0}, "beta1_half_life_tokens = 0.0 .*positive"),
    ],
)
def test_impossible_optimizers_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**values)


def test_adam_is_optax_adam():
    params, grads = some_gradients()
    expected = first_update(optax.adam(-1.0, 0.9, 0.98), params, grads)
    jax.tree.map(np.testing.assert_array_equal, direction(OptimizerConfig(), params, grads), expected)
