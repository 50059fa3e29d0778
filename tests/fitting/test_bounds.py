"""Runs that ended above their target: more steps than they had, not missing."""

import numpy as np
import pytest
from scipy import optimize, special

from scaling_jax.fitting import fit_scan, fit_tradeoff
from scaling_jax.fitting.bounds import fit_bounded
from scaling_jax.fitting.tradeoff import fit_tradeoffs
from tests.fitting.planted import Planted

BATCHES = 256.0 * 2.0 ** np.arange(7)


def capped_scans(b_crit, most_steps, count=600, noise=0.05):
    """Scans of 300·(1 + b_crit/B) steps that ended after `most_steps`, as rows of logs, mask and bound."""
    log_batch = np.broadcast_to(np.log(BATCHES), (count, BATCHES.size))
    errors = noise * np.random.default_rng(0).standard_normal(log_batch.shape)
    log_steps = np.log(300.0) + np.log1p(b_crit / BATCHES) + errors
    bound = log_steps > np.log(most_steps)
    return log_batch, np.where(bound, np.log(most_steps), log_steps), ~bound, bound


def test_bounds_take_the_bias_away_that_leaving_runs_out_has():
    """Near the limit only lucky runs are measured: small batches look better than they are."""
    log_batch, log_steps, mask, bound = capped_scans(20_000.0, 5_500.0)
    assert 0.3 < bound.mean() < 0.5
    errors = {
        name: np.log([fit.b_crit / 20_000 for fit in fits])
        for name, fits in (
            ("bounds", fit_tradeoffs(log_batch, log_steps, mask, 0.95, bound)),
            ("left out", fit_tradeoffs(log_batch, log_steps, mask, 0.95)),
        )
    }
    standard_error = errors["bounds"].std() / np.sqrt(len(bound))
    assert abs(errors["bounds"].mean()) < 3 * standard_error
    assert errors["left out"].mean() < -3 * standard_error
    assert errors["bounds"].std() < errors["left out"].std()


def test_the_interval_covers_the_truth_with_bounds():
    fits = fit_tradeoffs(*(capped := capped_scans(6_000.0, 2_000.0))[:3], 0.95, capped[3])
    covered = np.mean([fit.b_crit_interval[0] <= 6_000 <= fit.b_crit_interval[1] for fit in fits])
    assert 0.92 < covered < 0.985


def test_the_fit_is_the_most_likely_one_at_its_noise():
    """Against a general optimiser of Tobit's likelihood, with no outlier for Huber's loss to hold back."""
    steps = 300 * (1 + 6_000 / BATCHES) * np.exp(0.03 * np.array([0, 0, 1, -1, 1, -1, 0.5]))
    mask = np.array([False, False, True, True, True, True, True])
    tried = np.where(mask, steps, [9_000.0, 4_200.0, 0, 0, 0, 0, 0])
    fit = fit_bounded(np.log(BATCHES)[None], np.log(tried)[None], mask[None], ~mask[None])
    noise = float(fit.noise[0, 0])

    def unlikely(p):
        residual = np.log(tried) - np.logaddexp(p[0], p[1] - np.log(BATCHES))
        return np.sum(np.where(mask, 0.5 * (residual / noise) ** 2, -special.log_ndtr(-residual / noise)))

    best = optimize.minimize(unlikely, [5.5, 14.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    found = [fit.hyperbolas.log_s_min[0], fit.hyperbolas.log_s_min[0] + fit.hyperbolas.log_b_crit[0]]
    np.testing.assert_allclose(found, best.x, atol=1e-4)


def test_a_bound_that_says_nothing_changes_nothing():
    steps = 300 * (1 + 2_000 / BATCHES) * np.exp(0.03 * np.array([1, -1, 0.5, 0, -0.5, 1, -1]))
    alone = fit_tradeoff(BATCHES[1:], steps[1:])
    bounded = fit_tradeoff(
        BATCHES, np.where(BATCHES > 256, steps, np.nan), steps_tried=np.where(BATCHES > 256, np.nan, 100.0)
    )
    np.testing.assert_allclose(bounded.b_crit, alone.b_crit, rtol=1e-5)
    np.testing.assert_allclose(bounded.b_crit_interval, alone.b_crit_interval, rtol=2e-3)
    assert bounded.bound_steps.tolist() == [pytest.approx(100)]


def test_a_bound_above_the_curve_moves_it():
    """The smallest batch ran for twice the steps that the others predict, and still wasn't there."""
    steps = 300 * (1 + 2_000 / BATCHES) * np.exp(0.05 * np.array([0, -1, 0.5, 0, -0.5, 1, -1]))
    measured = np.where(BATCHES > 256, steps, np.nan)
    tried = np.where(BATCHES > 256, np.nan, 2 * steps[0])
    assert fit_tradeoff(BATCHES, measured, steps_tried=tried).b_crit > 1.03 * fit_tradeoff(BATCHES, measured).b_crit


def capped_columns(seed, kind="mixed"):
    """A planted scan whose runs end after 4,000 steps, so that small batches miss the lower losses."""
    columns = Planted(kind=kind).columns(np.random.default_rng(seed))
    missed = columns["steps"] > 4_000
    steps = np.where(missed, np.nan, columns["steps"])
    return columns | {"steps": steps, "steps_tried": np.where(missed, 4_000.0, np.nan)}


def test_a_scan_counts_its_bounds_and_keeps_its_law():
    columns = capped_columns(0)
    fit = fit_scan(**columns, resamples=300)
    assert sum(point.bounds for point in fit.points) == sum(point.not_reached for point in fit.points) > 20
    assert fit.law.exponent_interval[0] < -4.8 < fit.law.exponent_interval[1]
    unknown = fit_scan(**(columns | {"steps_tried": None}), resamples=300)
    assert all(point.bounds == 0 for point in unknown.points)
    assert unknown.law.exponent != fit.law.exponent


def test_the_laws_interval_covers_the_truth_with_bounds():
    fits = [fit_scan(**capped_columns(seed), resamples=150, seed=seed) for seed in range(40)]
    covered = [fit.law.exponent_interval[0] <= -4.8 <= fit.law.exponent_interval[1] for fit in fits]
    assert np.mean(covered) >= 0.85  # three standard errors of 40 scans below 95 %


@pytest.mark.parametrize(
    ("steps", "tried", "message"),
    [
        ([10, 5, np.nan, 3], [np.nan, np.nan, -1, np.nan], r"steps_tried\[2\] is -1"),
        ([10, 5, np.nan, np.nan], [np.nan, np.nan, 5, 5], "2 distinct batch sizes that got there"),
        ([10, 5, 4, 3], [1], "one length"),
    ],
)
def test_bad_bounds_are_refused(steps, tried, message):
    with pytest.raises(ValueError, match=message):
        fit_tradeoff([256, 512, 1024, 2048], steps, steps_tried=tried)
