"""A law's spread over parts of its data."""

import numpy as np

from scaling_jax.fitting import fit_scan
from scaling_jax.fitting.scan_table import scan_table
from scaling_jax.fitting.systematics import refits
from tests.fitting.planted import Planted


def table(**options):
    columns = Planted(**options).columns(np.random.default_rng(0))
    return scan_table(*(columns[name] for name in ("model", "batch_tokens", "target_loss", "steps", "run")))


def test_parts_of_a_true_law_all_give_it():
    found = refits(table(noise=0.001), free_shape=False)
    assert [refit.kept for refit in found] == [
        "losses up to 2.25",
        "losses from 2.25",
        "model0 alone",
        "model1 alone",
        "without the smallest batch",
        "without the largest batch",
        "without the smallest 2 batches",
        "without the largest 2 batches",
    ]
    np.testing.assert_allclose([refit.exponent for refit in found], -4.8, atol=0.1)
    np.testing.assert_allclose([refit.b_crit for refit in found], 1_800, rtol=0.01)
    assert [refit.num_losses for refit in found] == [7, 7, 14, 14, 14, 14, 14, 14]


def test_too_small_parts_are_left_out():
    assert [
        refit.kept for refit in refits(table(num_losses=4, batches=(512, 1_024, 2_048, 4_096, 8_192)), free_shape=False)
    ] == [
        "model0 alone",
        "model1 alone",
        "without the smallest batch",
        "without the largest batch",
    ]


def test_the_spread_is_that_of_the_refits():
    law = fit_scan(**Planted().columns(np.random.default_rng(0)), resamples=50).law
    exponents = [refit.exponent for refit in law.systematic]
    assert law.systematic_spread == (min(exponents), max(exponents))
