"""Programs compiled for TPU slices; those tests need libtpu, from PyPI."""

import dataclasses
import importlib.util
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from scaling_jax.compile.ahead_of_time import (
    compile_runs,
    compile_steps,
    plain_value_and_grad,
    planned_runs,
)
from scaling_jax.compile.topologies import topology
from scaling_jax.console.tables import print_compiled
from scaling_jax.io import UserError
from scaling_jax.noise_scale import value_and_grad
from scaling_jax.scanning import Experiment, LearningRates, Subject
from scaling_jax.scanning.records import load_plan
from scaling_jax.tasks import ModelConfig, model_config
from scaling_jax.training import LiveRamp, OptimizerConfig, Run, Stage
from scaling_jax.training.program import program_for

MODEL = model_config("2x64", context=128)
RUN = Run(MODEL, 128 * 32, 1e-3, max_steps=5, microbatch_tokens=128)
EXPERIMENTS = Path(__file__).parents[2] / "experiments"
needs_libtpu = pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu isn't installed")


@pytest.fixture(scope="module")
def v5e():
    return topology("v5e:4x4")


@needs_libtpu
@pytest.mark.slow
def test_the_noise_scale_adds_no_collective_operation_on_a_tpu(v5e):
    """Its scalars ride on the gradient's all-reduce; a second reduction after the gradient's would not."""
    program = program_for(RUN, 16, "shard_map")
    assert program.num_microbatches == 2
    with_noise, plain = (compile_steps(program, v5e, d).collectives for d in (value_and_grad, plain_value_and_grad))
    assert [c.kind for c in plain] == [c.kind for c in with_noise] == ["all-reduce"]
    assert with_noise[0].num_bytes - plain[0].num_bytes == 4 * (MODEL.n_layer + 2)
    assert plain[0].num_bytes > 4 * MODEL.num_params


def one_more_reduction(loss_fn, *, axis_name, **options):
    def wrapped(params, batch):
        (loss, moments), grads = value_and_grad(loss_fn, axis_name=axis_name, **options)(params, batch)
        device = jax.lax.axis_index(axis_name)
        later = jax.lax.pmean(jax.tree.map(lambda x: x * device, moments.big_sq_norm), axis_name)
        return (loss, moments._replace(big_sq_norm=later)), grads

    return wrapped


@needs_libtpu
@pytest.mark.slow
def test_an_added_collective_operation_is_seen(v5e):
    found = compile_steps(program_for(RUN, 16, "shard_map"), v5e, one_more_reduction).collectives
    assert len(found) == 2


@needs_libtpu
@pytest.mark.slow
def test_a_batch_is_measured_and_one_that_does_not_divide_is_said(v5e):
    (batch,) = compile_runs([dataclasses.replace(RUN, batch_tokens=128 * 24)], v5e)
    assert (batch.slice_name, batch.nearest_batches) == ("v5e:2x4", (128 * 16, 128 * 32))
    assert batch.fits
    assert 2**30 < batch.plain_step.memory_bytes <= batch.step.memory_bytes < 8 * 2**30
    assert batch.counted_flops == pytest.approx(batch.step_flops, rel=0.2)
    console = Console(width=120)
    with console.capture() as captured:
        console.print(print_compiled([batch], v5e))
    text = " ".join(captured.get().split())
    assert "v5e:4x4: 16 chips of 15.75 GiB, 4 hosts" in text
    assert re.search("24 sequences, which 16 chips can't share.* v5e:2x4;.* 2,048 or 4,096 tokens", text)
    assert "the noise scale adds 0 collective operations and 16 bytes" in text


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_fit_is_said_without_a_traceback(v5e):
    wide = dataclasses.replace(MODEL, vocab_size=4_000_000)
    found = compile_steps(
        program_for(dataclasses.replace(RUN, model=wide, microbatch_tokens=256), 16, "shard_map"), v5e
    )
    assert not found.fits
    assert found.memory_bytes is None or found.memory_bytes > v5e.chip.memory_bytes


@pytest.fixture(scope="module")
def large_on_v5e():
    """A model of 1.2B parameters, whose state (14.5 GB with Adam) and gradient don't fit on a chip of 15.75 GiB."""
    model = ModelConfig(24, 2_048, 16, vocab_size=50_257, context=1_024, compute_dtype="bfloat16")
    optimizer = OptimizerConfig("adamw", weight_decay=0.1, clip_norm=1.0)
    run = Run(model, 2**19, 1e-3, max_steps=5, microbatch_tokens=1_024, eval_tokens=2**18, optimizer=optimizer)
    (batch,) = compile_runs([run], topology("v5e:16x16"), "fsdp")
    return batch


@needs_libtpu
@pytest.mark.slow
def test_a_model_that_does_not_fit_replicated_fits_sharded(large_on_v5e):
    assert large_on_v5e.slice_name == "v5e:16x16"
    assert (large_on_v5e.program.num_microbatches, large_on_v5e.program.small_batch_sequences) == (2, 256)
    assert 16 * large_on_v5e.program.model.num_params > topology("v5e:16x16").chip.memory_bytes
    assert large_on_v5e.fits
    assert large_on_v5e.step.memory_bytes < 0.75 * topology("v5e:16x16").chip.memory_bytes


@needs_libtpu
@pytest.mark.slow
def test_the_noise_scale_adds_one_message_of_scalars_to_the_sharded_step(large_on_v5e):
    step, plain = large_on_v5e.step.collectives, large_on_v5e.plain_step.collectives
    assert len(step) - len(plain) <= 1
    assert 0 < sum(c.num_bytes for c in step) - sum(c.num_bytes for c in plain) < 1_000


@needs_libtpu
@pytest.mark.slow
def test_what_does_not_divide_is_compiled_for_a_smaller_slice_and_shared_by_two_sequences_a_chip(v5e):
    (batch,) = compile_runs([dataclasses.replace(RUN, batch_tokens=128 * 16)], v5e, "fsdp")
    assert (batch.slice_name, batch.nearest_batches) == ("v5e:2x4", (128 * 32,))
    assert batch.fits


def test_the_plain_gradient_is_that_of_training():
    params, rows_BxD = {"w": jnp.arange(3.0)}, jnp.arange(12.0).reshape(4, 3)

    def loss(params, rows_BxD):
        return jnp.mean(jnp.square(rows_BxD @ params["w"]))

    both = [f(loss, num_microbatches=2, axis_name=None) for f in (value_and_grad, plain_value_and_grad)]
    ((expected_loss, _), expected), ((found_loss, _), found) = (jax.jit(f)(params, rows_BxD) for f in both)
    assert found_loss == pytest.approx(expected_loss)
    assert jnp.allclose(found["w"], expected["w"], rtol=1e-6)


def test_an_experiments_runs_are_planned_once_for_each_model_and_batch():
    subjects = tuple(Subject(model_config(n), (2.9,), LearningRates(8e-3, 2_048)) for n in ("1x16", "1x32"))
    experiment = Experiment("planned", subjects, (128, 256, 512), 100_000, seeds=(3, 4))
    planned = [(run.model.name, run.batch_tokens, run.seed) for run in planned_runs(experiment)]
    assert planned == [(name, batch, 3) for name in ("1x16", "1x32") for batch in (128, 256, 512)]


def test_every_batch_that_a_ramp_may_take_is_planned():
    base = Run(model_config("1x16"), 128, 1e-3, max_steps=5)
    runs = {
        "constant": base,
        "live": dataclasses.replace(base, live_ramp=LiveRamp(2.0, max_batch_tokens=1_000)),
        "late": dataclasses.replace(base, live_ramp=LiveRamp(2.0, max_batch_tokens=1_024, factor=8)),
        "scheduled": dataclasses.replace(base, ramp=(Stage(1_024, 512), Stage(8_192, 2_048))),
    }
    assert [run.batch_tokens for run in planned_runs(runs)] == [128, 256, 512, 1_024, 2_048]
    assert all(run.live_ramp is None and run.ramp == () for run in planned_runs(runs))


def test_a_file_without_a_plan_is_refused(tmp_path):
    (tmp_path / "mine.py").write_text("RUNS = {'one': 1}\n")
    with pytest.raises(UserError, match="neither EXPERIMENT"):
        load_plan(tmp_path / "mine.py")


@pytest.mark.parametrize("name", ["kaplan_3m_85m", "kaplan_budgets", "kaplan_small", "gpt_85m_ramp"])
def test_the_large_experiments_plan_batches_of_the_papers_tokens(name):
    runs = planned_runs(load_plan(EXPERIMENTS / f"{name}.py"))
    assert {run.model.context for run in runs} == {1_024}
    assert {run.model.vocab_size for run in runs} == {50_257}
    assert all(run.model.num_params in (12 * 4 * 256**2, 12 * 12 * 768**2) for run in runs)


@needs_libtpu
@pytest.mark.long
@pytest.mark.parametrize("sharding", ["replicated", "fsdp"])
@pytest.mark.parametrize(
    "name", sorted(path.stem for path in EXPERIMENTS.glob("*.py") if "EXPERIMENT = " in path.read_text())
)
@pytest.mark.parametrize("slice_name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1"])
def test_every_experiment_compiles_for_every_kind_of_tpu(slice_name, name, sharding):
    """The largest model of each, at a batch that all devices share. The noise scale adds one small message at most."""
    slice_ = topology(slice_name)
    runs = planned_runs(load_plan(EXPERIMENTS / f"{name}.py"))
    largest = max(runs, key=lambda run: run.model.num_params).model
    run = dataclasses.replace(
        next(run for run in runs if run.model == largest), batch_tokens=largest.context * 4 * len(slice_.devices)
    )
    (batch,) = compile_runs([run], slice_, sharding)
    assert batch.slice_name == slice_name
    assert batch.step.fits
    assert len(batch.step.collectives) <= len(batch.plain_step.collectives) + 1
