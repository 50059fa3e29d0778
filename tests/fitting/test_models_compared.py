"""Models compared at the same loss: the ratio of their B_crit, with intervals that cover."""

import numpy as np
import pytest

from scaling_jax.fitting import fit_scan
from scaling_jax.fitting.models_compared import compare_models
from scaling_jax.fitting.scan_table import scan_table
from tests.fitting.planted import Planted

NAMES = ("model", "batch_tokens", "target_loss", "steps", "run")


def with_ratio(columns, ratio):
    """The second model's B_crit times a ratio, at every loss."""
    b_crit = Planted().b_crit(columns["target_loss"])
    batch = columns["batch_tokens"]
    grown = (1 + ratio * b_crit / batch) / (1 + b_crit / batch)
    return columns | {"steps": columns["steps"] * np.where(columns["model"] == "model1", grown, 1.0)}


def table(columns):
    return scan_table(*(columns[name] for name in NAMES))


def test_a_planted_ratio_is_found():
    compared = compare_models(table(with_ratio(Planted(noise=1e-4).columns(np.random.default_rng(0)), 0.7)))
    np.testing.assert_allclose(compared.exponent, -4.8, atol=0.01)
    (found,) = compared.ratios
    assert (found.model, found.first) == ("model1", "model0")
    np.testing.assert_allclose(found.ratio, 0.7, rtol=1e-3)
    assert found.differs


@pytest.mark.parametrize("ratio", [1.0, 0.7])
def test_its_interval_covers(ratio):
    """Of 100 scans, a 95 % interval covers in 88 or fewer once in 250 times."""
    compared = [
        compare_models(table(with_ratio(Planted().columns(np.random.default_rng(seed)), ratio))) for seed in range(100)
    ]
    assert sum(low <= ratio <= high for ((_, _, _, low, high),) in (found.ratios for found in compared)) > 88
    exponents = [found.exponent_interval for found in compared]
    assert sum(low <= -4.8 <= high for low, high in exponents) > 88


def test_models_at_other_losses_are_not_compared():
    columns = Planted(noise=0.01).columns(np.random.default_rng(0))
    keep = (columns["model"] == "model0") == (columns["target_loss"] > 2.3)
    assert compare_models(table({name: values[keep] for name, values in columns.items()})).ratios == ()
    assert compare_models(table(Planted(num_models=1).columns(np.random.default_rng(0)))) is None


def test_a_scan_whose_models_differ_says_so_and_shows_each_alone():
    columns = with_ratio(Planted(noise=0.01).columns(np.random.default_rng(0)), 0.7)
    fit = fit_scan(**columns, resamples=50)
    (note,) = (note for note in fit.notes if note.startswith("models differ"))
    assert "B_crit of model1 is 0.7" in note
    alone = {part.kept: part for part in fit.law.systematic}
    np.testing.assert_allclose(alone["model1 alone"].b_crit / alone["model0 alone"].b_crit, 0.7, rtol=0.05)
    same = fit_scan(**Planted(noise=0.01).columns(np.random.default_rng(0)), resamples=50)
    assert not any("models differ" in note for note in same.notes)
