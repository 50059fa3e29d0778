import numpy as np
import pytest
from scipy import optimize

from scaling_jax.fitting import fit_joint, fit_scan
from tests.fitting.planted import Planted


def draw(seed=0, **variant):
    planted = Planted(**variant)
    return planted, planted.columns(np.random.default_rng(seed))


def test_a_scan_without_noise_gives_back_its_law_and_every_s_min():
    planted, columns = draw(noise=0.0)
    fit = fit_joint(**columns, resamples=20)
    np.testing.assert_allclose(fit.law.exponent, planted.exponent, rtol=1e-6)
    np.testing.assert_allclose(fit.law(2.0), planted.b_crit(2.0), rtol=1e-6)
    slower = np.where(np.array(fit.models) == "model0", 1.0, 1.3)
    np.testing.assert_allclose(fit.s_min, 300 * (2.9 / fit.losses) ** 6 / slower, rtol=1e-6)
    assert fit.residual_scale < 1e-6


def test_without_outliers_the_fit_is_that_of_a_general_optimiser():
    """scipy's least squares over all 2 + 10 parameters, with noise too even for Huber's loss to hold any back."""
    planted = Planted(num_losses=5, noise=0.0)
    columns = planted.columns(np.random.default_rng(0))
    signs = np.random.default_rng(1).choice([-0.03, 0.03], len(columns["steps"]))
    columns["steps"] = columns["steps"] * np.exp(signs)
    rows = [(m, t) for m in ("model0", "model1") for t in planted.losses]
    of_row = np.array([rows.index((m, t)) for m, t in zip(columns["model"], columns["target_loss"], strict=True)])

    def residuals(p):
        log_b_crit = p[0] + p[1] * np.log(columns["target_loss"])
        return np.log(columns["steps"]) - p[2:][of_row] - np.logaddexp(0, log_b_crit - np.log(columns["batch_tokens"]))

    start = np.concatenate([[11.0, -4.0], np.full(10, 6.0)])
    best = optimize.least_squares(residuals, start, xtol=1e-14, ftol=1e-14, gtol=1e-14)
    fit = fit_joint(**columns, resamples=20)
    np.testing.assert_allclose([np.log(fit.law.b_star), fit.law.exponent], best.x[:2], rtol=1e-4)
    np.testing.assert_allclose(np.log(fit.s_min), best.x[2:], rtol=1e-5)


def test_points_that_the_data_do_not_bound_sharpen_the_joint_law():
    """Model 1 was scanned with small batches only: its B_crit alone is unbounded, its slope is not."""
    _, columns = draw(kind="independent")
    scanned = (columns["model"] == "model0") | (columns["batch_tokens"] <= 1_024)
    fit = fit_joint(**{name: column[scanned] for name, column in columns.items()}, resamples=300)
    alone = columns["model"] == "model0"
    without = fit_joint(**{name: column[alone] for name, column in columns.items()}, resamples=300)
    assert np.diff(fit.law.exponent_interval) < np.diff(without.law.exponent_interval)
    assert fit.law.exponent_interval[0] < -4.8 < fit.law.exponent_interval[1]


def test_one_wrong_run_does_not_carry_the_law_away():
    planted, columns = draw(noise=0.01)
    wrong = (columns["model"] == "model1") & (columns["batch_tokens"] == 16_384)
    columns["steps"] = np.where(wrong, 3 * columns["steps"], columns["steps"])
    assert fit_joint(**columns, resamples=20).law(2.2) == pytest.approx(planted.b_crit(2.2), rel=0.12)


def test_the_interval_knows_that_neighbouring_targets_share_runs():
    """Errors that wander along a run; intervals from independent ones cover three scans in four at most."""
    covered = []
    for seed in range(60):
        law = fit_joint(**draw(seed, kind="wandering")[1], resamples=99, seed=seed).law
        covered.append(law.exponent_interval[0] <= -4.8 <= law.exponent_interval[1])
    assert np.mean(covered) >= 0.86  # three standard errors of 60 scans below 95 %


def test_a_scan_on_one_side_has_no_joint_law():
    fit = fit_joint(**draw(b_crit_middle=1e8)[1], resamples=10)
    assert fit.law is None
    with pytest.raises(ValueError, match="no band without a law"):
        fit.band(2.0)


def test_two_ways_to_one_law_agree_within_a_fraction_of_their_intervals():
    _, columns = draw(seed=3)
    joint, two_stage = fit_joint(**columns, resamples=300), fit_scan(**columns, resamples=300)
    width = np.diff(two_stage.law.exponent_interval)[0]
    assert abs(joint.law.exponent - two_stage.law.exponent) < 0.25 * width
    np.testing.assert_allclose(np.diff(joint.law.exponent_interval)[0], width, rtol=0.25)
    np.testing.assert_allclose(joint.band(2.0), two_stage.band(2.0), rtol=0.05)


def test_the_same_seed_gives_the_same_bits():
    _, columns = draw()
    assert fit_joint(**columns, resamples=100).law == fit_joint(**columns, resamples=100).law
