"""The search finds the best rate of planted losses at every horizon, and asks the same whatever was finished when."""

import math
import random

import pytest

from scaling_jax.scanning import BudgetScan, BudgetSubject, Cell, LearningRates
from scaling_jax.scanning.budget_search import best_place, search_all, search_cell
from scaling_jax.tasks import ModelConfig

MODEL = ModelConfig(n_layer=1, d_model=16, n_head=1, context=16)


def bowl(*best, factor=2.0):
    """Losses at two or more horizons, whose lowest are at these rate indices; infinite `factor` places above."""

    def losses(index):
        return [2 + (index - at) ** 2 / 100 if index < at + factor * 10 else math.inf for at in best]

    return losses


@pytest.mark.parametrize("places", [1, 2, 4])
@pytest.mark.parametrize("best", [(0, 0), (1, -1), (5, 5), (-6, -3)])
def test_the_best_rate_at_every_horizon_lies_between_its_nearest_places(places, best):
    rates = LearningRates(1e-2, 512, places=places, most=40)
    found = search_cell(rates, 0, places, bowl(*best))
    assert not found.wanted
    for horizon, at in enumerate(best):
        assert best_place({index: losses[horizon] for index, losses in found.tried.items()}) == at
        assert {at - 1, at, at + 1} <= set(found.tried)


def test_a_search_from_its_neighbours_best_takes_three_rates_if_that_is_the_best_here():
    found = search_cell(LearningRates(1e-2, 512, places=4), 3, 1, bowl(3, 3, 3))
    assert sorted(found.tried) == [2, 3, 4]


def test_rates_at_which_runs_diverge_count_as_the_worst():
    rates = LearningRates(1e-2, 512, most=20)
    found = search_cell(rates, 6, 1, lambda index: [math.inf if index > 2 else 3 - 0.1 * index])
    assert max(index for index, losses in found.tried.items() if losses[0] < math.inf) == 2
    assert {1, 2, 3} <= set(found.tried)


@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_no_more_rates_than_allowed_are_tried(most):
    found = search_cell(LearningRates(1e-2, 512, places=2, most=most), 0, 2, bowl(9, -9))
    assert len(found.tried) == most
    assert not found.wanted


def scan_of(batches=(64, 128, 256, 512, 1_024), **rates):
    subjects = (BudgetSubject(MODEL, (40_960, 81_920), LearningRates(1e-2, 256, places=2, **rates)),)
    return BudgetScan(name="made-up", subjects=subjects, batch_tokens=batches, seeds=(0, 3))


def planted(scan):
    """Losses with their best rate at other places for other batches, horizons and seeds."""

    def losses(cell, index):
        shift = round(math.log2(cell.batch_tokens / 256)) + cell.seed
        return [2 + 0.1 * (index - shift - k) ** 2 + 50 / tokens for k, tokens in enumerate(scan.horizons(cell))]

    return losses


def test_further_batch_sizes_start_where_their_neighbours_ended():
    scan = scan_of(most=20)
    true = planted(scan)
    found = search_all(scan, true)
    assert found.keys() == set(scan.cells)
    assert not any(search.wanted for search in found.values())
    known = {}

    def find(cell, index):
        return known.get((cell, index))

    assert set(search_all(scan, find)) == {Cell("1x16", 256, 0), Cell("1x16", 256, 3)}  # the middle ones first
    best = best_place({index: losses[1] for index, losses in found[Cell("1x16", 256, 3)].tried.items()})
    assert next(iter(found[Cell("1x16", 512, 3)].tried)) == best


@pytest.mark.parametrize("order", range(8))
def test_decisions_depend_on_finished_losses_alone(order):
    """Whatever order runs finish in, and wherever the scan is killed, the same rates are tried in the end."""
    scan, draws = scan_of(), random.Random(order)
    true, known = planted(scan), {}

    def find(cell, index):
        return known.get((cell, index))

    while wanted := [(c, i) for c, s in search_all(scan, find).items() for i in s.wanted]:
        for key in draws.sample(wanted, draws.randint(1, len(wanted))):
            known[key] = true(*key)
    ends = search_all(scan, true)
    assert search_all(scan, find) == ends
    assert {(cell, index) for cell, search in ends.items() for index in search.tried} == known.keys()
