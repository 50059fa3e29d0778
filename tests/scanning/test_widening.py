"""Scans of a planted hyperbola, whose ends are extended until they show both of its limits."""

import dataclasses

import numpy as np
import pytest

from scaling_jax.fitting import fit_scan
from scaling_jax.io import UserError
from scaling_jax.scanning import Experiment, LearningRates, Subject, powers_of_two
from scaling_jax.scanning.widening import wider, widest
from scaling_jax.tasks import model_config

LOSSES = (3.0, 2.5, 2.0)
B_CRIT = (1_000, 1_500, 2_000)
S_MIN = (200, 300, 500)


def experiment(low, high):
    subject = Subject(model_config("1x16", context=1), LOSSES, LearningRates(1e-2, 1_000))
    return Experiment("made up", (subject,), powers_of_two(low, high), 10_000_000)


def fitted(found, noise=0.0):
    """The fit to the planted steps at an experiment's batch sizes."""
    rng = np.random.default_rng(0)
    rows = [
        ("1x16", batch, loss, s_min * (1 + b_crit / batch) * np.exp(noise * rng.standard_normal()))
        for batch in found.batch_tokens
        for loss, b_crit, s_min in zip(LOSSES, B_CRIT, S_MIN, strict=True)
    ]
    return fit_scan(*zip(*rows, strict=True), resamples=20)


def ends(low, high, least, most, noise=0.0):
    """The smallest and the largest batch after as many extensions as are asked for."""
    found = experiment(low, high)
    while (more := wider(found, fitted(found, noise), least, most)) is not None:
        assert len(more.experiment.batch_tokens) - len(found.batch_tokens) == bool(more.not_linear) + bool(
            more.not_saturated
        )
        found = more.experiment
    return min(found.batch_tokens), max(found.batch_tokens)


def test_a_scan_around_b_crit_stays_as_it_is():
    assert ends(256, 8_192, 2, 10**9) == (256, 8_192)


def test_ends_go_on_until_a_hyperbola_is_at_half_and_twice_its_b_crit():
    # Slopes are exactly -2/3 at B_crit/2 and -1/3 at 2·B_crit, for the smallest B_crit and the largest.
    assert ends(600, 2_400, 2, 10**9) == (300, 4_800)
    assert ends(2_048, 16_384, 64, 10**9) == (256, 16_384)
    assert ends(64, 512, 2, 10**9) == (64, 4_096)


def test_no_end_goes_beyond_its_limit():
    assert ends(2_048, 16_384, 1_000, None) == (1_024, 16_384)
    assert ends(64, 1_024, None, 2_047) == (64, 1_024)
    assert ends(2_048, 16_384, None, 10**9) == (2_048, 16_384)


def test_noise_doesnt_extend_a_scan_that_shows_both_limits():
    assert ends(64, 32_768, 2, 10**9, noise=0.05) == (64, 32_768)


def test_the_widest_scan_is_told_beforehand():
    assert widest(experiment(256, 1_024), 100, 5_000).batch_tokens == (256, 512, 1_024, 128, 2_048, 4_096)
    same = experiment(256, 1_024)
    assert widest(same, None, None) is same
    assert widest(same, 200, 2_000) is same


@pytest.mark.parametrize(
    ("least", "most", "words"),
    [
        (512, None, "--min-batch-tokens 512 is above the smallest batch size of the scan, 256"),
        (None, 512, "--max-batch-tokens 512 is below the largest batch size of the scan, 1,024"),
    ],
)
def test_limits_inside_the_scan_are_refused(least, most, words):
    with pytest.raises(UserError, match=words):
        widest(experiment(256, 1_024), least, most)


def test_a_batch_below_a_sequence_is_refused_before_anything_is_trained():
    config = dataclasses.replace(model_config("1x16"), context=128)
    subject = dataclasses.replace(experiment(256, 1_024).subjects[0], model=config)
    with pytest.raises(UserError, match="128"):
        widest(dataclasses.replace(experiment(256, 1_024), subjects=(subject,)), 64, None)
