import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from scaling_jax.fitting import fit_loss_law

LOSSES = np.geomspace(2.8, 1.7, 14)


@hypothesis.given(st.floats(-9.0, -0.5), st.floats(1.0, 1e9))
@hypothesis.settings(deadline=None, max_examples=50)
def test_noiseless_laws_are_recovered(exponent, b_star):
    law = fit_loss_law(LOSSES, b_star * LOSSES**exponent)
    np.testing.assert_allclose([law.exponent, law.b_star], [exponent, b_star], rtol=1e-6)
    np.testing.assert_allclose(law.alpha_b, -1 / exponent, rtol=1e-6)
    np.testing.assert_allclose(law(2.0), b_star / 2.0 ** (1 / law.alpha_b), rtol=1e-6)


def test_without_outliers_the_fit_is_weighted_least_squares():
    wiggle = np.tile([0.05, -0.05], 7)
    weights = np.linspace(1.0, 1.5, 14)
    slope, intercept = np.polyfit(np.log(LOSSES), np.log(1e5) - 4.8 * np.log(LOSSES) + wiggle, 1, w=np.sqrt(weights))
    law = fit_loss_law(LOSSES, 1e5 * LOSSES**-4.8 * np.exp(wiggle), weights)
    np.testing.assert_allclose([law.exponent, np.log(law.b_star)], [slope, intercept], rtol=1e-9)


def test_a_point_of_little_weight_hardly_moves_the_law():
    b_crit = 1e5 * LOSSES**-4.8
    b_crit[0] *= 10
    weights = np.ones(14)
    weights[0] = 1e-6
    np.testing.assert_allclose(fit_loss_law(LOSSES, b_crit, weights).exponent, -4.8, rtol=1e-4)


def test_one_wrong_point_does_not_carry_the_law_away():
    b_crit = 1e5 * LOSSES**-4.8 * np.exp(0.03 * np.tile([1, -1], 7))
    b_crit[-1] *= 10
    np.testing.assert_allclose(fit_loss_law(LOSSES, b_crit).exponent, -4.8, atol=0.15)
    assert abs(np.polyfit(np.log(LOSSES), np.log(b_crit), 1)[0] + 4.8) > 1


def test_intervals_cover_the_truth_for_independent_points():
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(600):
        law = fit_loss_law(LOSSES, 1e5 * LOSSES**-4.8 * np.exp(0.1 * rng.standard_normal(14)))
        covered.append(
            [
                law.exponent_interval[0] <= -4.8 <= law.exponent_interval[1],
                law.b_star_interval[0] <= 1e5 <= law.b_star_interval[1],
            ]
        )
    assert (abs(np.mean(covered, axis=0) - 0.95) < 0.03).all()


@pytest.mark.parametrize(
    ("loss", "b_crit", "weights", "message"),
    [
        ([2.0, 3.0], [10, 5], None, "2 distinct losses"),
        ([2.0, 3.0, 4.0], [10, 5], None, "one length"),
        ([2.0, 3.0, -4.0], [10, 5, 3], None, r"loss\[2\] is -4"),
        ([2.0, 3.0, 4.0], [10, np.inf, 3], None, r"b_crit\[1\] is inf"),
        ([2.0, 3.0, 4.0], [10, 5, 3], [1, 1, 0], r"weights\[2\] is 0"),
    ],
)
def test_bad_points_are_refused(loss, b_crit, weights, message):
    with pytest.raises(ValueError, match=message):
        fit_loss_law(loss, b_crit, weights)
