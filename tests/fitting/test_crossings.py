import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from scaling_jax.fitting import steps_to_loss


def test_losses_linear_in_log_step_are_read_off_exactly():
    steps = np.array([10, 20, 50, 300, 1_000])
    losses = 5.0 - 0.4 * np.log(steps)
    targets = np.array([2.5, 3.9, 3.0])
    crossings = steps_to_loss(steps, losses, targets)
    expected = np.exp((5.0 - targets) / 0.4)
    for column in (crossings.steps, crossings.first, crossings.last):
        np.testing.assert_allclose(column, expected, rtol=1e-12)


def test_nothing_is_extrapolated():
    crossings = steps_to_loss([100, 200, 400], [3.0, 2.5, 2.2], [3.1, 3.0, 2.2, 2.1])
    np.testing.assert_array_equal(np.isnan(crossings.steps), [True, False, False, True])
    np.testing.assert_array_equal(crossings.already_below, [True, False, False, False])
    np.testing.assert_array_equal(crossings.not_reached, [False, False, False, True])
    np.testing.assert_allclose(crossings.steps[1:3], [100, 400])
    assert (crossings.first_step, crossings.last_step) == (100, 400)


def test_first_and_last_crossing_stand_on_either_side_of_the_monotone_fit_at_a_bump():
    steps = np.exp(np.arange(6.0))
    crossings = steps_to_loss(steps, [4.0, 3.0, 2.0, 3.0, 2.0, 1.0], [2.5])
    np.testing.assert_allclose(np.log(crossings.first), 1.5)
    np.testing.assert_allclose(np.log(crossings.last), 3.5)
    # 2, 3 is pooled to 2.5 and stands at the middle of its two log steps
    np.testing.assert_allclose(np.log(crossings.steps), 2.5)


def test_a_dip_below_the_target_that_does_not_last_is_no_crossing():
    """Runs that touch a loss by luck once and end above it haven't reached it."""
    crossings = steps_to_loss([1, 2, 4, 8, 16], [4.0, 3.0, 1.9, 3.0, 2.9], [2.0])
    assert crossings.not_reached[0]
    assert np.isnan(crossings.steps[0])
    assert np.isfinite(crossings.first[0])
    assert np.isnan(crossings.last[0])


@hypothesis.given(st.lists(st.floats(0.5, 5.0), min_size=2, max_size=20), st.floats(0.1, 1e4))
@hypothesis.settings(deadline=None)
def test_lower_targets_take_longer_and_the_unit_of_steps_does_not_matter(losses, unit):
    steps = np.arange(1, len(losses) + 1) * 10.0
    targets = np.linspace(5.5, 0.1, 50)
    crossings = steps_to_loss(steps, losses, targets)
    reached = crossings.steps[np.isfinite(crossings.steps)]
    assert (np.diff(reached) >= -1e-9 * reached[1:]).all()
    assert ((reached >= steps[0] * (1 - 1e-12)) & (reached <= steps[-1] * (1 + 1e-12))).all()
    np.testing.assert_array_equal(np.isnan(crossings.steps), crossings.not_reached | crossings.already_below)
    np.testing.assert_allclose(steps_to_loss(steps * unit, losses, targets).steps, crossings.steps * unit, rtol=1e-9)


def test_noise_of_evaluations_does_not_shift_the_crossing():
    """The first raw crossing comes early under noise; the monotone fit doesn't."""
    rng = np.random.default_rng(0)
    steps = np.arange(20.0, 2_000.0, 20.0)
    clean = 6.0 * steps**-0.15
    target = 6.0 * 800.0**-0.15
    shifts = []
    for _ in range(300):
        crossings = steps_to_loss(steps, clean + 0.02 * rng.standard_normal(steps.size), [target])
        shifts.append([np.log(crossings.steps[0] / 800), np.log(crossings.first[0] / 800)])
    shift, first_shift = np.mean(shifts, axis=0)
    assert abs(shift) < 0.03 < -first_shift


@pytest.mark.parametrize(
    ("steps", "losses", "targets", "message"),
    [
        ([1, 2], [3.0], [2.0], r"\(2,\) .*\(1,\)"),
        ([], [], [2.0], "at least 1"),
        ([0, 2], [3.0, 2.0], [2.0], r"steps\[0\] is 0"),
        ([1, 3, 2], [3.0, 2.0, 1.0], [2.0], r"steps\[2\] is 2"),
        ([1, 2], [3.0, np.nan], [2.0], r"losses\[1\] is nan"),
        ([1, 2], [3.0, 2.0], [np.inf], r"targets\[0\] is inf"),
    ],
)
def test_bad_curves_are_refused(steps, losses, targets, message):
    with pytest.raises(ValueError, match=message):
        steps_to_loss(steps, losses, targets)
