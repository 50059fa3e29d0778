"""The law of trade-offs of free shape: exact without noise, and intervals that cover."""

import numpy as np
import pytest

from scaling_jax.fitting.scan_table import scan_table
from scaling_jax.fitting.shape_law import fit_shape_law
from tests.fitting.planted import Planted
from tests.fitting.test_shapes import bent


def fitted(columns):
    return fit_shape_law(
        scan_table(*(columns[name] for name in ("model", "batch_tokens", "target_loss", "steps", "run")))
    )


def draw(seed, ends, **options):
    return bent(Planted(**options).columns(np.random.default_rng(seed)), *ends)


@pytest.mark.parametrize("a", [0.6, 1.0, 1.4])
def test_noiseless_runs_give_their_law(a):
    found = fitted(draw(0, (a, a), noise=0.0))
    np.testing.assert_allclose(found.slope, -4.8, atol=1e-3)
    np.testing.assert_allclose(found.a(np.array([2.9, 1.75])), a, rtol=1e-3)
    value, low, high = found.interval((1.0, np.log(2.0) - found.centre), 0.95)
    np.testing.assert_allclose(np.exp(value), Planted().b_crit(2.0), rtol=1e-3)
    assert low <= value <= high


def test_an_outlier_is_held_back():
    columns = draw(0, (0.7, 0.9), noise=0.01)
    wrong = (columns["model"] == "model0") & (columns["batch_tokens"] == 1_024)
    found = fitted(columns | {"steps": np.where(wrong, 1.5, 1.0) * columns["steps"]})
    assert abs(found.slope + 4.8) < 0.5


def test_too_few_runs_have_no_law():
    assert fitted(draw(0, (1.0, 1.0), num_models=1)) is not None
    assert fitted(draw(0, (1.0, 1.0), num_models=1, batches=(512, 1_024, 2_048, 4_096, 8_192, 16_384))) is None
    assert fitted(draw(0, (1.0, 1.0), num_losses=2)) is None


ENDS = [(1.0, 1.0), (0.5, 1.0), (0.8, 0.8), (1.2, 1.2), (0.5, 1.5), (1.5, 0.5)]


@pytest.mark.parametrize(
    "ends", [pytest.param(ends, marks=pytest.mark.slow if ends == (0.5, 1.0) else pytest.mark.long) for ends in ENDS]
)
def test_intervals_cover_the_exponent_and_the_level(ends):
    """Of 100 scans, a 95 % interval covers in 88 or fewer once in 250 times."""
    fits = [fitted(draw(seed, ends)) for seed in range(100)]
    covered = [low <= -4.8 <= high for _, low, high in (fit.interval((0.0, 1.0), 0.95) for fit in fits)]
    assert sum(covered) > 88
    level = [fit.interval((1.0, 0.0), 0.95) for fit in fits]
    truth = [np.log(Planted().b_crit(np.exp(fit.centre))) for fit in fits]
    assert sum(low <= t <= high for (_, low, high), t in zip(level, truth, strict=True)) > 88
