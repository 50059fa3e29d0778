import dataclasses
import math

import numpy as np
import pytest

from scaling_jax.fitting import fit_budget, fit_scan, steps_from_budgets
from scaling_jax.fitting.best_rate import best_losses
from scaling_jax.fitting.smooth import Curve, Losses, roughness_of
from tests.fitting.planted_budgets import MONOTONE, SURFACES, PlantedBudgets


def fitted(planted, seed=0):
    return fit_budget(**planted.columns(np.random.default_rng(seed)))


@pytest.mark.parametrize("rates", [0, 5])
@pytest.mark.parametrize("surface", SURFACES)
def test_the_best_batch_and_its_law_are_found_without_noise(surface, rates):
    planted = PlantedBudgets(SURFACES[surface], rates=rates, noise=1e-6)
    fit = fitted(planted)
    for budget in fit.budgets:
        assert budget.kind == "U-shaped"
        assert budget.b_opt == pytest.approx(planted.b_opt(budget.tokens), rel=0.02)
    assert fit.law.exponent == pytest.approx(0.5, abs=0.02)
    assert fit.law(4e7) == pytest.approx(planted.b_opt(4e7), rel=0.02)
    assert fit.notes[0].startswith("at 5 of 5 budgets the loss has a minimum")


def test_intervals_hold_planted_best_batches_and_exponents_as_often_as_they_say():
    """A sample of benchmarks/budgets.py; binomial bounds for 40 × 5 intervals and 40 exponents."""
    held, exponents = [], []
    for number, surface in enumerate(("parabola", "two arms", "flat bottom", "steep side")):
        planted = PlantedBudgets(SURFACES[surface])
        for seed in range(10):
            fit = fitted(planted, 100 * number + seed)
            assert all(budget.kind == "U-shaped" for budget in fit.budgets)
            ends = [(budget.b_opt_interval, planted.b_opt(budget.tokens)) for budget in fit.budgets]
            held += [low <= truth <= high for (low, high), truth in ends]
            low, high = fit.law.exponent_interval
            exponents.append(low <= 0.5 <= high)
    assert np.mean(held) > 0.89
    assert np.mean(exponents) > 0.86
    assert np.median([high / low for (low, high), _ in ends]) < 2  # and they aren't as wide as the table


@pytest.mark.parametrize(("surface", "kind"), [("rising", "rising"), ("rising line", "rising"), ("falling", "falling")])
def test_a_loss_that_only_rises_or_falls_gives_a_bound_and_no_law(surface, kind):
    fit = fitted(PlantedBudgets(MONOTONE[surface]))
    assert {budget.kind for budget in fit.budgets} == {kind}
    assert all(math.isnan(budget.b_opt) for budget in fit.budgets)
    open_end = 0.0 if kind == "rising" else math.inf
    assert all(open_end in budget.b_opt_interval for budget in fit.budgets)
    assert fit.law is None
    assert fit.notes[-1].startswith("no law")


def test_losses_that_tell_no_batch_from_another_are_flat_and_three_batches_too_few():
    flat = fitted(PlantedBudgets(lambda u: 0 * u))
    assert [budget.kind for budget in flat.budgets].count("flat") >= 4
    few = fitted(PlantedBudgets(SURFACES["parabola"], batches=(1024, 4096, 16384)))
    assert {budget.kind for budget in few.budgets} == {"too few"}
    assert few.law is None
    assert math.isnan(few.budgets[0].penalty_at(4096)[0])


def test_bounds_of_some_budgets_enter_the_law():
    planted = PlantedBudgets(SURFACES["parabola"], exponent=0.9, noise=0.002, budgets=(1e6, 4e6, 16e6, 64e6, 256e6))
    fit = fitted(planted)
    assert {budget.kind for budget in fit.budgets} >= {"U-shaped", "falling"}
    assert fit.law.bounds >= 1
    assert fit.law.exponent_interval[0] < 0.9 < fit.law.exponent_interval[1]


def test_penalties_and_the_largest_batch_within_one():
    planted = PlantedBudgets(SURFACES["parabola"], noise=1e-4)
    budget = fitted(planted).budgets[2]
    best = planted.b_opt(budget.tokens)
    value, low, high = budget.penalty_at(4 * best)
    assert low < value < high
    assert value == pytest.approx(0.006 * math.log(4) ** 2, abs=3e-4)
    largest, below, above = budget.largest_within(0.006 * math.log(4) ** 2)
    assert below < largest < above
    assert largest == pytest.approx(4 * best, rel=0.03)
    assert budget.largest_within(10.0)[0] == math.inf
    assert budget.penalty_at(1.0) == pytest.approx((math.nan,) * 3, nan_ok=True)


def test_scaling_batches_or_shifting_losses_moves_only_what_it_must():
    columns = PlantedBudgets(SURFACES["steep side"]).columns(np.random.default_rng(3))
    fit = fit_budget(**columns)
    scaled = fit_budget(**columns | {"batch_tokens": 8 * columns["batch_tokens"]})
    assert [b.b_opt for b in scaled.budgets] == pytest.approx([8 * b.b_opt for b in fit.budgets], rel=1e-6)
    assert scaled.law.exponent == pytest.approx(fit.law.exponent, abs=1e-6)
    order = np.random.default_rng(0).permutation(len(columns["loss"]))
    shuffled = fit_budget(**{name: values[order] for name, values in columns.items()})
    assert [b.b_opt_interval for b in shuffled.budgets] == [b.b_opt_interval for b in fit.budgets]


def test_the_best_rate_lies_between_those_tried_and_edges_are_told():
    planted = PlantedBudgets(SURFACES["parabola"], rates=5, noise=1e-5)
    budget = fitted(planted).budgets[0]
    assert budget.runs.learning_rate == pytest.approx(1e-3 * np.sqrt(budget.runs.batch_tokens / 4096), rel=0.01)
    rates = np.array([1e-3, 2e-3, 4e-3])
    edge = best_losses(np.full(3, 512.0), np.array([2.0, 2.1, 2.2]), rates)
    assert edge.at_edge.all()
    assert edge.loss[0] == 2.0
    assert budget.rate_at(4 * planted.batches[-1]) == pytest.approx(
        2 * budget.runs.learning_rate[-1], rel=1e-6
    )  # √B beyond


def test_diverged_runs_are_left_out_and_models_have_laws_of_their_own():
    planted = PlantedBudgets(SURFACES["parabola"], rates=5)
    first = planted.columns(np.random.default_rng(0))
    second = dataclasses.replace(planted, middle=16_384.0).columns(np.random.default_rng(1))
    second["model"] = np.full(len(second["loss"]), "other")
    columns = {name: np.concatenate([first[name], second[name]]) for name in first}
    highest = columns["learning_rate"] > 3.9e-3 * np.sqrt(columns["batch_tokens"] / 4096)
    columns["loss"] = np.where(highest, np.nan, columns["loss"])
    fit = fit_budget(**columns)
    assert set(fit.laws) == {"m", "other"}
    ratio = fit.laws["other"](4e7) / fit.laws["m"](4e7)
    assert ratio == pytest.approx(4.0, rel=0.15)
    assert any("don't follow one power law" in note for note in fit.notes)


def test_steps_from_budgets_are_those_of_a_planted_surface():
    """loss = 4·(D/(1 + B/B_crit))^-0.1: the tokens to a loss are a hyperbola's with one B_crit."""
    batch, d = (x.ravel() for x in np.meshgrid([256.0 * 2**k for k in range(8)], np.geomspace(1e7, 64e7, 7)))
    loss = 4 * (d / (1 + batch / 4096)) ** -0.1
    steps = steps_from_budgets(np.full(len(batch), "m"), batch, d, loss)
    fit = fit_scan(**steps)
    inside = [point for point in fit.points if point.in_law]
    assert len(inside) >= 4
    assert [point.b_crit for point in inside] == pytest.approx([4096] * len(inside), rel=0.02)
    with pytest.raises(ValueError, match="two budgets or more"):
        steps_from_budgets(["m"] * 4, [256, 512, 1024, 2048], [1e6] * 4, [3.0, 2.9, 2.9, 3.0])


def test_a_curve_through_an_exact_parabola_is_the_parabola():
    x = np.log([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    losses = Losses(x, 2 + 0.01 * (x - 1.5) ** 2, np.eye(6))
    curve = Curve(losses, *roughness_of([losses]))
    best, low, high = curve.minimum(0.95)
    assert best == pytest.approx(1.5, abs=1e-3)
    assert low < 1.5 < high
    assert curve.at([0.3, 2.9]) == pytest.approx(2 + 0.01 * np.array([1.2, 1.4]) ** 2, abs=1e-5)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"loss": [2.0, -1.0]}, r"loss\[1\] is -1"),
        ({"batch_tokens": [256]}, "lists of equal length"),
        ({"loss": [math.nan, math.nan]}, "no run has a finite loss"),
        ({"confidence": 1.0}, "confidence is 1.0"),
    ],
)
def test_wrong_columns_are_refused_by_name(columns, said):
    right = {"model": ["m", "m"], "batch_tokens": [256, 512], "tokens": [1e6, 1e6], "loss": [2.0, 2.1]}
    with pytest.raises(ValueError, match=said):
        fit_budget(**(right | columns))
