"""The llama family wherever Kaplan's works: sharded, many at once, interrupted, with a live ramp."""

import dataclasses

import jax
import numpy as np
import pytest

from scaling_jax.io.config import from_dict, to_dict
from scaling_jax.parallel import replicate
from scaling_jax.scanning import Experiment, LearningRates, Subject
from scaling_jax.tasks import LlamaConfig, ModelConfig, layers, model_config
from scaling_jax.training import LiveRamp, OptimizerConfig, Run, read_metrics, run_folder, train
from scaling_jax.training.live_ramp import measure
from scaling_jax.training.population import Slots
from scaling_jax.training.program import Program, program_for

MODEL = LlamaConfig(
    2, 16, 2, 1, d_ff=16, num_experts=4, active_experts=2, tied=True, remat=True, mup_base_width=8, context=16
)  # fmt: skip
ADAMW = OptimizerConfig("adamw", weight_decay=0.1)
FSDP = Program(MODEL, ADAMW, 32, num_microbatches=2, steps_per_call=2, num_devices=8, sharding="fsdp")
ORDER = np.random.default_rng(0).integers(0, 320, (2, 32))


@pytest.fixture(autouse=True)
def layers_in_a_loop(monkeypatch):
    """They compile faster."""
    monkeypatch.setattr(layers, "_MOST_UNROLLED", 0)


def take_steps(program, corpus):
    rows = replicate(corpus.train_RxT1, program.num_devices)
    return program.steps(program.first_state(0), rows, ORDER, 1e-2, 2)


@pytest.mark.parametrize(
    "optimizer", [ADAMW, pytest.param(OptimizerConfig("optax:contrib.muon"), marks=pytest.mark.long)]
)
def test_sharded_parameters_train_as_replicated_ones(corpus, optimizer):
    model = MODEL if optimizer is ADAMW else dataclasses.replace(MODEL, mup_base_width=None)
    fsdp = dataclasses.replace(FSDP, optimizer=optimizer, model=model)
    (state, metrics), (_, expected) = (
        take_steps(p, corpus) for p in (fsdp, dataclasses.replace(fsdp, sharding="replicated"))
    )
    np.testing.assert_allclose(metrics.loss, expected.loss, rtol=1e-5)
    np.testing.assert_allclose(metrics.big_sq_norm_by_layer, expected.big_sq_norm_by_layer, rtol=1e-3)
    experts = state.params["layers"]["experts"]["in"]
    assert experts.sharding.shard_shape(experts.shape) == (2, 4, 16, 4)


@pytest.mark.slow
def test_runs_at_once_train_as_each_alone(corpus):
    program = dataclasses.replace(FSDP, num_devices=1, sharding="replicated")
    slots, rates = Slots(program, 1, 2), (1e-2, 3e-3)
    series = slots.steps(corpus.train_RxT1, [ORDER] * 2, rates, [2, 2])
    for slot, rate in enumerate(rates):
        _, alone = program.steps(program.init(0), corpus.train_RxT1, ORDER, rate, 2)
        np.testing.assert_allclose(series.loss[slot], alone.loss, rtol=1e-5)
    losses = slots.test_losses([0, 1], corpus.test_RxT1[:16])
    assert losses[0] != losses[1]


@pytest.mark.long
@pytest.mark.parametrize("name", ["adam", "muon"])
def test_a_run_learns(tmp_path, corpus, name):
    model = dataclasses.replace(MODEL, mup_base_width=None)
    run = Run(model, 64, 1e-2, max_steps=40, eval_tokens=512, steps_per_call=8, optimizer=OptimizerConfig(name))
    train(run, tmp_path, corpus=corpus, num_devices=1)
    lines = read_metrics(run_folder(tmp_path, run))
    losses = [line.test_loss for line in lines if line.evaluated]
    assert losses[-1] < losses[0] - 0.1
    assert len(lines[0].small_sq_norm_by_part) == 4


@pytest.mark.slow
@pytest.mark.parametrize(
    "metric", ["spectral", *(pytest.param(m, marks=pytest.mark.long) for m in ("adam_half", "curvature", "l1"))]
)
def test_live_ramps_measure_it(corpus, metric):
    program = dataclasses.replace(FSDP, num_devices=1, sharding="replicated")
    state, _ = program.steps(program.init(0), corpus.train_RxT1, ORDER, 1e-2, 2)
    assert np.isfinite(measure(MODEL, metric, state, corpus.train_RxT1[:16])).all()


def test_records_hold_either_family():
    """An older config.json has Kaplan's, without the other's keys."""
    older = {"n_layer": 1, "d_model": 16, "n_head": 1}
    kaplan = Run(ModelConfig(1, 16, 1), 128, 1e-3, max_steps=5)
    assert from_dict(Run, to_dict(kaplan) | {"model": older}) == kaplan
    assert kaplan.run_id == "1x16-b128-lr1.00e-3-s0-75e46a3520b6"
    for model in (MODEL, *(model_config(name) for name in ("llama-1x32", "llama-2x64-8e2"))):
        run = Run(model, 128, 1e-3, max_steps=5)
        assert from_dict(Run, to_dict(run)) == run
        assert run.run_id.startswith(f"{model.name}-b128-")
        subject = Subject(model, (2.0,), LearningRates(1e-2, 1_000))
        experiment = Experiment(name="x", subjects=(subject,), batch_tokens=(128, 256, 512), max_tokens=1_000)
        assert from_dict(Experiment, to_dict(experiment)) == experiment


def test_a_live_ramp_and_stages_keep_the_model():
    run = Run(model_config("llama-1x32"), 128, 1e-3, max_steps=5, live_ramp=LiveRamp(1.0, 512))
    assert program_for(run).model == run.model
    assert jax.tree.leaves(jax.eval_shape(program_for(run).init, 0))
