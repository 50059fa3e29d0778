"""The whole scan on problems whose critical batch size is known: see experiments/quadratic_scan.py."""

import math

import numpy as np
import pytest

from experiments import quadratic_scan as quadratic
from scaling_jax.scanning import powers_of_two

BATCH_TOKENS = powers_of_two(256, 32_768)
FINE, COARSE = 2**0.125, 2.0  # ratios of neighbouring learning rates


def test_the_exact_steps_are_those_of_the_recursion():
    problem = quadratic.draw(0)
    steps, rate = quadratic.least_steps(problem, 1024, 0.15)
    squares = problem.start
    losses = []
    for _ in range(math.ceil(steps)):
        squares = (1 - rate * problem.curvature) ** 2 * squares + rate**2 * problem.noise / 1024
        losses.append(0.5 * problem.curvature @ squares)
    assert losses[-1] <= 0.15 < losses[-2]
    for other in (0.98 * rate, 1.02 * rate):
        assert quadratic.steps_at(problem, 1024, other, 0.15) > steps


def test_simulated_runs_follow_the_expected_loss():
    """Mean and spread over seeds, against one that takes every step."""
    problem = quadratic.draw(1, multiplicity=20)
    experiment = quadratic.scan_experiment((0.01,), BATCH_TOKENS, factor=COARSE, places=1)
    run = experiment.run(experiment.cells[0], -1)
    training = quadratic.NoisyTraining(problem, 0)
    generator = np.random.default_rng(0)
    jumps = [0.5 * problem.curvature @ training.after(problem.start, 40, run, generator) for _ in range(2_000)]
    theta = np.sqrt(problem.start / 20) * np.ones((500, 20, 1))
    spread = np.sqrt(problem.noise / 20 / run.batch_tokens)
    for _ in range(40):
        gradient = problem.curvature * theta + spread * generator.standard_normal(theta.shape[:2] + spread.shape)
        theta = theta - run.learning_rate * gradient
    walks = 0.5 * (theta**2).sum(1) @ problem.curvature
    expected = quadratic.expected_loss(problem, run.batch_tokens, run.learning_rate, 40)
    assert np.mean(jumps) == pytest.approx(expected, rel=4 * np.std(jumps) / expected / math.sqrt(2_000))
    assert np.std(jumps) == pytest.approx(np.std(walks), rel=0.2)


def ratios(seeds, factor):
    for seed in seeds:
        problem = quadratic.draw(seed)
        experiment = quadratic.scan_experiment(quadratic.LOSSES, BATCH_TOKENS, factor=factor, places=1)
        fit, _ = quadratic.run_instrument(problem, experiment, seed)
        for point in fit.points:
            true = quadratic.true_tradeoff(problem, BATCH_TOKENS, point.loss).b_crit
            low, high = point.tradeoff.b_crit_interval
            yield point.tradeoff.b_crit / true, low < true < high


def test_the_scan_finds_the_true_critical_batch_size():
    found = list(ratios(range(5), FINE))
    assert len(found) == 5 * len(quadratic.LOSSES)
    for ratio, covered in found:
        assert ratio == pytest.approx(1, abs=0.05)
        assert covered


@pytest.mark.long
def test_a_coarse_grid_of_learning_rates_makes_it_too_small():
    """Why the test above takes a fine one."""
    assert np.median([ratio for ratio, _ in ratios(range(2), COARSE)]) < 0.93


@pytest.mark.long
def test_intervals_cover_the_truth():
    """A hundred scans whose runs differ by several percent of luck."""
    batch_tokens, loss = powers_of_two(256, 16_384), 0.15
    covered = []
    for number in range(10):
        problem = quadratic.draw(number, multiplicity=30)
        true = quadratic.true_tradeoff(problem, batch_tokens, loss).b_crit
        for seed in range(10):
            experiment = quadratic.scan_experiment((loss,), batch_tokens, factor=FINE, places=1)
            fit, _ = quadratic.run_instrument(problem, experiment, seed)
            low, high = fit.points[0].tradeoff.b_crit_interval
            covered.append(low < true < high)
            assert high / low < 3
    assert sum(covered) >= 90
