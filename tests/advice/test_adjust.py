import numpy as np
import pytest

from scaling_jax.advice import fewest_steps, least_compute
from scaling_jax.fitting import fit_tradeoff

BATCHES = 256.0 * 2.0 ** np.arange(7)


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
