"""Intervals of the excess of branches hold the truth as often as they say, however evaluations depend on each other."""

import math

import numpy as np
import pytest

from scaling_jax.results.excess import Excess, excess, largest_within

BRANCHES, REPLICATES, EVALUATIONS, CORRELATION = 500, 4, 4, 0.8


def autocorrelated(draws, shape, correlation=CORRELATION):
    """AR(1) along the last axis, with standard deviation 1."""
    values = draws.normal(size=shape)
    for k in range(1, shape[-1]):
        values[..., k] = correlation * values[..., k - 1] + math.sqrt(1 - correlation**2) * values[..., k]
    return values


def differences(draws, truth):
    """[branches, replicates, evaluations]: a branch minus the run. Both have noise, and share that of their text."""
    shape = (BRANCHES, REPLICATES, EVALUATIONS)
    text = autocorrelated(draws, shape)
    run, branch = (0.004 * autocorrelated(draws, shape) + 0.01 * text for _ in range(2))
    return truth + branch - run


def test_intervals_of_the_excess_hold_the_truth_in_95_of_100_branches():
    truth = 0.007
    found = [excess(256, list(one)) for one in differences(np.random.default_rng(0), truth)]
    assert 0.93 < np.mean([x.low < truth < x.high for x in found]) < 0.97
    assert np.mean([x.mean for x in found]) == pytest.approx(truth, abs=3 * 0.004 / math.sqrt(BRANCHES))


def test_the_interval_that_takes_evaluations_as_independent_would_not():
    """So the simulation above can tell."""
    truth = 0.007
    one = differences(np.random.default_rng(0), truth)[:, 0]
    half = 1.96 * one.std(axis=1, ddof=1) / math.sqrt(EVALUATIONS)
    assert np.mean(np.abs(one.mean(axis=1) - truth) < half) < 0.6


@pytest.mark.parametrize("steps", [1.0, 3.0])
def test_intervals_of_b_crit_hold_the_truth_in_95_of_100_points_or_more(steps):
    """The excess rises linearly in log batch size; B_crit lies `steps` doublings above the run's batch."""
    tolerance, draws = 0.01, np.random.default_rng(1)
    by_batch = {64 * 2**k: differences(draws, tolerance * k / steps) for k in range(1, 5)}
    held = []
    for index in range(BRANCHES):
        found = [excess(batch, list(values[index])) for batch, values in by_batch.items()]
        b_crit, low, high = largest_within(64, found, tolerance)
        assert low <= b_crit <= high
        held.append(low <= 64 * 2**steps <= high)
    assert np.mean(held) > 0.94


def test_between_branches_the_excess_is_linear_in_log_batch_size():
    assert largest_within(64, [Excess(256, 0.02, 0.015, 0.04)], 0.01) == pytest.approx(
        (128, 64 * 4**0.25, 64 * 4 ** (2 / 3))
    )


def test_where_the_tolerance_is_not_crossed_bounds_are_left():
    keeps_up = Excess(128, 0.0, -0.001, 0.001)
    assert largest_within(64, [keeps_up], 0.01) == (math.inf, 128.0, math.inf)
    maybe = Excess(256, 0.005, -0.005, 0.019)
    b_crit, low, high = largest_within(64, [keeps_up, maybe], 0.01)
    assert (b_crit, high) == (math.inf, math.inf)
    assert low == pytest.approx(128 * math.sqrt(2))
    diverged = excess(256, [np.array([0.0]), np.array([math.inf])])
    assert largest_within(64, [keeps_up, diverged, maybe], 0.01) == (128.0, 128.0, 256.0)
    assert largest_within(64, [diverged], 0.01) == (64.0, 64.0, 256.0)


def test_the_interval_reaches_to_the_last_batch_that_may_keep_up():
    """A batch that falls behind by chance doesn't end it."""
    found = [Excess(128, 0.02, 0.011, 0.03), Excess(256, 0.02, 0.009, 0.03), Excess(512, 0.05, 0.04, 0.06)]
    b_crit, low, high = largest_within(64, found, 0.01)
    assert low < b_crit < 128 < 256 < high < 512


def test_one_replicate_gives_a_number_without_an_interval():
    one = excess(128, [np.array([0.019, 0.021])])
    assert (one.mean, one.low, one.high) == (pytest.approx(0.02), -math.inf, math.inf)
    assert largest_within(64, [one], 0.01) == (pytest.approx(64 * math.sqrt(2)), 64.0, math.inf)
