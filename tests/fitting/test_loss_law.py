import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st

from scaling_jax.fitting import fit_data_law, fit_loss_law, fit_size_law

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


def test_an_irreducible_loss_is_found_or_taken_as_given():
    b_crit = 700 * (LOSSES - 1.4) ** -1.5
    for law in (fit_loss_law(LOSSES, b_crit, floor=None), fit_loss_law(LOSSES, b_crit, floor=1.4)):
        np.testing.assert_allclose(law.floor, 1.4, atol=2e-3)
        np.testing.assert_allclose([law.exponent, law.alpha_b], [-1.5, 1 / 1.5], rtol=5e-3)
        np.testing.assert_allclose(law(2.0), 700 * 0.6**-1.5, rtol=1e-3)
    assert fit_loss_law(LOSSES, 1e5 * LOSSES**-4.8, floor=None).floor == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("noise", [0.02, 0.05])
def test_intervals_with_an_irreducible_loss_to_find_cover_every_floor_that_fits(noise):
    """Those at the best floor alone would be a tenth as wide."""
    rng, covered = np.random.default_rng(0), []
    for _ in range(300):
        b_crit = 700 * (LOSSES - 1.4) ** -1.5 * np.exp(noise * rng.standard_normal(14))
        low, high = fit_loss_law(LOSSES, b_crit, floor=None).exponent_interval
        covered.append(low <= -1.5 <= high)
    assert abs(np.mean(covered) - 0.95) < 0.04


@pytest.mark.parametrize(("fit", "variable"), [(fit_data_law, "D_min in tokens"), (fit_size_law, "N in parameters")])
def test_laws_of_data_and_of_size_are_power_laws(fit, variable):
    values = np.geomspace(1e8, 1e10, 5)
    law = fit(values, 3.0 * values**0.46)
    np.testing.assert_allclose([law.constant, law.exponent, law(1e9)], [3.0, 0.46, 3.0 * 1e9**0.46], rtol=1e-6)
    assert law.variable == variable
    assert law.valid_range == pytest.approx((1e8, 1e10))
    with pytest.raises(ValueError, match=rf"{variable.split()[0]}\[1\] is -1"):
        fit([1e8, -1, 1e10], [1, 2, 3])


@pytest.mark.parametrize("floor", [-0.1, 1.7, float("nan")])
def test_a_floor_that_is_not_below_every_loss_is_refused(floor):
    with pytest.raises(ValueError, match=r"at least 0 and below the lowest loss, 1\.7"):
        fit_loss_law(LOSSES, LOSSES, floor=floor)
    with pytest.raises(ValueError, match="give at least 4"):
        fit_loss_law(LOSSES[:3], LOSSES[:3], floor=None)


@pytest.mark.parametrize(
    ("loss", "b_crit", "weights", "message"),
    [
        ([2.0, 3.0], [10, 5], None, "2 distinct values of loss .* at least 3"),
        ([2.0, 3.0, 4.0], [10, 5], None, r"\(3,\), .*\(2,\)"),
        ([2.0, 3.0, -4.0], [10, 5, 3], None, r"loss\[2\] is -4"),
        ([2.0, 3.0, 4.0], [10, np.inf, 3], None, r"b_crit\[1\] is inf"),
        ([2.0, 3.0, 4.0], [10, 5, 3], [1, 1, 0], r"weights\[2\] is 0"),
    ],
)
def test_bad_points_are_refused(loss, b_crit, weights, message):
    with pytest.raises(ValueError, match=message):
        fit_loss_law(loss, b_crit, weights)
