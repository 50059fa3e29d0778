"""What configs, fits and estimators must do whatever they are given."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scaling_jax.fitting import fit_loss_law, fit_scan, fit_tradeoff
from scaling_jax.io.config import config_hash, from_dict, to_dict, with_overrides
from scaling_jax.noise_scale import Moments, estimate, unbiased
from scaling_jax.scanning import Experiment, LearningRates, Subject
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import OptimizerConfig
from tests.fitting.planted import Planted

positive = st.floats(1e-6, 1e6)
rates = st.builds(
    LearningRates,
    peak=positive,
    reference_batch_tokens=st.integers(1, 2**30),
    factor=st.floats(1.01, 10),
    places=st.integers(1, 5),
    most=st.integers(1, 20),
    give_up_factor=st.none() | st.floats(1.01, 10),
)
losses = st.lists(st.floats(0.1, 10), min_size=1, max_size=5, unique=True).map(lambda x: tuple(sorted(x, reverse=True)))
subjects = st.builds(Subject, model=st.builds(ModelConfig, st.integers(1, 9), st.just(32), st.just(2)),
                     target_losses=losses, learning_rates=rates)  # fmt: skip
experiments = st.builds(
    Experiment,
    name=st.text(st.characters(exclude_characters="/\\\0", exclude_categories=["Cs"]), min_size=3),
    subjects=st.lists(subjects, min_size=1, max_size=3, unique_by=lambda s: s.model.name).map(tuple),
    batch_tokens=st.lists(st.integers(2, 2**12).map(lambda n: n * 64), min_size=3, max_size=6, unique=True).map(tuple),
    max_tokens=st.integers(1, 10**15),
    seeds=st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=3, unique=True).map(tuple),
    optimizer=st.builds(OptimizerConfig, beta2=st.floats(0, 0.999), clip_norm=st.none() | positive),
)


@settings(max_examples=60, deadline=None)
@given(experiment=experiments)
def test_any_experiment_comes_back_from_its_values(experiment):
    again = from_dict(Experiment, to_dict(experiment))
    assert again == experiment
    assert config_hash(again) == config_hash(experiment)
    assert with_overrides(experiment, []) == experiment


@settings(max_examples=60, deadline=None)
@given(experiment=experiments, max_tokens=st.integers(1, 10**15), beta=st.floats(0, 0.999), seeds=st.just((5, 7)))
def test_overrides_are_replacements(experiment, max_tokens, beta, seeds):
    text = [f"max_tokens={max_tokens}", f"optimizer.beta1={beta!r}", f"seeds={list(seeds)}"]
    replaced = dataclasses.replace(
        experiment,
        max_tokens=max_tokens,
        optimizer=dataclasses.replace(experiment.optimizer, beta1=beta),
        seeds=seeds,
    )
    assert with_overrides(experiment, text) == replaced
    assert (config_hash(replaced) == config_hash(experiment)) == (replaced == experiment)


def noisy_steps(s_min, e_min, batches, seed):
    noise = np.random.default_rng(seed).normal(0, 0.03, len(batches))
    return (s_min + e_min / batches) * np.exp(noise)


BATCHES = 2.0 ** np.arange(7, 15)


@settings(max_examples=40, deadline=None)
@given(
    s_min=st.floats(1e2, 1e5),
    b_crit=st.floats(500, 5_000),
    tokens=st.floats(1e-2, 1e6),
    steps=st.floats(1e-1, 1e3),
    seed=st.integers(0, 99),
)
def test_a_tradeoff_is_the_same_in_any_unit_and_order(s_min, b_crit, tokens, steps, seed):
    """With batches ×k and steps ×m: B_crit ×k, S_min ×m, E_min ×km; the rows' order says nothing."""
    took = noisy_steps(s_min, s_min * b_crit, BATCHES, seed)
    here, there = fit_tradeoff(BATCHES, took), fit_tradeoff(BATCHES * tokens, took * steps)
    assert there.b_crit == pytest.approx(here.b_crit * tokens, rel=1e-5)
    assert there.s_min == pytest.approx(here.s_min * steps, rel=1e-5)
    assert there.e_min == pytest.approx(here.e_min * steps * tokens, rel=1e-5)
    assert there.b_crit_interval == pytest.approx([x * tokens for x in here.b_crit_interval], rel=1e-4)
    order = np.random.default_rng(seed).permutation(len(BATCHES))
    assert fit_tradeoff(BATCHES[order], took[order]).b_crit == pytest.approx(here.b_crit, rel=1e-6)


@settings(max_examples=40, deadline=None)
@given(b_star=st.floats(1e3, 1e9), exponent=st.floats(-8, -1), tokens=st.floats(1e-3, 1e3), seed=st.integers(0, 99))
def test_a_law_is_the_same_in_any_unit_and_order(b_star, exponent, tokens, seed):
    draws = np.random.default_rng(seed)
    loss = np.geomspace(4, 2, 9)
    b_crit = b_star * loss**exponent * np.exp(draws.normal(0, 0.05, 9))
    here, there = fit_loss_law(loss, b_crit), fit_loss_law(loss, b_crit * tokens)
    assert there.exponent == pytest.approx(here.exponent, rel=1e-6)
    assert there.b_star == pytest.approx(here.b_star * tokens, rel=1e-5)
    order = draws.permutation(9)
    assert fit_loss_law(loss[order], b_crit[order]).exponent == pytest.approx(here.exponent, rel=1e-6)


@pytest.mark.parametrize("tokens", [1e-2, 64.0, 1e5])
def test_a_scan_fit_is_the_same_in_any_unit_and_order(tokens):
    columns = Planted().columns(np.random.default_rng(0))
    batch = np.asarray(columns["batch_tokens"], float)
    order = np.random.default_rng(1).permutation(len(batch))
    here = fit_scan(**columns, resamples=200)
    scaled = fit_scan(**{**columns, "batch_tokens": batch * tokens}, resamples=200)
    mixed = fit_scan(**{name: [column[i] for i in order] for name, column in columns.items()}, resamples=200)
    assert scaled.law.exponent == pytest.approx(here.law.exponent, rel=1e-5)
    assert scaled.law.b_star == pytest.approx(here.law.b_star * tokens, rel=1e-4)
    assert mixed.law.exponent == pytest.approx(here.law.exponent, rel=1e-5)
    by_place = {(p.model, p.loss): p.tradeoff.b_crit for p in here.points}
    assert {(p.model, p.loss): pytest.approx(p.tradeoff.b_crit, rel=1e-6) for p in mixed.points} == by_place


@settings(max_examples=200, deadline=None)
@given(
    grad_sq_norm=st.floats(1e-6, 1e6),
    trace_cov=st.floats(1e-6, 1e6),
    small=st.integers(1, 512),
    parts=st.integers(2, 512),
    scale=st.floats(1e-3, 1e3),
)
def test_the_moments_algebra_inverts_their_expectations(grad_sq_norm, trace_cov, small, parts, scale):
    """E|g_B|² = |G|² + tr(Σ)/B at two batch sizes gives both back, whatever the gradient's unit."""
    big = small * parts
    assume(trace_cov / big < 1e6 * grad_sq_norm and grad_sq_norm < 1e6 * trace_cov / small)
    expected = [scale * (grad_sq_norm + trace_cov / batch) for batch in (small, big)]
    found = unbiased(Moments(*expected, float(small), float(big)))
    assert [float(x) for x in found] == pytest.approx([scale * grad_sq_norm, scale * trace_cov], rel=1e-4)


@settings(max_examples=60, deadline=None)
@given(ratio=st.floats(0.1, 1e3), unit=st.floats(1e-6, 1e6), tokens=st.floats(1, 1e4), seed=st.integers(0, 99))
def test_a_noise_scale_does_not_depend_on_the_gradients_unit(ratio, unit, tokens, seed):
    draws = np.random.default_rng(seed)
    grad_sq_norm, trace_cov = draws.normal(1, 0.5, 40), ratio * draws.normal(1, 0.5, 40)
    here, there = estimate(grad_sq_norm, trace_cov), estimate(unit * grad_sq_norm, unit * trace_cov)
    assert there.resolved == here.resolved
    assert [there.value, there.low] == pytest.approx([here.value, here.low], rel=1e-6)
    assert here.scaled(tokens).low == pytest.approx(here.low * tokens)
    if here.resolved:
        assert here.low <= here.value <= here.high < math.inf
