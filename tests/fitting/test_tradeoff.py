import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from scipy import optimize

from scaling_jax.fitting import fit_tradeoff
from scaling_jax.fitting.tradeoff import fit_tradeoffs

BATCHES = 256.0 * 2.0 ** np.arange(7)


def _long(*values):
    """More values of a parameter, for which CI has no time."""
    return [pytest.param(value, marks=pytest.mark.long) for value in values]


def noisy_scans(b_crit, count=2_000, noise=0.05, seed=0):
    """`count` independent scans of 300·(1 + b_crit/B) steps, as rows of logs."""
    log_batch = np.broadcast_to(np.log(BATCHES), (count, BATCHES.size))
    errors = noise * np.random.default_rng(seed).standard_normal(log_batch.shape)
    log_steps = np.log(300.0) + np.log1p(b_crit / BATCHES) + errors
    return log_batch, log_steps, np.ones(log_batch.shape, bool)


@hypothesis.given(st.floats(1.0, 1e5), st.floats(-1.0, 7.0), st.floats(0.01, 1e4))
@hypothesis.settings(deadline=None, max_examples=30)
def test_noiseless_scans_are_recovered_in_any_unit(s_min, log_b_crit, unit):
    b_crit = 256 * np.exp(log_b_crit)
    fit = fit_tradeoff(BATCHES * unit, s_min * (1 + b_crit / BATCHES))
    np.testing.assert_allclose([fit.s_min, fit.b_crit], [s_min, b_crit * unit], rtol=1e-6)
    np.testing.assert_allclose(fit.e_min, fit.s_min * fit.b_crit, rtol=1e-12)
    low, high = fit.b_crit_interval
    assert low <= fit.b_crit <= high


def test_fitted_points_lie_on_the_hyperbola_of_the_paper():
    fit = fit_tradeoff(BATCHES, [3823, 2088, 1304, 845, 644, 601, 517])
    steps, tokens = fit.steps_at(BATCHES), fit.tokens_at(BATCHES)
    np.testing.assert_allclose(tokens, BATCHES * steps, rtol=1e-12)
    np.testing.assert_allclose((steps / fit.s_min - 1) * (tokens / fit.e_min - 1), 1.0, rtol=1e-12)
    np.testing.assert_allclose(fit.residuals, np.log(fit.steps / steps), atol=1e-12)


def test_a_real_scan_comes_out_as_in_the_trial():
    """Steps to 2.21 nats/byte from the design's trial: S_min about 460, E_min about 8.4e5, B_crit about 1.8e3."""
    fit = fit_tradeoff(BATCHES, [3823, 2088, 1304, 845, 644, 601, 517])
    np.testing.assert_allclose([fit.s_min, fit.e_min, fit.b_crit], [460, 8.4e5, 1.8e3], rtol=0.03)
    assert not fit.one_sided


def test_without_outliers_the_fit_is_that_of_a_general_optimiser():
    """Same steps as scipy's two-parameter least squares where no residual is large enough to be held back."""
    steps = 300 * (1 + 2_000 / BATCHES) * np.exp(0.03 * np.array([1, -1, 1, -1, 1, -1, 1]))

    def residuals(p):
        return np.log(steps) - np.logaddexp(p[0], p[1] - np.log(BATCHES))

    expected = np.exp(optimize.least_squares(residuals, [5.0, 12.0], xtol=1e-14, ftol=1e-14, gtol=1e-14).x)
    fit = fit_tradeoff(BATCHES, steps)
    np.testing.assert_allclose([fit.s_min, fit.e_min], expected, rtol=1e-5)


def test_one_wrong_run_does_not_carry_the_fit_away():
    steps = 300 * (1 + 2_000 / BATCHES) * np.exp(0.02 * np.array([1, -1, 0.5, 0, -0.5, 1, -1]))
    steps[3] *= 3
    fit = fit_tradeoff(BATCHES, steps)
    np.testing.assert_allclose(fit.b_crit, 2_000, rtol=0.15)
    np.testing.assert_allclose(fit.residuals[3], np.log(3), rtol=0.15)


def test_order_and_company_do_not_matter():
    """A scan fitted among others, or in another order, gives what it gives alone."""
    log_batch, log_steps, mask = noisy_scans(2_000, count=5)
    mask = mask.copy()
    mask[2, 4] = False
    together = fit_tradeoffs(log_batch, log_steps, mask, 0.95)
    order = np.random.default_rng(1).permutation(7)
    for row, fit in enumerate(together):
        kept = order[mask[row, order]]
        alone = fit_tradeoff(np.exp(log_batch[row, kept]), np.exp(log_steps[row, kept]))
        np.testing.assert_allclose(alone.b_crit, fit.b_crit, rtol=1e-9)
        np.testing.assert_allclose(alone.b_crit_interval, fit.b_crit_interval, rtol=1e-6)


@pytest.mark.parametrize("b_crit", [2_000.0, *_long(150.0, 600.0, 12_000.0, 60_000.0)])
def test_the_interval_covers_the_truth(b_crit):
    fits = fit_tradeoffs(*noisy_scans(b_crit), 0.95)
    covered = np.mean([fit.b_crit_interval[0] <= b_crit <= fit.b_crit_interval[1] for fit in fits])
    assert 0.925 < covered < 0.975


@pytest.mark.parametrize("b_crit", [200.0, 20_000.0, *_long(1.0, 100.0, 256.0, 16_384.0, 1e5, 1e8)])
def test_scans_on_one_side_of_b_crit_are_flagged(b_crit):
    """At least 99 %, also where B_crit lies just outside of the batches."""
    assert np.mean([fit.one_sided for fit in fit_tradeoffs(*noisy_scans(b_crit), 0.95)]) >= 0.99


@pytest.mark.parametrize("b_crit", [700.0, *_long(2_000.0, 6_000.0)])
def test_scans_on_both_sides_of_b_crit_are_not_flagged(b_crit):
    assert np.mean([fit.one_sided for fit in fit_tradeoffs(*noisy_scans(b_crit), 0.95)]) <= 0.01


def test_an_interval_is_unbounded_where_the_data_say_nothing():
    wiggle = np.exp(0.05 * np.array([1, -1, 0.5, -0.5, 1, -1, 0]))
    above = fit_tradeoff(BATCHES, 300 * wiggle)
    below = fit_tradeoff(BATCHES, 1e8 / BATCHES * wiggle)
    assert above.one_sided
    assert below.one_sided
    assert above.b_crit_interval[0] == 0
    assert above.b_crit_interval[1] < 256
    assert below.b_crit_interval[0] > 16_384
    assert below.b_crit_interval[1] == np.inf


def test_the_interval_of_the_steps_covers_the_truth_at_every_batch():
    b_crit, batches = 2_000.0, np.array([128.0, 700.0, 2_000.0, 6_000.0, 30_000.0])
    ends = np.array([fit.steps_interval(batches) for fit in fit_tradeoffs(*noisy_scans(b_crit, count=1_500), 0.95)])
    truth = 300.0 * (1 + b_crit / batches)
    covered = ((ends[:, 0] <= truth) & (truth <= ends[:, 1])).mean(0)
    assert (abs(covered - 0.95) < 0.025).all()


def test_cbs20_is_where_tokens_are_a_fifth_over_linear_scaling():
    fit = fit_tradeoff(BATCHES, 300 * (1 + 2_000 / BATCHES))
    np.testing.assert_allclose(fit.tokens_at(fit.cbs20), 1.2 * fit.e_min)
    np.testing.assert_allclose(fit.tokens_at(fit.batch_at_overhead(1.0)), fit.tokens_at(fit.b_crit))
    np.testing.assert_allclose(fit.tokens_at(fit.batch_at_overhead(0.5, 700)), 1.5 * fit.tokens_at(700))


@pytest.mark.parametrize(
    ("batch_tokens", "steps", "message"),
    [
        ([256, 512], [10, 5], "2 distinct batch sizes"),
        ([256, 512, 512, 256], [10, 5, 6, 9], "2 distinct batch sizes"),
        ([256, 512, 1024], [10, 5], r"\(3,\), .*\(2,\)"),
        ([256, 512, -1024], [10, 5, 3], r"batch_tokens\[2\] is -1024"),
        ([256, 512, 1024], [10, np.nan, 3], "2 distinct batch sizes"),
        ([256, np.nan, 1024], [10, 6, 3], r"batch_tokens\[1\] is nan"),
        ([256, 512, 1024], [10, 0, 3], r"steps\[1\] is 0"),
    ],
)
def test_bad_scans_are_refused(batch_tokens, steps, message):
    with pytest.raises(ValueError, match=message):
        fit_tradeoff(batch_tokens, steps)
