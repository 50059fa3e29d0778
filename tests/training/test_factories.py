"""Optimizers by import path: what is refused, layers one by one, and the traced learning rate."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scaling_jax.io import UserError
from scaling_jax.io.config import Settings, from_dict, to_dict, with_overrides
from scaling_jax.tasks import ModelConfig, model_config
from scaling_jax.training import Interrupted, OptimizerConfig, Run, read_metrics, run_folder, train
from scaling_jax.training.factories import path_of
from scaling_jax.training.optimizers import check_optimizer, make_optimizer
from scaling_jax.training.records import read_run_config, write_run_config

HERE = "tests.training.test_factories"
RUN = Run(ModelConfig(2, 16, 1, context=16), 64, 1e-2, max_steps=20, eval_tokens=512, steps_per_call=8)
PARAMS = {
    "embedding": jnp.linspace(-1, 1, 12).reshape(4, 3),
    "layers": {"matrix": jnp.linspace(1, 2, 24).reshape(2, 3, 4), "scale": jnp.linspace(1, 3, 6).reshape(2, 3)},
}


def trust(learning_rate, decay=0.0):
    """A rate that isn't linear, a norm of each array, and a mask by the number of axes."""
    return optax.chain(
        optax.scale_by_trust_ratio(),
        optax.add_decayed_weights(decay, mask=lambda params: jax.tree.map(lambda x: x.ndim >= 2, params)),
        optax.scale(-(learning_rate**2)),
    )


def deaf(learning_rate):
    return optax.sgd(0.1)


def injected(learning_rate):
    return optax.inject_hyperparams(optax.adam)(learning_rate=learning_rate)


def branching(learning_rate):
    return optax.sgd(learning_rate if learning_rate > 0 else 0.1)


def number(learning_rate):
    return 3


def steps(
    config, count, learning_rate, params=PARAMS, loss=lambda p: 0.5 * sum(map(optax.l2_loss, jax.tree.leaves(p)))
):
    """Steps down ½|params|², as the training program takes them: compiled once for every learning rate."""
    optimizer = make_optimizer(config)

    def step(params, state, learning_rate):
        updates, state = optimizer.update(params, state, params, learning_rate=learning_rate)
        return optax.apply_updates(params, updates), state

    step = jax.jit(step)
    state = optimizer.init(params)
    for _ in range(count):
        params, state = step(params, state, learning_rate)
    assert step._cache_size() == 1
    return params


def sq_norm(params):
    return sum(float(jnp.sum(x**2)) for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
    ("name", "settings", "learning_rate"),
    [
        ("optax:lion", {"b1": 0.95, "weight_decay": 0.01}, 0.02),
        ("optax:adamw", {}, 0.05),
        ("optax:lamb", {}, 0.05),
        ("optax:contrib.ademamix", {}, 0.05),
        pytest.param("optax:contrib.muon", {}, 0.05, marks=pytest.mark.slow),
        pytest.param("optax:adafactor", {"min_dim_size_to_factor": 2}, 0.05, marks=pytest.mark.slow),
        (f"{HERE}:trust", {}, 0.3),
    ],
)
def test_optimizers_by_path_go_down_a_quadratic(name, settings, learning_rate):
    config = OptimizerConfig(name, settings=settings)
    assert sq_norm(steps(config, 10, learning_rate)) < 0.8 * sq_norm(PARAMS)


def test_golden_step_of_lion_and_of_an_own_optimizer():
    """lion: −rate·(sign + decay·w). trust: −rate²·(w + decay·w for matrices), as the gradient is w."""
    lion = steps(OptimizerConfig("optax:lion", settings={"weight_decay": 0.5}), 1, 0.1)
    jax.tree.map(lambda a, w: np.testing.assert_allclose(a, w - 0.1 * (jnp.sign(w) + 0.5 * w), rtol=1e-5), lion, PARAMS)
    own = steps(OptimizerConfig(f"{HERE}:trust", settings={"decay": 1.0}), 1, 0.1)
    np.testing.assert_allclose(own["embedding"], (1 - 0.02) * PARAMS["embedding"], rtol=1e-5)
    np.testing.assert_allclose(own["layers"]["matrix"], (1 - 0.02) * PARAMS["layers"]["matrix"], rtol=1e-5)
    np.testing.assert_allclose(own["layers"]["scale"], (1 - 0.01) * PARAMS["layers"]["scale"], rtol=1e-5)


@pytest.mark.parametrize("name", ["optax:lamb", "optax:novograd"])
def test_every_layer_is_an_array_of_its_own(name):
    """Norms of whole arrays: two layers in one stack give what two models of one layer give."""
    config = OptimizerConfig(name, settings={"weight_decay": 0.1})
    whole = steps(config, 3, 0.05)["layers"]
    for k in range(2):
        alone = steps(config, 3, 0.05, {"layers": jax.tree.map(lambda x, k=k: x[k : k + 1], PARAMS["layers"])})
        jax.tree.map(lambda a, b, k=k: np.testing.assert_allclose(a[k], b[0], rtol=1e-6), whole, alone["layers"])


def test_adam_by_path_is_adam_by_name():
    by_path = steps(OptimizerConfig("optax:adam", settings={"b2": 0.98}), 5, 0.03)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), by_path, steps(OptimizerConfig(), 5, 0.03))


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("optax", {}, "choose from adam, .* optax:lion"),
        ("optax:", {}, "is no import path"),
        ("optax:lion()", {}, "is no import path"),
        ("optax:soap", {}, "optax has no soap"),
        ("not_there:make", {}, "can't import not_there .*PYTHONPATH"),
        ("optax:lion", {"beta": 1.0}, "unexpected keyword argument 'beta'"),
        ("optax:polyak_sgd", {}, "unexpected keyword argument 'learning_rate'"),
        ("optax:lbfgs", {}, "missing 3 required"),
        ("os:getcwd", {}, "os:getcwd"),
        (f"{HERE}:deaf", {}, "don't depend on learning_rate"),
        (f"{HERE}:injected", {}, "don't depend on learning_rate.*inject_hyperparams"),
        (f"{HERE}:branching", {}, "branching' doesn't give an Optax optimizer"),
        (f"{HERE}:number", {}, "number' doesn't give an Optax optimizer"),
    ],
)
def test_what_cant_train_is_refused_in_one_line(name, settings, message):
    with pytest.raises(UserError, match=message) as refused:
        check_optimizer(OptimizerConfig(name, settings=settings))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "adam", "settings": {"b1": 0.9}}, "optimizer.settings = .*import path"),
        ({"name": "optax:lion", "weight_decay": 0.1}, "optimizer.settings.weight_decay"),
        ({"name": "optax:lion", "settings": {"mask": lambda p: p}}, "settings: mask"),
        ({"name": "optax:lion", "settings": {"b1": float("nan")}}, "settings: b1"),
        ({"name": lambda learning_rate: optax.lion(learning_rate)}, "no import path.*mymodule:make"),
    ],
)
def test_what_no_record_can_hold_is_refused(values, message):
    with pytest.raises(UserError, match=message):
        OptimizerConfig(**values)


def test_functions_are_known_by_their_path():
    assert path_of(optax.lion) == "optax:lion"
    assert path_of(trust) == f"{HERE}:trust"
    assert dataclasses.replace(RUN, optimizer=trust).optimizer == OptimizerConfig(f"{HERE}:trust")
    for nameless in (lambda learning_rate: optax.sgd(learning_rate), optax.sgd(1.0).update):
        with pytest.raises(UserError, match="no import path"):
            path_of(nameless)


def test_records_hold_the_path_and_the_settings_and_reading_imports_nothing(tmp_path):
    optimizer = OptimizerConfig("not_there.at_all:make", settings={"b1": 0.5, "mode": "fast", "nesterov": True})
    run = dataclasses.replace(RUN, optimizer=optimizer, model=model_config("llama-2x32-4e2", context=16, tied=True))
    write_run_config(tmp_path, run, {"sha256": ""})
    read = read_run_config(tmp_path).run
    assert (read, read.run_id, hash(read)) == (run, run.run_id, hash(run))
    assert json.loads((tmp_path / "config.json").read_text())["run"]["optimizer"]["settings"]["mode"] == "fast"
    assert from_dict(OptimizerConfig, to_dict(optimizer)) == optimizer
    assert isinstance(read.optimizer.settings, Settings)
    other = dataclasses.replace(optimizer, settings={"b1": 0.6})
    assert dataclasses.replace(run, optimizer=other).run_id != run.run_id


def test_overrides_name_models_and_optimizers_and_set_any_setting():
    changed = with_overrides(
        RUN, ["optimizer=optax:lion", "optimizer.settings.b1=0.95", "optimizer.settings.mu_dtype=bfloat16",
              "model=llama-2x32", "model.tied=true"],
    )  # fmt: skip
    assert changed.optimizer == OptimizerConfig("optax:lion", settings={"b1": 0.95, "mu_dtype": "bfloat16"})
    assert changed.model == model_config("llama-2x32", context=16, tied=True)
    again = with_overrides(changed, ["optimizer.settings.b1=null", "model=1x16"])
    assert again.optimizer.settings == {"b1": None, "mu_dtype": "bfloat16"}
    assert again.model == model_config("1x16", context=16)
    with pytest.raises(UserError, match="unknown model size 'gpt'"):
        with_overrides(RUN, ["model=gpt"])


def test_mup_is_for_adam():
    model = model_config("llama-2x32", context=16, mup_base_width=16)
    dataclasses.replace(RUN, model=model)
    for name in ("muon", "optax:lion"):
        with pytest.raises(UserError, match=f"mup_base_width .* not those of {name}: use one of adam"):
            dataclasses.replace(RUN, model=model, optimizer=OptimizerConfig(name))


def test_mup_leaves_weight_decay_as_it_is():
    config = OptimizerConfig("adamw", weight_decay=0.1)
    nothing = jax.tree.map(jnp.zeros_like, PARAMS)
    for factor in (None, lambda path: 0.25 if path == "layers/matrix" else 1.0):
        optimizer = make_optimizer(config, factor)
        decayed, _ = optimizer.update(nothing, optimizer.init(PARAMS), PARAMS, learning_rate=0.5)
        moved, _ = optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS, learning_rate=0.5)
        np.testing.assert_allclose(decayed["layers"]["matrix"], -0.05 * PARAMS["layers"]["matrix"], rtol=1e-6)
        adam = (moved["layers"]["matrix"] - decayed["layers"]["matrix"]) / -0.5
        np.testing.assert_allclose(adam, 1.0 if factor is None else 0.25, rtol=1e-5)


@pytest.mark.slow
def test_a_run_with_an_imported_optimizer_learns_and_goes_on(tmp_path, corpus):
    run = dataclasses.replace(RUN, optimizer=OptimizerConfig("optax:lion", settings={"b1": 0.9}), learning_rate=3e-3)
    train(run, tmp_path / "whole", corpus=corpus, num_devices=1)
    with pytest.raises(Interrupted):
        train(run, tmp_path / "parts", corpus=corpus, num_devices=1, should_stop=lambda: True)
    train(run, tmp_path / "parts", corpus=corpus, num_devices=1)
    whole, parts = ((run_folder(tmp_path / w, run) / "metrics.jsonl").read_bytes() for w in ("whole", "parts"))
    assert whole == parts
    losses = [line.test_loss for line in read_metrics(run_folder(tmp_path / "whole", run)) if line.evaluated]
    assert losses[-1] < losses[0] - 0.1
