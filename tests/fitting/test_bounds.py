"""Runs that ended above their target: more steps than they had, not missing."""

import numpy as np
import pytest
from scipy import optimize, special

from scaling_jax.fitting import compare_forms, fit_joint, fit_scan, fit_tradeoff
from scaling_jax.fitting.tradeoff import deviance_with_bounds, fit_bounded, fit_tradeoffs
from tests.fitting.planted import Planted

BATCHES = 256.0 * 2.0 ** np.arange(7)


def capped_scans(b_crit, most_steps, count=600, noise=0.05):
    """Scans of 300·(1 + b_crit/B) steps that ended after `most_steps`, as rows of logs, mask and bound."""
    log_batch = np.broadcast_to(np.log(BATCHES), (count, BATCHES.size))
    errors = noise * np.random.default_rng(0).standard_normal(log_batch.shape)
    log_steps = np.log(300.0) + np.log1p(b_crit / BATCHES) + errors
    bound = log_steps > np.log(most_steps)
    return log_batch, np.where(bound, np.log(most_steps), log_steps), ~bound, bound


def test_bounds_take_most_of_the_bias_away_that_leaving_runs_out_has():
    """At the limit only lucky runs are measured: small batches look better than they are, and B_crit smaller."""
    log_batch, log_steps, mask, bound = capped_scans(2_000.0, 900.0, noise=0.1)
    assert 0.3 < bound.mean() < 0.4
    bounded, left_out = (
        np.log([fit.b_crit / 2_000 for fit in fits])
        for fits in (
            fit_tradeoffs(log_batch, log_steps, mask, 0.95, bound),
            fit_tradeoffs(log_batch, log_steps, mask, 0.95),
        )
    )
    assert left_out.mean() < -0.06
    assert abs(bounded.mean()) < 0.04
    assert bounded.std() < left_out.std()


def test_the_interval_covers_the_truth_with_bounds():
    fits = fit_tradeoffs(*(capped := capped_scans(6_000.0, 2_000.0))[:3], 0.95, capped[3])
    covered = np.mean([fit.b_crit_interval[0] <= 6_000 <= fit.b_crit_interval[1] for fit in fits])
    assert 0.92 < covered < 0.985


def test_the_fit_is_the_most_likely_one_at_its_noise():
    """Against a general optimiser of Tobit's likelihood, with noise too even for Huber's loss to hold any back."""
    batches = np.repeat(BATCHES, 2)
    steps = 300 * (1 + 6_000 / batches) * np.exp(np.tile([0.03, -0.03], 7))
    mask = batches > 512
    tried = np.where(mask, steps, 4_000.0)
    fit = fit_bounded(np.log(batches)[None], np.log(tried)[None], mask[None], ~mask[None])
    noise = float(fit.noise[0, 0])

    def unlikely(p):
        residual = np.log(tried) - np.logaddexp(p[0], p[1] - np.log(batches))
        return np.sum(np.where(mask, 0.5 * (residual / noise) ** 2, -special.log_ndtr(-residual / noise)))

    best = optimize.minimize(unlikely, [5.5, 14.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-12})
    found = [fit.hyperbolas.log_s_min[0], fit.hyperbolas.log_s_min[0] + fit.hyperbolas.log_b_crit[0]]
    np.testing.assert_allclose(found, best.x, atol=1e-4)
    # and how much worse another B_crit is, at its own best S_min
    other = float(fit.hyperbolas.log_b_crit[0]) - 0.05  # so near that no residual is held back there either
    at_other = optimize.minimize_scalar(lambda level: unlikely([level, level + other]), bounds=(3, 8), method="bounded")
    data = np.log(batches)[None], np.log(tried)[None], mask[None], ~mask[None]
    worse = deviance_with_bounds(np.array([other]), fit, *data)
    np.testing.assert_allclose(worse, 2 * (at_other.fun - best.fun), rtol=1e-3)
    alone = fit_tradeoff(batches[mask], steps[mask])
    assert abs(found[1] - np.log(alone.e_min)) > 1e-3  # so that ignoring the bounds would be seen


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


def test_the_joint_fit_with_bounds_is_the_most_likely_one_at_its_noise():
    """Against a general optimiser of Tobit's likelihood over all 2 + 5 parameters, without outliers to hold back."""
    columns = Planted(num_models=1, num_losses=5, noise=0.0).columns(np.random.default_rng(0))
    signs = np.tile([0.02, -0.02], 18)[:35]
    batch, loss = columns["batch_tokens"], columns["target_loss"]
    missed = ((batch == 256) & (loss < 2.5)) | ((batch == 512) & (loss < 2.1))
    tried = np.where(missed, 1.02 * columns["steps"], columns["steps"] * np.exp(signs))  # 2 % above the truth
    columns |= {"steps": np.where(missed, np.nan, tried), "steps_tried": np.where(missed, tried, np.nan)}
    losses = np.unique(columns["target_loss"])
    row = np.searchsorted(losses, columns["target_loss"])
    fit = fit_joint(**columns, resamples=20)
    joint = np.log([*fit.s_min[np.argsort(fit.losses)]])

    def residuals(p):
        log_b_crit = p[0] + p[1] * np.log(columns["target_loss"])
        return np.log(tried) - p[2:][row] - np.logaddexp(0, log_b_crit - np.log(columns["batch_tokens"]))

    found = np.concatenate([[np.log(fit.law.b_star), fit.law.exponent], joint])
    noise = np.sqrt(np.sum(residuals(found)[~missed] ** 2) / ((~missed).sum() - 7))

    def unlikely(p):
        r = residuals(p) / noise
        return np.sum(np.where(missed, -special.log_ndtr(-r), 0.5 * r**2))

    best = optimize.minimize(unlikely, found, method="BFGS", options={"gtol": 1e-9})
    assert missed.sum() >= 4
    np.testing.assert_allclose(found, best.x, atol=2e-3)
    assert unlikely(found) - best.fun < 1e-4
    alone = fit_joint(**(columns | {"steps_tried": None}), resamples=20).law
    assert abs(alone.exponent - fit.law.exponent) > 0.01  # so that ignoring the bounds would be seen


def test_bounds_enter_every_form_and_those_that_say_nothing_change_none():
    columns = capped_columns(0)
    bounded, unknown = (
        {form.form: form for form in compare_forms(**(columns | {"steps_tried": tried}))}
        for tried in (columns["steps_tried"], None)
    )
    idle = {
        form.form: form
        for form in compare_forms(**(columns | {"steps_tried": np.where(np.isnan(columns["steps"]), 1.0, np.nan)}))
    }
    for name, form in unknown.items():
        assert abs(bounded[name].exponent / form.exponent - 1) > 5e-4
        np.testing.assert_allclose(idle[name].exponent, form.exponent, rtol=3e-4)
        np.testing.assert_allclose(idle[name].held_out_error, form.held_out_error, rtol=1e-3)


@pytest.mark.long
def test_the_laws_interval_covers_the_truth_with_bounds():
    fits = [fit_scan(**capped_columns(seed), resamples=100, seed=seed) for seed in range(24)]
    covered = [fit.law.exponent_interval[0] <= -4.8 <= fit.law.exponent_interval[1] for fit in fits]
    assert np.mean(covered) >= 0.8  # three standard errors of 24 scans below 95 %


@pytest.mark.parametrize(
    ("steps", "tried", "message"),
    [
        ([10, 5, np.nan, 3], [np.nan, np.nan, -1, np.nan], r"steps_tried\[2\] is -1"),
        ([10, 5, np.nan, np.nan], [np.nan, np.nan, 5, 5], "2 distinct batch sizes"),
        ([10, 5, 4, 3], [1], r"\(4,\) and .*\(1,\)"),
    ],
)
def test_bad_bounds_are_refused(steps, tried, message):
    with pytest.raises(ValueError, match=message):
        fit_tradeoff([256, 512, 1024, 2048], steps, steps_tried=tried)
