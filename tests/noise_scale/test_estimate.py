"""The interval of the noise scale: how often it holds the truth, and what it says when it can't."""

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import lfilter
from scipy.stats import t as student_t

from scaling_jax.noise_scale import ema, estimate, windows
from scaling_jax.noise_scale.estimate import autocorrelation_time, fieller, long_run_covariance

STEPS, NOISE_SCALE = 400, 50.0


def series(rng, cv, rho, count):
    """(g2, tr) series (count, STEPS) whose mean |G|² has coefficient of variation `cv`; AR(1) of coefficient `rho`."""
    shocks = rng.standard_normal((2, count, STEPS)) * math.sqrt(1 - rho**2)
    shocks[..., 0] /= math.sqrt(1 - rho**2)
    a, b = lfilter([1], [1, -rho], shocks)
    spread = cv * math.sqrt(STEPS * (1 - rho) / (1 + rho))
    return 1 + spread * a, NOISE_SCALE * (1 + spread * (0.8 * b - 0.6 * a) / 2)


@pytest.mark.parametrize("rho", [0.0, pytest.param(0.5, marks=pytest.mark.slow), 0.8])
@pytest.mark.parametrize("cv", [0.05, pytest.param(0.2, marks=pytest.mark.slow), 0.4, 0.8])
def test_the_95_percent_interval_holds_the_truth_in_93_to_97_percent(cv, rho):
    """Unbounded intervals count as what they say: at least `low`."""
    estimates = [estimate(*s) for s in zip(*series(np.random.default_rng(0), cv, rho, 2000), strict=True)]
    coverage = np.mean([e.low <= NOISE_SCALE <= e.high for e in estimates])
    assert 0.93 <= coverage <= 0.97, f"{coverage:.3f}"
    resolved = np.mean([e.resolved for e in estimates])
    assert resolved == 1 if cv == 0.05 else resolved < 0.3 if cv == 0.8 else True
    effective = np.median([e.effective_steps for e in estimates])
    np.testing.assert_allclose(effective, STEPS * (1 - rho) / (1 + rho), rtol=0.25)


def test_without_autocorrelation_the_covariance_is_the_sample_covariance():
    """All cosine ordinates together are the sample covariance, with T − 1 degrees of freedom."""
    alternating = np.stack([np.tile([1.0, -1.0], 50), np.tile([-2.0, 2.0], 50)], axis=1) + np.arange(2)
    cov, dof = long_run_covariance(alternating)
    assert dof == 99
    np.testing.assert_allclose(cov, np.cov(alternating.T), rtol=1e-12)


def test_fieller_solves_its_inequality():
    """At both ends (S − θQ)² equals t²·Var(S − θQ), bounded or not; scipy's t gives the same exact t-test."""
    cov, t = np.array([[0.9, 0.2], [0.2, 0.04]]), student_t.ppf(0.975, 20)
    for denominator, bounded in ((1.0, True), (0.3, False)):
        low, high, got = fieller(8.0, denominator, cov, t)
        assert got == bounded
        assert bounded or high == math.inf
        for theta in (low, high) if bounded else (low,):
            direction = np.array([1.0, -theta])
            np.testing.assert_allclose((8 - theta * denominator) ** 2, t**2 * direction @ cov @ direction, rtol=1e-9)
        inside = 1.01 * low
        direction = np.array([1.0, -inside])
        assert (8 - inside * denominator) ** 2 < t**2 * direction @ cov @ direction


def test_an_unresolved_gradient_gives_a_lower_bound_only():
    rng = np.random.default_rng(0)
    e = estimate(rng.normal(0.0, 1.0, 100), rng.normal(10.0, 1.0, 100))
    assert not e.resolved
    assert math.isnan(e.value)
    assert e.high == math.inf
    assert e.low > 10
    assert str(e).startswith("unresolved: at least")


def test_nothing_is_claimed_when_both_moments_are_noise_or_the_gradient_is_negative():
    rng = np.random.default_rng(0)
    noise = rng.normal(0.0, 1.0, (2, 100))
    assert (estimate(*noise).low, estimate(*noise).high) == (0, math.inf)
    negative = estimate(noise[0] - 5, noise[1] + 5)
    assert (negative.resolved, negative.low, negative.high) == (False, 0, math.inf)


@given(
    st.lists(st.tuples(*[st.just(0.0) | st.floats(1e-20, 1e20) | st.floats(-1e20, -1e-20)] * 2), max_size=30),
    st.sampled_from([0.5, 0.95, 0.9999]),
)
def test_no_series_has_an_interval_below_zero_or_upside_down(steps, confidence):
    g2, tr = np.array(steps).reshape(-1, 2).T
    e = estimate(g2, tr, confidence)
    assert 0 <= e.low <= e.high
    assert e.resolved == (e.high < math.inf)


def test_a_gradient_of_exactly_zero_says_nothing():
    e = estimate(np.zeros(20), np.random.default_rng(0).normal(5, 0.1, 20))
    assert (e.resolved, e.low, e.high) == (False, 0, math.inf)


def test_a_trace_that_is_significantly_negative_is_unresolved():
    rng = np.random.default_rng(0)
    e = estimate(rng.normal(1, 0.1, 100), rng.normal(-5, 0.1, 100))
    assert (e.resolved, e.low, e.high) == (False, 0, math.inf)


def shocks(rng, tail, shape):
    """Draws of mean 0 and variance 1: normal, Student's t, or lognormal."""
    name, _, value = tail.partition(" ")
    if name == "normal":
        return rng.standard_normal(shape)
    if name == "t":
        return rng.standard_t(float(value), shape) * math.sqrt(1 - 2 / float(value))
    log_variance = float(value) ** 2
    x = np.exp(rng.normal(0, math.sqrt(log_variance), shape) - log_variance / 2)
    return (x - 1) / math.sqrt(math.expm1(log_variance))


def coverage_and_warnings(tail, rho, steps, count=800):
    """Share of 95 % intervals that hold the truth, and share that warn; tr(Σ) is an AR(1) with such shocks."""
    rng = np.random.default_rng(0)
    x = lfilter([1], [1, -rho], shocks(rng, tail, (count, steps + 100)))[:, 100:] * math.sqrt(1 - rho**2)
    tr, g2 = NOISE_SCALE * (1 + 0.5 * x), 1 + 0.02 * rng.standard_normal((count, steps))
    estimates = [estimate(*s) for s in zip(g2, tr, strict=True)]
    covered = np.mean([e.low <= NOISE_SCALE <= e.high for e in estimates])
    return covered, np.mean([e.warning is not None for e in estimates])


@pytest.mark.parametrize(
    ("tail", "rho", "steps"),
    [("normal", 0.8, 20), ("normal", 0.9, 30), ("lognormal 1.5", 0.0, 50), ("lognormal 2", 0.5, 200)],
)
def test_most_series_warn_where_the_interval_holds_the_truth_in_less_than_90_percent(tail, rho, steps):
    """A series that has missed the rare steps can't know of them, so not all warn."""
    covered, warned = coverage_and_warnings(tail, rho, steps)
    assert covered < 0.91, f"{covered:.3f}"
    assert warned > 0.75, f"{warned:.3f}"


@pytest.mark.parametrize(
    ("tail", "rho", "steps"),
    [("normal", 0.0, 20), ("normal", 0.8, 100), ("t 3", 0.0, 100), ("lognormal 1", 0.0, 500), ("t 5", 0.5, 100)],
)
def test_few_series_warn_where_the_interval_holds_the_truth(tail, rho, steps):
    """Symmetric tails do no harm, however heavy."""
    covered, warned = coverage_and_warnings(tail, rho, steps)
    assert covered > 0.92, f"{covered:.3f}"
    assert warned < 0.12, f"{warned:.3f}"


def test_a_warning_names_the_steps_and_the_reason_in_any_unit():
    g2, tr = np.ones(40), 50 + np.cumsum(np.random.default_rng(0).normal(0, 1, 40))
    e = estimate(g2, tr)
    assert "40 steps" in e.warning
    assert "autocorrelation" in e.warning
    assert e.scaled(64).warning == estimate(1e-9 * g2, tr).warning == e.warning
    spike = np.random.default_rng(0).normal(50, 1, 100)
    assert estimate(np.ones(100), spike).warning is None
    spike[70] = 500
    assert "100 steps dominate (skewness 9" in estimate(np.ones(100), spike).warning


def test_negative_moments_enter_the_average_unclamped():
    g2, tr = np.tile([3.0, -1.0], 50), np.tile([-2.0, 6.0], 50)
    assert estimate(g2, tr).value == 2
    assert (estimate(g2, tr).grad_sq_norm, estimate(g2, tr).trace_cov) == (1, 2)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_steps_are_flagged_and_left_out(bad):
    rng = np.random.default_rng(0)
    g2, tr = rng.normal(1, 0.1, 50), rng.normal(5, 0.1, 50)
    e = estimate(np.append(g2, [bad, 1.0]), np.append(tr, [5.0, bad]))
    assert (e.flagged_steps, e.steps) == (2, 50)
    assert e.value == estimate(g2, tr).value


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_too_few_steps_are_unresolved(steps):
    e = estimate(np.ones(steps), np.ones(steps))
    assert (e.resolved, e.low, e.high) == (False, 0, math.inf)


def test_zero_gradients_are_unresolved():
    assert not estimate(np.zeros(20), np.zeros(20)).resolved


def test_constant_series_have_a_point_for_an_interval():
    e = estimate(np.full(20, 2.0), np.full(20, 6.0))
    assert (e.value, e.low, e.high, e.resolved) == (3, 3, 3, True)


def test_tokens_are_examples_times_tokens_per_example():
    g2, tr = (s[0] for s in series(np.random.default_rng(0), 0.1, 0.0, 1))
    e, tokens = estimate(g2, tr), estimate(g2, 64 * tr)
    np.testing.assert_allclose([e.scaled(64).value, e.scaled(64).low], [tokens.value, tokens.low], rtol=1e-9)


@pytest.mark.parametrize(
    ("g2", "tr", "confidence", "message"),
    [
        (np.ones(3), np.ones(4), 0.95, r"\(3,\) and \(4,\)"),
        (np.ones((3, 2)), np.ones((3, 2)), 0.95, "common length"),
        (np.ones(3), np.ones(3), 95, "between 0 and 1"),
    ],
)
def test_bad_arguments_are_refused(g2, tr, confidence, message):
    with pytest.raises(ValueError, match=message):
        estimate(g2, tr, confidence)


def test_autocorrelation_time_of_an_ar1_is_known():
    x = lfilter([1], [1, -0.8], np.random.default_rng(0).standard_normal(200_000))
    np.testing.assert_allclose(autocorrelation_time(x), 9, rtol=0.1)


def test_windows_cover_every_step_once():
    g2, tr = (s[0] for s in series(np.random.default_rng(0), 0.1, 0.0, 1))
    parts = windows(g2, tr, 150)
    assert [(start, stop) for start, stop, _ in parts] == [(0, 150), (150, 400)]
    assert parts[1][2] == estimate(g2[150:], tr[150:])
    with pytest.raises(ValueError, match="windows of 401 steps"):
        windows(g2, tr, 401)


def test_the_moving_average_is_debiased_and_passes_over_bad_steps():
    weights = 0.5 ** (np.arange(5)[::-1] / 2)
    x = np.array([3.0, 1.0, -4.0, 1.0, 5.0])
    np.testing.assert_allclose(ema(x, half_life=2)[-1], weights @ x / weights.sum())
    assert ema(x, half_life=2)[0] == 3
    weights[2], x[2] = 0, np.nan
    np.testing.assert_allclose(ema(x, half_life=2)[-1], weights @ np.nan_to_num(x) / weights.sum())
    assert np.isnan(ema([np.nan, 1.0], 2)[0])


def test_importing_the_estimator_imports_no_more_of_scipy_than_jax_does():
    code = """import sys, jax
before = set(sys.modules)
import scaling_jax.noise_scale
assert not [name for name in sys.modules if name.startswith("scipy") and name not in before]"""
    subprocess.run([sys.executable, "-c", code], check=True)
