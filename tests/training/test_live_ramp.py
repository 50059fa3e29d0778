import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

from scaling_jax.io import UserError
from scaling_jax.noise_scale import Moments, geometries, unbiased, value_and_grad
from scaling_jax.tasks import ModelConfig, batch_loss
from scaling_jax.training import Interrupted, LiveRamp, OptimizerConfig, Run, read_metrics, run_folder, train
from scaling_jax.training.live_ramp import _MEASURES, confidence_at, measure, next_stage
from scaling_jax.training.metrics import MetricsLine, course
from scaling_jax.training.program import Program
from scaling_jax.training.stages import METRICS

MODEL = ModelConfig(1, 16, 1, context=16)
RUN = Run(MODEL, batch_tokens=64, learning_rate=1e-2, max_tokens=10_000, eval_tokens=512, steps_per_call=8)
TOKENS = np.random.default_rng(0).integers(0, 257, (64, 17)).astype(np.uint16)


def made_up_lines(noise_scale_tokens, steps, spread=0.1, batch_tokens=64):
    """One line of `steps` steps whose |G|² is 1 and whose noise scale is given."""
    return [made_up_line(noise_scale_tokens, steps, steps, spread, batch_tokens)]


def made_up_line(noise_scale_tokens, step, num_steps, spread=0.1, batch_tokens=64, small_batch_tokens=16):
    small, big = (1 + noise_scale_tokens / tokens for tokens in (small_batch_tokens, batch_tokens))
    noise = np.random.default_rng(step - num_steps).normal(0, spread, (2, num_steps))
    return MetricsLine(
        step=step,
        tokens=step * batch_tokens,
        epoch=0.5,
        batch_tokens=batch_tokens,
        small_batch_tokens=small_batch_tokens,
        train_loss=np.full(num_steps, 3.0),
        small_sq_norm=small + noise[0],
        big_sq_norm=big + noise[1],
        small_sq_norm_by_part=None,
        big_sq_norm_by_part=None,
        live=None,
        evaluated=False,
        test_loss=math.nan,
        test_bits_per_byte=None,
    )


def with_live(line, *measured):
    return dataclasses.replace(line, live=np.array(measured, float))


@pytest.mark.parametrize(("noise_scale", "grows"), [(600, True), (300, True), (200, False), (100, False)])
def test_a_live_ramp_doubles_when_the_noise_scale_passes_its_threshold(noise_scale, grows):
    live = LiveRamp(threshold=2.0, max_batch_tokens=1_024, every_steps=50)
    stage = next_stage(64, (), live, made_up_lines(noise_scale, 200))
    assert stage.batch_tokens == (128 if grows else 64)
    assert stage.learning_rate_factor == pytest.approx(math.sqrt(stage.batch_tokens / 64))


@pytest.mark.parametrize(("noise_scale", "batch"), [(600, 64), (1_400, 512)])
def test_a_live_ramp_with_a_large_factor_waits_for_the_large_batch_and_switches_once(noise_scale, batch):
    """At 600 tokens a ramp that doubles goes on to 128."""
    live = LiveRamp(threshold=2.0, max_batch_tokens=512, every_steps=50, factor=8)
    lines = made_up_lines(noise_scale, 200)
    stage = next_stage(64, (), live, lines)
    assert (stage.batch_tokens, stage.learning_rate_factor) == (batch, pytest.approx(math.sqrt(batch / 64)))
    assert next_stage(64, (), dataclasses.replace(live, factor=2), lines).batch_tokens == 128
    assert next_stage(64, (), live, made_up_lines(10_000, 200, batch_tokens=512)).batch_tokens == 512


def test_a_factor_that_does_not_grow_is_refused():
    with pytest.raises(UserError, match=r"live_ramp.factor = 1 .*from 2 on"):
        LiveRamp(threshold=2.0, max_batch_tokens=512, factor=1)


def test_a_live_ramp_follows_the_loss_rather_than_the_start():
    """A gradient ten times as large in the first half, as early in training, does not hide the noise scale of now."""
    live = LiveRamp(threshold=2.0, max_batch_tokens=1_024, every_steps=50)
    (line,) = made_up_lines(600, 400)
    early = np.where(np.arange(400) < 200, 100.0, 0.0)
    line = dataclasses.replace(line, small_sq_norm=line.small_sq_norm + early, big_sq_norm=line.big_sq_norm + early)
    assert next_stage(64, (), live, [line]).batch_tokens == 128


@pytest.mark.parametrize("small_batches", [(16, 32), (32, 16)])
@pytest.mark.parametrize(("noise_scale", "grows"), [(300, True), (200, False)])
def test_a_live_ramp_takes_each_lines_own_small_batch(small_batches, noise_scale, grows):
    """As where a run goes on on other devices; the first or the last one's for all would decide otherwise."""
    live = LiveRamp(threshold=2.0, max_batch_tokens=1_024, every_steps=50)
    lines = [
        made_up_line(noise_scale, 100 * (k + 1), 100, small_batch_tokens=small_batch)
        for k, small_batch in enumerate((*small_batches, *small_batches))
    ]
    assert next_stage(64, (), live, lines).batch_tokens == (128 if grows else 64)


def test_lines_of_a_run_that_goes_on_on_other_devices_say_their_own_small_batch(tmp_path, corpus):
    live = LiveRamp(threshold=1e-3, max_batch_tokens=128, every_steps=10)
    run = dataclasses.replace(RUN, live_ramp=live)
    answers = iter([False] * 3 + [True])
    with pytest.raises(Interrupted):
        train(run, tmp_path, corpus=corpus, num_devices=1, should_stop=lambda: next(answers))
    before = read_metrics(run_folder(tmp_path, run))
    train(run, tmp_path, corpus=corpus, num_devices=4)
    lines = read_metrics(run_folder(tmp_path, run))
    assert {(line.batch_tokens, line.small_batch_tokens) for line in before} == {(64, 32)}
    assert {(line.batch_tokens, line.small_batch_tokens) for line in lines[len(before) :]} == {(64, 16), (128, 32)}
    steps = course(lines)
    np.testing.assert_array_equal(
        steps.small_batch_tokens, np.concatenate([[line.small_batch_tokens] * line.num_steps for line in lines])
    )


def first_doublings(noise_scale_tokens, runs=150, looks=20, every_steps=50, spread=0.3):
    """Steps at which runs of a constant noise scale doubled a batch of 64, inf if never; the threshold is 256 tokens.

    |G|² of a step has about the standard deviation 0.4 times its mean.
    """
    live = LiveRamp(threshold=2.0, max_batch_tokens=1_024, every_steps=every_steps)
    draws, found = np.random.default_rng(0), []
    small, big = (1 + noise_scale_tokens / tokens for tokens in (16, 64))
    for _ in range(runs):
        lines = []
        for look in range(1, looks + 1):
            norms = draws.normal([[small], [big]], spread, (2, every_steps))
            line = made_up_line(noise_scale_tokens, look * every_steps, every_steps)
            lines.append(dataclasses.replace(line, small_sq_norm=norms[0], big_sq_norm=norms[1]))
            if next_stage(64, (), live, lines).batch_tokens > 64:
                break
        else:
            look = math.inf
        found.append(look * every_steps)
    return np.array(found)


def test_at_the_threshold_fewer_than_5_percent_of_runs_ever_double():
    """With 95 % intervals at each of these looks it would be a fifth."""
    assert np.isfinite(first_doublings(256.0)).mean() < 0.05


def test_half_above_the_threshold_every_run_doubles_soon():
    steps = first_doublings(1.5 * 256)
    assert np.median(steps) <= 100
    assert steps.max() <= 250


@pytest.mark.parametrize("looks", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_however_many_looks_a_run_takes_they_are_seldom_wrong(looks):
    """The mean of the later half of a random walk's steps, against the normal quantile of each look's confidence."""
    draws, every, runs = np.random.default_rng(0), 5, 400
    stops = every * np.arange(1, looks + 1)
    quantiles = np.array([norm.ppf(0.5 + confidence_at(k + 1) / 2) for k in range(looks)])
    wrong = 0
    for _ in range(runs):
        walk = np.concatenate([[0.0], np.cumsum(draws.standard_normal(stops[-1]))])
        wrong += np.any(walk[stops] - walk[stops // 2] > quantiles * np.sqrt(stops - stops // 2))
    assert wrong / runs < 0.05


def test_batches_that_earlier_looks_decided_stand():
    """As in a run that an earlier version began, whose looks asked for less."""
    live = LiveRamp(threshold=2.0, max_batch_tokens=1_024, every_steps=50)
    stage = next_stage(64, (), live, made_up_lines(1.0, 200, batch_tokens=128))
    assert stage.batch_tokens == 128
    assert stage.learning_rate_factor == pytest.approx(math.sqrt(2))


def test_noise_alone_makes_no_live_ramp_grow():
    live = LiveRamp(threshold=2.0, max_batch_tokens=1_024, every_steps=50)
    assert next_stage(64, (), live, made_up_lines(400, 50, spread=30.0)).batch_tokens == 64


def test_a_live_ramp_stops_at_its_largest_batch_and_looks_only_now_and_then():
    live = LiveRamp(threshold=2.0, max_batch_tokens=64, every_steps=50)
    assert next_stage(64, (), live, made_up_lines(1e4, 200)).batch_tokens == 64
    live = dataclasses.replace(live, max_batch_tokens=128, every_steps=60)
    assert next_stage(64, (), live, made_up_lines(1e4, 200)).batch_tokens == 64


@pytest.mark.parametrize("metric", ["norm_layers", "simpel", ""])
def test_a_metric_that_is_none_is_refused_when_it_is_given(metric):
    with pytest.raises(UserError, match=f"live_ramp.metric = '{metric}'.*simple, l1, spectral"):
        LiveRamp(threshold=0.5, max_batch_tokens=4_096, metric=metric)


@pytest.mark.parametrize("metric", ["l1", "spectral"])
def test_metrics_in_a_norm_use_the_lower_bound_of_their_noise_scale(metric):
    live = LiveRamp(threshold=2.0, max_batch_tokens=1_024, every_steps=50, metric=metric)
    lines = made_up_lines(1.0, 50)
    for high, expected in ((1.0, 128), (1.2, 64)):  # 17²/1.0² > 2·128 > 17²/1.2²
        measured = [with_live(lines[0], 17.0, 0.9, high) for _ in range(6)]
        assert next_stage(64, (), live, measured).batch_tokens == expected
        assert next_stage(64, (), live, measured[:4]).batch_tokens == 64


@pytest.mark.parametrize("metric", ["curvature", "adam_half", "adam_full"])
@pytest.mark.parametrize(("noise_scale", "grows"), [(600, True), (300, True), (200, False), (100, False)])
def test_metrics_of_two_moments_use_the_lower_end_of_their_interval(metric, noise_scale, grows):
    """By what was measured at the looks, not by the training steps, whose noise scale is 1 token here."""
    live = LiveRamp(threshold=2.0, max_batch_tokens=1_024, every_steps=50, metric=metric)
    draws = np.random.default_rng(0)
    lines = [
        with_live(
            made_up_lines(1.0, 50)[0],
            1 + noise_scale / 256 + draws.normal(0, 1e-3),
            1 + noise_scale / 2048,
            256.0,
            2048.0,
        )
        for _ in range(12)
    ]
    assert next_stage(64, (), live, lines).batch_tokens == (128 if grows else 64)
    one_missing = [*lines[:8], with_live(lines[8], None, None, 256.0, 2048.0), *lines[9:]]
    assert next_stage(64, (), live, one_missing).batch_tokens == (128 if grows else 64)


def test_a_live_ramp_does_not_look_during_warm_up():
    live = LiveRamp(threshold=2.0, max_batch_tokens=1_024, every_steps=50)
    lines = made_up_lines(600, 200)
    assert next_stage(64, (), live, lines, warmup_steps=200).batch_tokens == 64
    assert next_stage(64, (), live, lines, warmup_steps=199).batch_tokens == 128


@pytest.mark.parametrize("metric", ["l1", pytest.param("curvature", marks=pytest.mark.long)])
def test_a_ramp_by_a_measured_metric_trains(tmp_path, corpus, metric):
    """It measures at its looks and nowhere else, and grows after the third at the earliest."""
    live = LiveRamp(threshold=1e-3, max_batch_tokens=128, every_steps=5, metric=metric, sequences=64)
    run = dataclasses.replace(RUN, live_ramp=live)
    train(run, tmp_path, corpus=corpus, num_devices=1)
    lines = read_metrics(run_folder(tmp_path, run))
    looks = [line.step for line in lines if line.live is not None]
    assert looks == [line.step for line in lines if line.step % 5 == 0]
    assert len(looks) > 10
    grown = next(line for line in lines if line.batch_tokens == 128)
    before = grown.step - grown.num_steps
    assert before in looks[2:]
    assert lines[-1].batch_tokens == 128


def state_of(optimizer="adam"):
    return Program(MODEL, OptimizerConfig(optimizer), 8, 2, 4, 1).init(0)


@pytest.fixture(scope="module")
def adam_state():
    """With second moments of one: its metric is the Euclidean one."""
    state = state_of()
    adam = state.opt_state[0]
    return state._replace(opt_state=(adam._replace(nu=jax.tree.map(jnp.ones_like, adam.nu)), *state.opt_state[1:]))


def test_every_metric_but_the_training_steps_own_can_be_measured():
    assert {"simple", *_MEASURES} == set(METRICS)


@pytest.mark.parametrize("metric", ["adam_half", "adam_full"])
def test_moments_give_a_noise_scale_in_tokens(adam_state, metric):
    """16 times that in sequences, each of 16 tokens."""
    loss = value_and_grad(batch_loss(MODEL), num_microbatches=8)
    (_, moments), _ = jax.jit(loss)(adam_state.params, TOKENS)
    grad_sq_norm, trace_cov = map(float, unbiased(moments))
    found = unbiased(Moments(*measure(MODEL, metric, adam_state, TOKENS)))
    np.testing.assert_allclose(found[1] / found[0], 16 * trace_cov / grad_sq_norm, rtol=1e-3)


def test_bounds_in_l1_give_a_noise_scale_in_tokens(adam_state):
    in_l1 = jax.jit(geometries.l1(batch_loss(MODEL), num_microbatches=8))
    expected = geometries.bounds(jax.tree.map(lambda x: x[None], in_l1(adam_state.params, TOKENS)))
    found = geometries.bounds(geometries.NormBounds(*np.array(measure(MODEL, "l1", adam_state, TOKENS))[:, None]))
    np.testing.assert_allclose(found[0], 16 * expected[0], rtol=1e-4)


@pytest.mark.slow
def test_the_spectral_norm_is_that_of_the_matrices_inside_layers(adam_state):
    _, _, grad_high = measure(MODEL, "spectral", adam_state, TOKENS)
    grads = jax.jit(jax.grad(batch_loss(MODEL)))(adam_state.params, TOKENS)["layers"]
    matrices = [x for stack in jax.tree.leaves(grads) if stack.ndim == 3 for x in stack]
    assert len(matrices) == 4
    nuclear = sum(np.linalg.norm(x, "nuc") for x in matrices)
    np.testing.assert_allclose(grad_high, nuclear, rtol=0.02)


@pytest.mark.slow
def test_curvature_is_that_of_the_second_half_and_gradients_those_of_the_first(adam_state):
    loss, (first, second) = batch_loss(MODEL), np.split(TOKENS, 2)
    grads = jax.jit(jax.grad(loss))(adam_state.params, first)
    _, product = jax.jit(lambda *at: jax.jvp(lambda p: jax.grad(loss)(p, second), at[:1], at[1:]))(
        adam_state.params, grads
    )
    expected = sum(float(jnp.sum(g * h)) for g, h in zip(*map(jax.tree.leaves, (grads, product)), strict=True))
    _, big, small_batch, big_batch = measure(MODEL, "curvature", adam_state, TOKENS)
    np.testing.assert_allclose(big, expected, rtol=1e-3)
    assert (small_batch, big_batch) == (4 * 16, 32 * 16)


def test_adams_metric_without_adam_is_refused():
    with pytest.raises(UserError, match=r"live_ramp\.metric = 'adam_half' .*adam"):
        measure(MODEL, "adam_half", state_of("sgd"), TOKENS)


def test_sequences_that_do_not_make_halves_of_eight_parts_are_refused():
    with pytest.raises(UserError, match=r"sequences = 24 .*16, 32, 48"):
        LiveRamp(1.0, 256, metric="l1", sequences=24)


def test_an_unknown_metric_is_refused_when_the_ramp_is_made():
    with pytest.raises(UserError, match=r"live_ramp\.metric = 'hessian': choose from .*curvature"):
        LiveRamp(1.0, 256, metric="hessian")
