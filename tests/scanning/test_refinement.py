"""Which learning rate comes next, for steps that are known functions of the grid place."""

import math

import pytest

from scaling_jax.scanning.search import next_between

PLACE = math.log(2) / 16


def refined(log_steps_at, start=(-16, 0, 16)):
    """Best place in the end, and how many were tried beyond the first three."""
    log_steps = {place: log_steps_at(place) for place in start}
    while True:
        reached = {place: x for place, x in log_steps.items() if math.isfinite(x)}
        place = next_between(min(reached, key=lambda p: reached[p]), reached, set(log_steps), PLACE)
        if place is None:
            return min(reached, key=lambda p: reached[p]), len(log_steps) - 3
        assert place not in log_steps
        log_steps[place] = log_steps_at(place)


@pytest.mark.parametrize("optimum", [-7, -3, 0, 2, 6, 8])
def test_a_smooth_valley_is_found_within_two_percent(optimum):
    best, extra = refined(lambda place: 0.5 * (PLACE * (place - optimum)) ** 2 * 2.0)
    assert (PLACE * (best - optimum)) ** 2 <= 0.02
    assert extra <= 2


@pytest.mark.parametrize("limit", [1, 3, 7, 12, 15])
def test_the_edge_of_stability_is_found_to_one_place(limit):
    best, extra = refined(lambda place: -PLACE * place if place <= limit else math.inf)
    assert best == limit
    assert extra <= 5


def test_a_flat_valley_needs_no_more_runs():
    assert refined(lambda place: 0.01 * (place / 16) ** 2) == (0, 0)


def test_a_best_rate_deep_in_the_instability_is_left_for_a_lower_one():
    best, _ = refined(lambda place: -PLACE * place + (math.inf if place > 0 else 0.5 * math.exp(place / 2)))
    assert -8 <= best <= -2
