import numpy as np
import pytest

from scaling_jax.fitting import compare_forms, fit_joint
from tests.fitting.planted import Planted

SIZES = {"model0": 1e4, "model1": 1e5}


def columns_with(b_crit, noise=0.01, seed=0):
    """A scan whose B_crit is `b_crit(model index, loss, s_min)`."""
    planted = Planted(noise=noise, kind="independent")
    columns = planted.columns(np.random.default_rng(seed))
    clean = Planted(noise=0.0).columns(np.random.default_rng(seed))["steps"]
    error = columns["steps"] / clean
    m = np.where(columns["model"] == "model0", 0, 1)
    s_min = 300.0 * (2.9 / columns["target_loss"]) ** 6 / (1.0 + 0.3 * m)
    value = b_crit(m, columns["target_loss"], s_min)
    return columns | {"steps": s_min * (1 + value / columns["batch_tokens"]) * error}


def forms(columns):
    return {form.form: form for form in compare_forms(**columns, num_params=SIZES)}


def test_a_law_of_the_loss_is_found_best_and_its_floor_is_zero():
    found = forms(columns_with(lambda m, loss, s: 1e5 * loss**-5.0))
    assert next(iter(found)) in ("loss", "above floor")
    assert found["loss"].exponent == pytest.approx(-5.0, abs=0.1)
    assert found["above floor"].floor < 0.4
    assert found["loss"].held_out_error < 0.5 * min(found["data"].held_out_error, found["size"].held_out_error)
    assert found["loss"].criterion < min(found["data"].criterion, found["size"].criterion) - 2


def test_a_floor_is_found_and_its_extrapolation_is_better():
    found = forms(columns_with(lambda m, loss, s: 700 * (loss - 1.4) ** -1.5))
    assert found["above floor"].floor == pytest.approx(1.4, abs=0.15)
    assert found["above floor"].exponent == pytest.approx(-1.5, abs=0.35)
    assert found["above floor"].criterion < found["loss"].criterion - 2
    assert found["above floor"].held_out_error < found["loss"].held_out_error
    assert found["above floor"].low_loss_error < found["loss"].low_loss_error


def test_a_law_of_the_data_is_found():
    """B = k·(S·B)^beta, solved for B; model 1 needs less data, so that the loss alone can't tell."""
    beta, k = 0.46, 2.5
    found = forms(columns_with(lambda m, loss, s: (k * (s * (1 + 2.0 * m)) ** beta) ** (1 / (1 - beta))))
    assert found["data"].held_out_error < found["loss"].held_out_error * 1.5
    np.testing.assert_allclose(
        forms(columns_with(lambda m, loss, s: (k * s**beta) ** (1 / (1 - beta)), noise=1e-4))["data"].exponent,
        beta,
        rtol=0.02,
    )


def test_a_law_of_the_size_is_found():
    found = forms(columns_with(lambda m, loss, s: 1_000 * 3.0**m))
    assert next(iter(found)) == "size"
    assert found["size"].exponent == pytest.approx(np.log(3) / np.log(10), rel=0.05)
    assert found["size"](1e5) == pytest.approx(3_000, rel=0.05)


def test_the_form_of_the_loss_is_the_joint_fit():
    columns = columns_with(lambda m, loss, s: 1e5 * loss**-5.0, noise=0.05)
    law, form = fit_joint(**columns, resamples=10).law, forms(columns)["loss"]
    np.testing.assert_allclose([form.constant, form.exponent], [law.b_star, law.exponent], rtol=1e-6)
    assert form(2.0) == pytest.approx(law(2.0))
    assert form.valid_range == pytest.approx(law.loss_range)


def test_without_sizes_there_is_no_form_of_the_size_and_wrong_ones_are_named():
    columns = columns_with(lambda m, loss, s: 1e5 * loss**-5.0)
    assert {form.form for form in compare_forms(**columns)} == {"loss", "above floor", "data"}
    with pytest.raises(ValueError, match="num_params of model model1 is None"):
        compare_forms(**columns, num_params={"model0": 1e4})


def test_a_scan_on_one_side_has_no_forms():
    assert compare_forms(**columns_with(lambda m, loss, s: 1e8 + 0 * s, noise=0.05)) == ()
