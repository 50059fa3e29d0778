"""The local trade-off: exact where the truth is known, blind to what comes before, and intervals that cover."""

import numpy as np
import pytest

from scaling_jax.fitting import fit_scan
from scaling_jax.fitting.local import GROWTH, local_table
from scaling_jax.fitting.scan_table import scan_table
from tests.fitting.planted import Planted

# In windows of GROWTH times the steps, where S_min ∝ L^-6 and B_crit ∝ L^-4.8, so E_min ∝ L^-10.8
OVER_CUMULATIVE = np.sinh(10.8 * np.log(GROWTH) / 12) / np.sinh(6 * np.log(GROWTH) / 12)


def noiseless(num_losses=60, **options):
    return Planted(noise=0.0, num_losses=num_losses, **options).columns(np.random.default_rng(0))


def test_the_local_b_crit_is_the_slope_of_tokens_over_steps():
    """dE_min/dS_min = B_crit·(1 + 4.8/6) for those powers of the loss, but for the width of the windows."""
    fit = fit_scan(**noiseless(), resamples=20)
    truth = Planted().b_crit(np.array([point.loss for point in fit.local.points]))
    found = np.array([point.b_crit for point in fit.local.points])
    np.testing.assert_allclose(found / truth, OVER_CUMULATIVE, rtol=0.03)
    np.testing.assert_allclose(OVER_CUMULATIVE, 1.8, rtol=0.03)
    np.testing.assert_allclose(fit.local.law.exponent, -4.8, atol=0.1)


def test_steps_before_the_first_loss_are_no_part_of_it():
    """Whatever each batch size loses at the start cancels, but bends the trade-off from the start."""
    columns = noiseless()
    lost = 40 * (columns["batch_tokens"] / 1_024) ** -0.3
    fit, late = (fit_scan(**columns, resamples=20), fit_scan(**columns | {"steps": columns["steps"] + lost}))
    assert late.shape_p < 0.05
    for point in late.local.points:
        b_crit = fit.local_b_crit(point.model, point.loss)[0]
        np.testing.assert_allclose(point.b_crit, b_crit, rtol=0.05)  # windows differ a little
    assert abs(late.local.law.exponent + 4.8) < 0.1


def test_a_window_ends_where_steps_have_grown_enough():
    columns = noiseless(num_losses=14)
    names = ("model", "batch_tokens", "target_loss", "steps", "run")
    table = scan_table(*(columns[name] for name in names))
    windows = local_table(table)
    assert set(windows.models) == set(table.models)
    assert windows.mask.all()
    grown = np.exp(table.log_steps[1:] - table.log_steps[:-1])[:13]  # of one model, from each loss to the next
    assert np.median(grown, axis=1).max() < GROWTH  # so windows are wider than that
    losses = table.losses[:14]
    for loss in windows.losses[: len(windows.losses) // 2]:
        assert np.isclose(loss, np.sqrt(np.outer(losses, losses))).any()


def test_runs_that_did_not_reach_the_lower_loss_are_left_out():
    columns = noiseless(num_losses=14)
    ended = (columns["batch_tokens"] == 256) & (columns["target_loss"] < 2.0)
    columns["steps"] = np.where(ended, np.nan, columns["steps"])
    names = ("model", "batch_tokens", "target_loss", "steps", "run")
    windows = local_table(scan_table(*(columns[name] for name in names)))
    assert set(windows.num_batches) == {6, 7}


def test_one_loss_has_no_window():
    columns = noiseless(num_losses=1)
    fit = fit_scan(**columns)
    assert fit.local is None
    assert np.isnan(fit.points[0].local_b_crit)
    assert np.isnan(fit.local_b_crit("model0", 2.0)[0])


def test_between_windows_it_is_interpolated_and_outside_unknown():
    fit = fit_scan(**noiseless(num_losses=14), resamples=20)
    own = [point for point in fit.local.points if point.model == "model0"]
    middle = np.sqrt(own[2].loss * own[3].loss)
    value, low, high = fit.local_b_crit("model0", middle)
    np.testing.assert_allclose(value, np.sqrt(own[2].b_crit * own[3].b_crit))
    assert low <= value <= high
    assert np.isnan(fit.local_b_crit("model0", own[-1].loss * 0.99)[0])
    np.testing.assert_allclose(fit.local_b_crit("model0", own[-1].loss)[0], own[-1].b_crit)
    by_point = {point.loss: point.local_b_crit for point in fit.points if point.model == "model0"}
    inside = [loss for loss, b_crit in by_point.items() if np.isfinite(b_crit)]
    assert max(inside) <= own[0].loss
    assert min(inside) >= own[-1].loss
    assert len(inside) > 5


@pytest.mark.long
@pytest.mark.parametrize("kind", ["mixed", "constant", "independent"])
def test_its_intervals_cover(kind):
    """Of 60 scans, a 95 % interval covers 52 or fewer once in 200 times; points of one scan share their runs."""
    planted, exponents, points = Planted(kind=kind), [], []
    for seed in range(60):
        local = fit_scan(**planted.columns(np.random.default_rng(seed)), resamples=200).local
        exponents.append(local.law.exponent_interval[0] <= -4.8 <= local.law.exponent_interval[1])
        for point in local.points:
            low, high = point.b_crit_interval
            points.append(low <= OVER_CUMULATIVE * planted.b_crit(point.loss) <= high)
    assert sum(exponents) > 52
    assert 0.91 < np.mean(points) < 0.985
