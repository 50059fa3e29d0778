"""Which learning rate comes next: for made-up runs, and for steps that are known functions of the grid place."""

import dataclasses
import json
import math

import pytest

from scaling_jax.io.config import to_dict
from scaling_jax.scanning import Experiment, LearningRates, Subject
from scaling_jax.scanning.cells import find_outcome, finished_runs
from scaling_jax.scanning.grid_search import _next_between
from scaling_jax.scanning.records import write_experiment, write_search
from scaling_jax.scanning.search import search
from scaling_jax.scanning.tried import best_at, best_of, is_tuned
from scaling_jax.tasks import model_config
from tests.made_up_scan import evaluated_lines, write_run

TARGETS = (3.0, 2.5, 2.0)
RATES = LearningRates(1e-2, 1_000, places=1, search="grid")
EXPERIMENT = Experiment(
    name="made up",
    subjects=(Subject(model_config("1x16"), TARGETS, RATES),),
    batch_tokens=(128, 256, 512),
    max_tokens=1_000_000,
)
CELL = EXPERIMENT.cells[0]


class MadeUpTraining:
    """Loss 4·step^(−speed/10), fastest at the learning rate `best` and slower by its distance in factors of two."""

    def __init__(self, workdir, best, diverges_above=math.inf):
        self.workdir, self.best, self.diverges_above, self.runs = workdir, best, diverges_above, []

    def loss(self, run, step):
        exponent = 0.14 - 0.02 * abs(math.log2(run.learning_rate / self.best))
        diverges = run.learning_rate > self.diverges_above and step > 5
        return None if diverges else 4 * step**-exponent

    def __call__(self, run):
        self.runs.append(run)
        status, evaluations, below = "exhausted", [], 0
        for step in range(1, run.steps_left(0, 0, run.batch_tokens) + 1):
            loss = self.loss(run, step)
            evaluations.append((step, loss))
            if loss is None:
                status = "diverged"
                break
            below = below + 1 if loss < run.target_loss else 0
            if below == 2:
                status = "reached"
                break
            if any(loss > late.loss for late in run.deadlines if step > late.step):
                status = "given up"
                break
        return write_run(self.workdir, run, evaluated_lines(run, evaluations), status)


def with_rates(**changes):
    """(the experiment, its learning rates) with other ones."""
    rates = dataclasses.replace(RATES, **changes)
    subject = dataclasses.replace(EXPERIMENT.subjects[0], learning_rates=rates)
    return dataclasses.replace(EXPERIMENT, subjects=(subject,)), rates


def place(t, rates=RATES):
    """The grid place of a rate that was tried."""
    return next(index for index in range(-60, 60) if rates.rate(128, index) == t.run.learning_rate)


@pytest.mark.parametrize("offset", [-2, -1, 0, 1, 2])
def test_the_search_ends_with_the_best_rate_between_two_others(tmp_path, offset):
    tried = search(EXPERIMENT, CELL, MadeUpTraining(tmp_path, RATES.rate(128, offset)))
    assert place(best_of(tried)) == offset
    assert {offset - 1, offset, offset + 1} <= {place(t) for t in tried}


def test_shortening_the_others_changes_no_measurement(tmp_path):
    """The fewest steps to every target are what they'd be if every rate had run to the end."""
    training = MadeUpTraining(tmp_path, RATES.rate(128, 1))
    tried = search(EXPERIMENT, CELL, training)
    for k, target in enumerate(TARGETS):
        measured = min(t.steps_to_target[k] for t in tried if math.isfinite(t.steps_to_target[k]))
        exponents = [0.14 - 0.02 * abs(math.log2(t.run.learning_rate / training.best)) for t in tried]
        assert measured == pytest.approx(min((target / 4) ** (-1 / e) for e in exponents), rel=0.01)
    assert sum(run.steps_left(0, 0, 128) for run in training.runs[2:]) < 10_000


def test_a_rate_that_falls_behind_twofold_is_given_up(tmp_path):
    experiment, slow = with_rates(factor=8.0)
    tried = search(experiment, CELL, MadeUpTraining(tmp_path, slow.rate(128, 0)))
    assert [t.result.status for t in tried] == ["reached", "given up", "given up"]


def test_a_rate_that_diverges_takes_nobody_with_it(tmp_path):
    training = MadeUpTraining(tmp_path, RATES.rate(128, 0), diverges_above=RATES.rate(128, 0.5))
    tried = search(EXPERIMENT, CELL, training)
    assert {place(t): t.result.status for t in tried}[1] == "diverged"
    assert place(best_of(tried)) == 0


def test_the_search_stops_at_the_most_rates(tmp_path):
    experiment, few = with_rates(most=2)
    assert len(search(experiment, CELL, MadeUpTraining(tmp_path, few.rate(128, 3)))) == 2


@pytest.fixture
def searched(tmp_path):
    """(folder, what was tried) of a cell whose search has ended and is written down."""
    write_experiment(tmp_path, EXPERIMENT)
    tried = search(EXPERIMENT, CELL, MadeUpTraining(tmp_path, RATES.rate(128, 1)))
    assert finished_runs(EXPERIMENT, CELL, tmp_path) is None  # its runs alone don't say that it has ended
    write_search(tmp_path, EXPERIMENT, CELL, [t.result.run_id for t in tried])
    return tmp_path, tried


def test_a_finished_search_is_read_back_from_disk(searched):
    folder, tried = searched
    assert finished_runs(EXPERIMENT, CELL, folder) == tuple(t.result.run_id for t in tried)
    assert finished_runs(EXPERIMENT, EXPERIMENT.cells[1], folder) is None
    for t in tried:
        again = find_outcome(t.run, folder)
        assert (again.run, again.result) == (t.run, t.result)
        assert (list(again.steps), list(again.losses)) == (t.steps.tolist(), t.losses.tolist())
    (folder / "runs" / tried[-1].run.run_id / "result.json").unlink()
    assert finished_runs(EXPERIMENT, CELL, folder) is None


def test_a_finished_search_of_schema_1_is_found_by_its_runs(searched):
    """It left no record: all runs that the search would make must be there."""
    folder, tried = searched
    (folder / "cells" / f"{CELL.file_name}.json").unlink()
    (folder / "experiment.json").write_text(json.dumps(to_dict(EXPERIMENT)))
    assert finished_runs(EXPERIMENT, CELL, folder) == tuple(t.result.run_id for t in tried)
    (folder / "runs" / tried[-1].run.run_id / "result.json").unlink()
    assert finished_runs(EXPERIMENT, CELL, folder) is None


@pytest.mark.parametrize("offset", [-1.4, -0.5, 0.1, 0.6])
def test_a_refined_search_comes_within_a_place_of_the_best_rate_in_few_runs(tmp_path, offset):
    experiment, fine = with_rates(places=4, most=12)
    tried = search(experiment, CELL, MadeUpTraining(tmp_path, fine.rate(128, 4 * offset)))
    assert abs(place(best_of(tried), fine) - 4 * offset) <= 1.01
    assert len(tried) <= 7


def test_a_rate_that_diverges_before_it_is_evaluated_takes_nobody_with_it(tmp_path):
    class Wild(MadeUpTraining):
        def __call__(self, run):
            if run.learning_rate > RATES.rate(128, 0.5):
                return write_run(tmp_path, run, evaluated_lines(run, [(3, None)]), "diverged")
            return super().__call__(run)

    tried = search(EXPERIMENT, CELL, Wild(tmp_path, RATES.rate(128, 0)))
    assert place(best_of(tried)) == 0
    assert {place(t): t.result.status for t in tried}[1] == "diverged"


def test_targets_above_the_lowest_get_a_rate_between_two_others_of_their_own(tmp_path):
    """At high losses the best rate lies two places below that of the lowest target."""

    class TwoRegimes(MadeUpTraining):
        def loss(self, run, step):
            places = math.log2(run.learning_rate / self.best)
            loss = 4 * (step * 1.5 ** -abs(places + 2)) ** -0.1
            if loss >= 3.0:
                return loss
            late = (step * 1.5 ** -abs(places + 2)) / (4 / 3.0) ** 10
            return 3.0 * late ** (-0.14 + 0.02 * abs(places))

        def __call__(self, run):
            return super().__call__(dataclasses.replace(run, deadlines=()))

    tried = search(EXPERIMENT, CELL, TwoRegimes(tmp_path, RATES.rate(128, 0)))
    assert place(best_at(tried, 2)) != place(best_at(tried, 0))
    assert all(is_tuned(tried, k) for k in range(3))
    shorter = [t for t in tried if t.run.target_loss > min(TARGETS)]
    assert shorter
    assert max(t.result.steps for t in shorter) < max(t.result.steps for t in tried)


LOG_PLACE = math.log(2) / 16


def refined(log_steps_at, start=(-16, 0, 16)):
    """Best place in the end, and how many were tried beyond the first three."""
    log_steps = {place: log_steps_at(place) for place in start}
    while True:
        reached = {place: x for place, x in log_steps.items() if math.isfinite(x)}
        place = _next_between(min(reached, key=lambda p: reached[p]), reached, set(log_steps), LOG_PLACE, 0.02)
        if place is None:
            return min(reached, key=lambda p: reached[p]), len(log_steps) - 3
        assert place not in log_steps
        log_steps[place] = log_steps_at(place)


@pytest.mark.parametrize("optimum", [-7, -3, 0, 2, 6, 8])
def test_a_smooth_valley_is_found_within_two_percent(optimum):
    best, extra = refined(lambda place: 0.5 * (LOG_PLACE * (place - optimum)) ** 2 * 2.0)
    assert (LOG_PLACE * (best - optimum)) ** 2 <= 0.02
    assert extra <= 2


@pytest.mark.parametrize("limit", [1, 3, 7, 12, 15])
def test_the_edge_of_stability_is_found_to_one_place(limit):
    best, extra = refined(lambda place: -LOG_PLACE * place if place <= limit else math.inf)
    assert best == limit
    assert extra <= 5


def test_a_flat_valley_needs_no_more_runs():
    assert refined(lambda place: 0.01 * (place / 16) ** 2) == (0, 0)


def test_a_best_rate_deep_in_the_instability_is_left_for_a_lower_one():
    best, _ = refined(lambda place: -LOG_PLACE * place + (math.inf if place > 0 else 0.5 * math.exp(place / 2)))
    assert -8 <= best <= -2
