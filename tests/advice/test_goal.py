import dataclasses

import numpy as np
import pytest

from scaling_jax.advice import (
    choices,
    fastest,
    fewest_steps,
    goal,
    largest_within,
    least_compute,
    losses_of,
    models_of,
    powers_around,
)
from scaling_jax.advice.choices import Hardware
from scaling_jax.advice.measured import steps_interval
from scaling_jax.fitting import CriticalBatch, fit_tradeoff
from scaling_jax.fitting.tradeoff import fit_tradeoffs
from scaling_jax.io import UserError
from tests.advice.scan import b_crit, fitted, fitted_free, local_b_crit, s_min

BATCHES = 256.0 * 2.0 ** np.arange(7)


def test_a_goal_at_a_target_is_its_trade_off_and_between_targets_lies_between():
    fit = fitted()
    for loss in (fit.points[-3].loss, 2.0):
        found = goal(fit, loss)
        assert found.model == "model1"
        assert found.s_min == pytest.approx(s_min(loss), rel=1e-4)
        assert found.b_crit == pytest.approx(b_crit(loss), rel=1e-4)
        assert found.e_min == pytest.approx(found.s_min * found.b_crit)
        assert found.law_b_crit == pytest.approx(b_crit(loss), rel=1e-4)
        assert not found.extrapolated


def test_the_model_that_got_lowest_comes_first_and_others_are_named():
    fit = fitted()
    assert models_of(fit) == ("model1", "model0")
    assert losses_of(fit, "model0")[0] > 2.0
    with pytest.raises(UserError, match=r"'model2' .*choose from model1, model0"):
        goal(fit, 2.2, "model2")


@pytest.mark.parametrize("loss", [1.5, 3.5])
def test_losses_that_were_not_measured_are_refused_unless_asked_for(loss):
    with pytest.raises(UserError, match=rf"loss {loss:g} .*1\.75 to 2\.9, .*model1"):
        goal(fitted(), loss)
    far = goal(fitted(), loss, extrapolate=True)
    assert far.extrapolated
    assert far.b_crit == pytest.approx(b_crit(loss), rel=1e-3)
    assert far.s_min == pytest.approx(s_min(loss), rel=1e-3)  # a power law goes on straight
    low, high = far.steps_interval(1_000.0)
    assert low == pytest.approx(far.steps(1_000.0), rel=1e-2)  # parts of the data agree without noise
    assert high == pytest.approx(far.steps(1_000.0), rel=1e-2)


def test_far_from_what_was_measured_steps_are_unknown():
    """More than half of the measured range of log loss beyond it."""
    for loss in (1.75 * (1.75 / 2.9) ** 0.52, 2.9 * (2.9 / 1.75) ** 0.52):
        assert goal(fitted(), loss, extrapolate=True).steps_interval(1_000.0) == (0, np.inf)
    assert goal(fitted(), 1.75 * (1.75 / 2.9) ** 0.48, extrapolate=True).steps_interval(1_000.0)[1] < np.inf


@pytest.mark.parametrize("fit", [fitted(0.03), fitted_free(0.6, 0.03)], ids=["hyperbolas", "a = 0.6"])
def test_brackets_beyond_the_measured_losses_hold_the_truth_and_what_parts_of_the_data_say(fit):
    to = goal(fit, 1.6, "model1", extrapolate=True)
    law, middle = fit.law, np.sqrt(np.prod(fit.law.loss_range))
    parts = [refit.b_crit * (1.6 / middle) ** refit.exponent for refit in law.systematic]
    band = [float(end) for end in fit.band(1.6)]
    assert len(parts) > 2
    assert to.b_crit_interval == (min(parts + band), max(parts + band))
    assert to.b_crit == pytest.approx(float(law(1.6)))
    a = 0.6 if not to.hyperbolas else 1.0
    batches = np.array([256.0, 2_048.0, 16_384.0])
    low, high = to.steps_interval(batches)
    truth = s_min(1.6) * (1 + (b_crit(1.6) / batches) ** a)
    assert ((low < truth) & (truth < high)).all()
    assert ((low < to.steps(batches)) & (to.steps(batches) < high)).all()


def test_without_a_law_nothing_is_extrapolated():
    lawless = dataclasses.replace(fitted(), law=None, errors=None)
    assert goal(lawless, 2.0).law_b_crit is None
    with pytest.raises(UserError, match="there is no law"):
        goal(lawless, 1.5, extrapolate=True)


@pytest.mark.parametrize(("factor", "missing"), [(1e-3, "smaller"), (1e3, "larger")])
def test_one_sided_points_are_no_ground_for_advice(factor, missing):
    def one_sided(p):
        return dataclasses.replace(p, tradeoff=dataclasses.replace(p.tradeoff, one_sided=True, b_crit=factor * 2_000))

    fit = fitted()
    for others in ((), ("model1",)):
        points = tuple(p if p.model in others else one_sided(p) for p in fit.points)
        with pytest.raises(UserError) as refused:
            goal(dataclasses.replace(fit, points=points), 2.0, "model0" if others else None)
        message = str(refused.value)
        assert message.startswith("model model0: " if others else "model model0, model1: ")
        assert "batches of 256 to 16,384 tokens" in message
        assert f"add {missing} batch sizes" in message
        assert message.endswith(", or choose from model1") == bool(others)


def test_without_a_trade_off_more_batches_are_asked_for():
    with pytest.raises(UserError, match="no loss has steps at three batch sizes"):
        goal(dataclasses.replace(fitted(), points=(), law=None, errors=None), 2.0)


def test_choices_are_the_hyperbola_and_excess_is_what_it_says():
    to = goal(fitted(), 2.0)
    for row in choices(to, powers_around(to)):
        assert row.steps == pytest.approx(s_min(2.0) * (1 + b_crit(2.0) / row.batch_tokens), rel=1e-3)
        assert row.tokens == pytest.approx(row.steps * row.batch_tokens)
        assert row.excess_compute == pytest.approx(row.tokens / to.e_min - 1)
        assert row.excess_steps == pytest.approx(row.steps / to.s_min - 1)
        assert row.seconds is None
        assert row.tested == (256 <= row.batch_tokens <= 16_384)


def test_with_a_free_shape_steps_and_b_crit_are_those_of_the_shape():
    fit = fitted_free(0.6)
    to = goal(fit, 2.0, "model1")
    assert not to.hyperbolas
    assert np.isnan(to.e_min)
    assert to.b_crit == pytest.approx(b_crit(2.0), rel=0.1)
    batches = np.array([256.0, 2_048.0, 16_384.0])
    np.testing.assert_allclose(to.steps(batches), s_min(2.0) * (1 + (b_crit(2.0) / batches) ** 0.6), rtol=0.02)
    assert float(to.steps(to.b_crit)) == pytest.approx(2 * to.s_min, rel=1e-3)
    for row in choices(to, (256, 2_048), reference_batch_tokens=512):
        assert row.excess_compute == pytest.approx(row.tokens / float(to.tokens(512)) - 1)
    with pytest.raises(UserError, match="at any batch size of the runs"):
        largest_within(to, 0.99 * float(to.tokens(256)))
    batch = largest_within(to, 1.5 * float(to.tokens(256)))
    assert float(to.tokens(batch)) == pytest.approx(1.5 * float(to.tokens(256)))


def test_the_local_b_crit_at_the_goal_is_that_of_the_next_stretch():
    assert goal(fitted(), 2.2).local_b_crit == pytest.approx(local_b_crit(2.2), rel=0.05)
    assert np.isnan(goal(fitted(), 1.75).local_b_crit)  # the last window ends there


def test_cbs20_counts_from_a_reference_batch_or_from_the_limit():
    to = goal(fitted(), 2.0)
    assert to.cbs20() == pytest.approx(to.b_crit / 5)
    assert to.cbs20(700) == pytest.approx(to.b_crit / 5 + 1.2 * 700, rel=1e-3)
    free = goal(fitted_free(0.6), 2.0)
    assert np.isnan(free.cbs20())
    assert float(free.tokens(free.cbs20(256))) == pytest.approx(1.2 * float(free.tokens(256)))


@pytest.mark.parametrize("a", [0.6, 1.2])
def test_intervals_of_a_free_shapes_steps_hold_the_truth(a):
    """400 draws with 5 % of noise; the delta method is an approximation."""
    draws = 400
    batches = 256.0 * 2.0 ** np.arange(9)
    truth = 300 * (1 + (2_000 / batches) ** a)
    noise = 0.05 * np.random.default_rng(0).standard_normal((draws, batches.size))
    rows = np.ones((draws, batches.size), bool)
    fits = fit_tradeoffs(np.log(batches) * rows, np.log(truth) + noise, rows, 0.95)
    ends = [
        steps_interval(CriticalBatch("m", 2.0, fit, 0, 0, identified=True, in_law=True, free_shape=True), batches)
        for fit in fits
    ]
    low, high = np.moveaxis(np.array(ends), 1, 0)
    covered = ((low < truth) & (truth < high)).mean(0)
    assert (covered > 0.90).all()
    assert 0.93 < covered.mean() < 0.98


def test_free_shapes_take_bounded_points_of_the_law():
    fit = fitted_free(0.6)
    first, *others = [p for p in fit.points if p.model == "model1"]
    unbounded = dataclasses.replace(
        first,
        tradeoff=dataclasses.replace(
            first.tradeoff, shape=first.tradeoff.shape._replace(b_half_interval=(500.0, np.inf))
        ),
    )
    assert losses_of(fit, "model1")[1] == first.loss
    assert losses_of(dataclasses.replace(fit, points=(unbounded, *others)), "model1")[1] == others[0].loss
    few = tuple(dataclasses.replace(p, in_law=False) for p in others)
    with pytest.raises(UserError, match=r"add .* batch sizes"):
        goal(dataclasses.replace(fit, points=few), 2.0)


def test_the_knee_is_where_steps_times_tokens_is_smallest():
    to = goal(fitted(), 2.0)
    batches = np.geomspace(to.b_crit / 50, to.b_crit * 50, 2_001)
    products = to.steps(batches) * to.tokens(batches)
    assert batches[np.argmin(products)] == pytest.approx(to.b_crit, rel=0.01)


def test_the_largest_batch_within_a_budget_spends_it():
    to = goal(fitted(), 2.0)
    batch = largest_within(to, 1.5 * to.e_min)
    assert to.tokens(batch) == pytest.approx(1.5 * to.e_min)
    rows = choices(to, (0.9 * batch, 1.1 * batch), budget_tokens=1.5 * to.e_min)
    assert [row.within_budget for row in rows] == [True, False]
    with pytest.raises(UserError, match=r"tokens to loss 2 .*budget"):
        largest_within(to, 0.9 * to.e_min)


def test_the_fastest_batch_fills_the_devices():
    to, hardware = goal(fitted(), 2.0), Hardware(8, 1e5, 512)
    best = fastest(to, hardware)
    assert best == 4_096
    times = [hardware.seconds(b, float(to.steps(b))) for b in np.geomspace(100, 1e5, 501)]
    assert hardware.seconds(best, float(to.steps(best))) <= min(times) * (1 + 1e-9)
    assert fastest(to, hardware, budget_tokens=1.2 * to.e_min) == pytest.approx(0.2 * to.b_crit)
    assert fastest(to, Hardware(8, 1e5)) is None


def test_wall_time_is_tokens_over_speed_once_the_devices_are_full():
    assert Hardware(8, 1e5).seconds(8_000, 100) == pytest.approx(8_000 * 100 / 8e5)
    assert Hardware(8, 1e5, 2_000).seconds(8_000, 100) == pytest.approx(100 * 2_000 / 1e5)
    with pytest.raises(UserError, match="0 devices"):
        Hardware(0, 1e5)


def test_noisy_scans_give_intervals_around_the_truth():
    to = goal(fitted(0.03), 2.0)
    assert to.b_crit_interval[0] < b_crit(2.0) < to.b_crit_interval[1]
    assert to.law_interval[0] < b_crit(2.0) < to.law_interval[1]
    batches = np.array([256.0, 2_048.0, 16_384.0])
    low, high = to.steps_interval(batches)
    truth = s_min(2.0) * (1 + b_crit(2.0) / batches)
    assert ((low < truth) & (truth < high) & (high < 1.4 * low)).all()


def test_every_batch_of_a_trade_off_comes_back_to_its_limits():
    """Kaplan's adjustments undo the trade-off: each run gives S_min, and its tokens E_min."""
    fit = fit_tradeoff(BATCHES, 300 * (1 + 2_000 / BATCHES))
    for batch in BATCHES:
        steps = float(fit.steps_at(batch))
        assert fewest_steps(steps, batch, fit.b_crit).value == pytest.approx(300)
        assert least_compute(steps * batch, batch, fit.b_crit).value == pytest.approx(600_000)


def test_at_the_critical_batch_both_are_half():
    assert fewest_steps(1_000, 2_000, 2_000).value == least_compute(1_000, 2_000, 2_000).value == 500


def test_intervals_run_the_way_that_b_crit_moves_them():
    """A larger B_crit means fewer steps at the limit and more compute."""
    steps = fewest_steps(1_000, 1_000, 1_000, (500, 3_000))
    assert steps == (500, 250, pytest.approx(1_000 / 1.5))
    compute = least_compute(1_000, 1_000, 1_000, (0.0, np.inf))
    assert compute == (500, 0, 1_000)
    assert fewest_steps(1_000, 1_000, 1_000, (0.0, np.inf)) == (500, 0, 1_000)
