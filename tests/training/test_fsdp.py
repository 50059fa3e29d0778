"""Training with the state sharded over the devices gives what replicated training gives."""

import dataclasses

import jax
import numpy as np
import pytest

from scaling_jax.io import UserError
from scaling_jax.parallel import deal_out, replicate
from scaling_jax.parallel.devices import over_mesh
from scaling_jax.tasks import ModelConfig, batch_loss, evaluator
from scaling_jax.training import Interrupted, LiveRamp, OptimizerConfig, Run, Stage, read_metrics, run_folder, train
from scaling_jax.training import program as programs
from scaling_jax.training.program import Program, program_for
from scaling_jax.training.run import split_batch

MODEL = ModelConfig(n_layer=2, d_model=16, n_head=2, context=16)
RUN = Run(MODEL, 512, 3e-3, max_steps=24, eval_tokens=512, steps_per_call=8)
FSDP = Program(
    MODEL, OptimizerConfig(), batch_sequences=32, num_microbatches=2, steps_per_call=2, num_devices=8, sharding="fsdp"
)
PMAP = dataclasses.replace(FSDP, sharding="replicated")
ORDER = np.random.default_rng(0).integers(0, 320, (2, 32))


def take_steps(program, corpus, learning_rate=1e-2):
    rows = replicate(corpus.train_RxT1, program.num_devices)
    return program.steps(program.first_state(0), rows, ORDER, learning_rate, 2)


def series(workdir, name, run=RUN):
    return np.concatenate([getattr(line, name) for line in read_metrics(run_folder(workdir, run))])


def losses_of(workdir, run=RUN):
    return [line.test_loss for line in read_metrics(run_folder(workdir, run)) if line.evaluated]


def assert_same_curves(workdir, other, run=RUN, rtol=1e-5):
    for name in ("train_loss", "big_sq_norm"):
        np.testing.assert_allclose(series(workdir, name, run), series(other, name, run), rtol=rtol, err_msg=name)
    np.testing.assert_allclose(losses_of(workdir, run), losses_of(other, run), rtol=rtol)


@pytest.mark.parametrize(
    "run",
    [RUN, pytest.param(dataclasses.replace(RUN, max_steps=200, steps_per_call=64), marks=pytest.mark.long)],
    ids=["24 steps", "200 steps"],
)
def test_the_curves_are_those_of_pmap(tmp_path, corpus, run):
    for sharding in ("fsdp", "replicated"):
        train(run, tmp_path / sharding, corpus=corpus, sharding=sharding)
    assert_same_curves(tmp_path / "fsdp", tmp_path / "replicated", run)


def test_each_device_holds_a_part_of_large_arrays_also_after_a_step(corpus):
    for state in (FSDP.first_state(0), take_steps(FSDP, corpus)[0]):
        for kernel in (
            x["layers"]["feed_forward_in"]["dense"]["kernel"] for x in (state.params, state.opt_state[0].mu)
        ):
            assert kernel.shape == (2, 16, 64)
            assert kernel.sharding.shard_shape(kernel.shape) == (2, 16, 8)
        assert state.step.sharding.is_fully_replicated


@pytest.mark.parametrize("num_microbatches", [4, pytest.param(2, marks=pytest.mark.slow)])
def test_a_small_batch_is_a_microbatch_of_all_devices(corpus, num_microbatches):
    """By an independent way: gradients of every m-th sequence of the batch, one small batch at a time."""
    program = dataclasses.replace(FSDP, num_microbatches=num_microbatches)
    assert program.small_batch_sequences == 32 // num_microbatches
    _, metrics = take_steps(program, corpus)
    params, batch = PMAP.init(0).params, corpus.train_RxT1[ORDER[0]]
    grad = jax.jit(jax.grad(batch_loss(MODEL)))

    def sq_norm(tokens_BxT1):
        return sum(np.sum(np.square(x, dtype=np.float64)) for x in jax.tree.leaves(grad(params, tokens_BxT1)))

    small = np.mean([sq_norm(batch[j::num_microbatches]) for j in range(num_microbatches)])
    np.testing.assert_allclose(metrics.small_sq_norm[0], small, rtol=1e-5)
    np.testing.assert_allclose(metrics.big_sq_norm[0], sq_norm(batch), rtol=1e-5)


def test_a_line_says_the_small_batch_of_its_steps(tmp_path, corpus):
    train(dataclasses.replace(RUN, max_steps=3), tmp_path, corpus=corpus, sharding="fsdp")
    (line,) = read_metrics(run_folder(tmp_path, dataclasses.replace(RUN, max_steps=3)))
    assert (line.batch_tokens, line.small_batch_tokens) == (512, 256)


@pytest.mark.long
@pytest.mark.parametrize("name", ["muon", "adafactor", "signum"])
def test_every_optimizer_takes_the_same_step_on_parts(corpus, name):
    """By the loss after a step: biases of keys don't count, whose gradients are rounding alone."""
    config = OptimizerConfig(name, clip_norm=0.1)
    losses = [take_steps(dataclasses.replace(p, optimizer=config), corpus)[1].loss for p in (FSDP, PMAP)]
    np.testing.assert_allclose(*losses, rtol=1e-5)
    assert losses[0][1] < losses[0][0] - 1e-3


def test_each_device_may_hold_only_its_own_rows(corpus):
    rows = np.stack([corpus.train_RxT1[part].reshape(8, 4, 17) for part in ORDER], 1).reshape(8, 8, 17)
    own_order = np.tile(np.arange(8).reshape(2, 4), 8)
    state, metrics = FSDP.steps(FSDP.first_state(0), deal_out(rows, 8), own_order, 1e-2, 2, own_rows=True)
    expected_state, expected = take_steps(FSDP, corpus)
    jax.tree.map(np.testing.assert_array_equal, (state, metrics), (expected_state, expected))


@pytest.mark.parametrize("num_rows", [3, 16, 64])
def test_the_test_loss_is_the_mean_over_all_rows(corpus, num_rows):
    rows = corpus.test_RxT1[:num_rows]
    found = FSDP.test_loss(FSDP.first_state(0), rows)
    assert found == pytest.approx(float(evaluator(MODEL)(PMAP.init(0).params, rows)), rel=1e-6)


def interrupted(run, workdir, corpus, after, **options):
    answers = iter([False] * (after - 1) + [True])
    with pytest.raises(Interrupted):
        train(run, workdir, corpus=corpus, should_stop=lambda: next(answers), **options)


def test_a_run_that_goes_on_ends_as_an_undisturbed_one_bit_for_bit(tmp_path, corpus):
    run = dataclasses.replace(RUN, average_half_life_tokens=2_000.0)
    train(run, tmp_path / "whole", corpus=corpus, sharding="fsdp")
    for after in (1, 2):
        interrupted(run, tmp_path / "parts", corpus, after, sharding="fsdp")
    train(run, tmp_path / "parts", corpus=corpus, sharding="fsdp")
    for name in ("metrics.jsonl", "result.json", "config.json"):
        whole, parts = ((run_folder(tmp_path / which, run) / name).read_bytes() for which in ("whole", "parts"))
        assert whole == parts, name


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"sharding": "replicated"}, {"sharding": "fsdp"}),
        pytest.param({"sharding": "fsdp"}, {"sharding": "replicated", "num_devices": 4}, marks=pytest.mark.long),
        pytest.param({"sharding": "fsdp", "num_devices": 2}, {"sharding": "fsdp"}, marks=pytest.mark.long),
    ],
)
def test_a_run_goes_on_with_another_sharding_or_number_of_devices(tmp_path, corpus, before, after):
    train(RUN, tmp_path / "whole", corpus=corpus)
    interrupted(RUN, tmp_path / "parts", corpus, 2, **before)
    train(RUN, tmp_path / "parts", corpus=corpus, **after)
    assert len(list((tmp_path / "parts" / "runs").iterdir())) == 1
    assert_same_curves(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.long
def test_a_run_with_a_ramp_that_is_interrupted_compiles_once_for_each_batch(tmp_path, corpus, monkeypatch):
    run = dataclasses.replace(RUN, batch_tokens=256, ramp=(Stage(256 * 12, 512),), learning_rate=2.9e-3)
    traced, compiled = [], []

    def counted(body, *args, **options):
        def counting(*arguments):
            traced.append(body)
            return body(*arguments)

        compiled.append(over_mesh(counting, *args, **options))
        return compiled[-1]

    monkeypatch.setattr(programs, "over_mesh", counted)
    programs.compiled_steps.cache_clear()
    programs._evaluator.cache_clear()
    for after in (2, 2):
        interrupted(run, tmp_path, corpus, after, sharding="fsdp")
    train(run, tmp_path, corpus=corpus, sharding="fsdp")
    assert len({line.batch_tokens for line in read_metrics(run_folder(tmp_path, run))}) == 2
    assert len(traced) == len(compiled) == 2
    assert [step._cache_size() for step in compiled] == [1, 1]
    assert programs._evaluator(MODEL, 8, "fsdp")._cache_size() == 1


@pytest.mark.long
def test_a_live_ramp_measures_sharded_parameters(tmp_path, corpus):
    live = LiveRamp(1e9, 1_024, every_steps=4, metric="curvature", sequences=16)
    run = dataclasses.replace(RUN, live_ramp=live, max_steps=4)
    for sharding in ("fsdp", "replicated"):
        train(run, tmp_path / sharding, corpus=corpus, sharding=sharding)
    looks = [read_metrics(run_folder(tmp_path / s, run))[-1].live for s in ("fsdp", "replicated")]
    np.testing.assert_allclose(*looks, rtol=1e-3)


@pytest.mark.parametrize(("batch", "most", "devices", "expected"), [(16, 16, 8, 2), (128, 16, 1, 8), (64, 2, 8, 4)])
def test_all_devices_share_at_least_two_microbatches(batch, most, devices, expected):
    assert split_batch(batch, most, devices, shared=True) == expected


def test_a_batch_of_one_sequence_for_each_device_is_refused_with_what_would_do():
    with pytest.raises(UserError, match=r"8 sequences on 8 devices .* 16 or more"):
        program_for(dataclasses.replace(RUN, batch_tokens=128), 8, sharding="fsdp")


def test_the_sharding_is_no_part_of_the_run():
    assert "sharding" not in {field.name for field in dataclasses.fields(Run)}
