"""Searches that know those of other batches: for steps that are known functions of batch and rate."""

import dataclasses
import json
import math

import numpy as np
import pytest

from experiments import quadratic_scan as quadratic
from scaling_jax.io import UserError
from scaling_jax.io.config import to_dict
from scaling_jax.scanning import Experiment, LearningRates, Subject, powers_of_two
from scaling_jax.scanning.guided_search import predict
from scaling_jax.scanning.records import SearchRecord, read_experiment
from scaling_jax.scanning.search import in_order, search_all
from scaling_jax.scanning.tried import best_at, best_of, look_at
from scaling_jax.tasks import model_config
from scaling_jax.training.metrics import MetricsLine
from tests.scanning.simulated import outcome, simulated

RATES = LearningRates(1e-2, 1_000, places=4, most=20)
TARGETS = (3.0, 2.5, 2.0)
EXPERIMENT = Experiment(
    name="made up",
    subjects=(Subject(model_config("1x16"), TARGETS, RATES),),
    batch_tokens=powers_of_two(128, 8_192),
    max_tokens=10_000_000,
)
B_CRIT, CURVATURE = 1_000, 0.8


def steps_to(loss, batch_tokens):
    """At the best rate."""
    return 30 * (3.5 / loss) ** 6 * (1 + B_CRIT / batch_tokens)


class Planted:
    """Runs at `best(batch_tokens)` need `steps_to`; others more by a parabola; none above the cliff gets below 3.4."""

    def __init__(self, best, cliff=math.inf):
        self.best, self.cliff, self.runs = best, cliff, []

    def __call__(self, run):
        self.runs.append(run)
        distance = math.log(run.learning_rate / self.best(run.batch_tokens))
        slower = math.exp(CURVATURE / 2 * distance**2)

        def loss_after(step):
            loss = 3.5 * (1 + step / slower / steps_to(3.5, run.batch_tokens)) ** (-1 / 6)
            return max(loss, 3.4) if distance > self.cliff else loss

        return simulated(run, loss_after)


def place(run):
    """How many grid places a run's rate lies above the rule."""
    return 4 * math.log2(run.learning_rate / RATES.rate(run.batch_tokens, 0))


def rule(shift=0.0, per_doubling=0.0):
    """Best rates that lie `shift` grid places above the rule at 1,024 tokens, and change with the batch."""
    return lambda batch: RATES.rate(batch, 0) * 2 ** ((shift + per_doubling * math.log2(batch / 1_024)) / 4)


def test_cells_are_guided_from_the_middle_outwards():
    batches = {cell.batch_tokens: [c.batch_tokens for c in EXPERIMENT.inner(cell)] for cell in EXPERIMENT.cells}
    assert batches[1_024] == []
    assert batches[8_192] == [4_096, 2_048, 1_024]
    assert batches[128] == [256, 512, 1_024]
    ordered = [cell.batch_tokens for cell in in_order(EXPERIMENT, reversed(EXPERIMENT.cells))]
    assert ordered == [1_024, 2_048, 4_096, 8_192, 512, 256, 128]


@pytest.mark.parametrize(("shift", "per_doubling"), [(0, 0), (2.5, 0.4), (-5, -0.8), (6, 1.5)])
def test_the_best_rate_is_found_in_few_tokens(shift, per_doubling):
    best, training = rule(shift, per_doubling), Planted(rule(shift, per_doubling), cliff=0.5)
    found = search_all(EXPERIMENT, training)
    for cell, tried in found.items():
        for k, target in enumerate(TARGETS):
            exact = steps_to(target, cell.batch_tokens) - steps_to(3.5, cell.batch_tokens)
            assert best_at(tried, k).steps_to_target[k] == pytest.approx(exact, rel=0.035)
        assert abs(math.log2(best_of(tried).run.learning_rate / best(cell.batch_tokens))) < 0.45
    trained = sum(t.result.tokens for tried in found.values() for t in tried)
    assert trained < 3 * sum(best_of(tried).result.tokens for tried in found.values())


def test_the_first_rate_follows_the_change_of_the_batches_before():
    def tried(batch_tokens, rate):
        run = dataclasses.replace(EXPERIMENT.run(EXPERIMENT.cells[0], 0), batch_tokens=batch_tokens, learning_rate=rate)
        lines = [MetricsLine.told(0, 10, batch_tokens, 1.9), MetricsLine.told(10, 12, batch_tokens, 1.9)]
        return [look_at(TARGETS, outcome(run, lines, "reached"))]

    best = rule(3, 2)
    assert predict(RATES, 1_024, []) == 0
    assert predict(RATES, 2_048, [tried(1_024, best(1_024))]) == 3
    inner = [tried(batch, best(batch)) for batch in (4_096, 2_048)]
    assert predict(RATES, 8_192, inner) == round(3 + 2 * 2 + 0.7 * 2)
    assert predict(RATES, 8_192, [tried(4_096, best(4_096)), tried(2_048, best(2_048) / 64)]) == 7 + 4  # one factor


def test_a_first_run_ends_when_it_needs_more_than_the_batch_before():
    """The rate of the smallest batch is far from its prediction: its first run would take 200 times the tokens."""

    def best(batch):
        return rule()(batch) * (1 if batch > 128 else 1 / 16)

    training = Planted(best, cliff=0.2)
    search_all(EXPERIMENT, training)
    first, *_ = (run for run in training.runs if run.batch_tokens == 128)
    before = [run for run in training.runs if run.batch_tokens == 256]
    assert first.max_steps * 128 < 1.5 * steps_to(2.0, 256) * 256
    assert first.max_steps > before[0].max_steps


@pytest.mark.parametrize("runs_before_a_stop", [1, 4])
def test_a_scan_stopped_again_and_again_makes_the_same_runs(runs_before_a_stop):
    undisturbed = Planted(rule(2, 0.5), cliff=0.4)
    search_all(EXPERIMENT, undisturbed)
    disturbed, outcomes = Planted(rule(2, 0.5), cliff=0.4), {}

    def train(run):
        if run.run_id not in outcomes:
            if len(outcomes) == limit:
                raise KeyboardInterrupt
            outcomes[run.run_id] = disturbed(run)
        return outcomes[run.run_id]

    limit, ended = 0, False
    while not ended:
        limit += runs_before_a_stop
        try:
            search_all(EXPERIMENT, train)
            ended = True
        except KeyboardInterrupt:
            pass
    assert [run.run_id for run in disturbed.runs] == [run.run_id for run in undisturbed.runs]


@pytest.mark.parametrize("search", ["guided", "grid"])
def test_a_tighter_tolerance_finds_a_better_rate_in_more_runs(search):
    def steps_and_runs(tolerance):
        rates = dataclasses.replace(RATES, places=16, rate_tolerance=tolerance, search=search)
        subject = dataclasses.replace(EXPERIMENT.subjects[0], learning_rates=rates)
        training = Planted(rule(0.7, 0.6))
        found = search_all(dataclasses.replace(EXPERIMENT, subjects=(subject,)), training)
        steps = [best_at(tried, -1).steps_to_target[-1] for tried in found.values()]
        return float(np.log(steps).mean()), len(training.runs)

    (loose, few), (tight, many) = steps_and_runs(0.1), steps_and_runs(0.001)
    assert few < many
    assert 0.002 < loose - tight < 0.1


def test_on_the_grid_no_batch_knows_of_another():
    rates = dataclasses.replace(RATES, search="grid")
    subject = dataclasses.replace(EXPERIMENT.subjects[0], learning_rates=rates)
    experiment = dataclasses.replace(EXPERIMENT, subjects=(subject,))
    assert all(experiment.inner(cell) == () for cell in experiment.cells)
    assert in_order(experiment, experiment.cells) == list(experiment.cells)


def test_an_unknown_search_is_refused():
    with pytest.raises(UserError, match=r"learning_rates.search = 'best': choose from guided, grid$"):
        LearningRates(1e-2, 1_000, search="best")


def test_experiments_of_older_schemas_search_on_the_grid(tmp_path):
    values = to_dict(EXPERIMENT)
    del values["subjects"][0]["learning_rates"]["search"]
    (tmp_path / "experiment.json").write_text(json.dumps({"schema": 3, **values}))
    assert read_experiment(tmp_path).subjects[0].learning_rates.search == "grid"


def test_a_search_that_has_ended_answers_whichever_way_it_went():
    record = SearchRecord("1x16", 128, 0, TARGETS, dataclasses.replace(RATES, search="grid"), 10_000_000, ("a",))
    assert record.answers(EXPERIMENT)
    assert not dataclasses.replace(record, learning_rates=dataclasses.replace(RATES, most=3)).answers(EXPERIMENT)


def test_a_search_made_with_the_former_default_places_stays_finished():
    now = dataclasses.replace(RATES, places=LearningRates.places)
    subject = dataclasses.replace(EXPERIMENT.subjects[0], learning_rates=now)
    experiment = dataclasses.replace(EXPERIMENT, subjects=(subject,))
    before = dataclasses.replace(RATES, places=1)
    record = SearchRecord("1x16", 128, 0, TARGETS, before, 10_000_000, ("a",), schema=4)
    assert record.answers(experiment)
    assert not dataclasses.replace(record, schema=5).answers(experiment)
    finer = dataclasses.replace(subject, learning_rates=dataclasses.replace(now, places=8))
    assert not record.answers(dataclasses.replace(EXPERIMENT, subjects=(finer,)))


@pytest.mark.slow
def test_noisy_quadratics_at_two_and_a_half_times_the_tokens_of_the_best_runs():
    ratios, spent = [], []
    for number in quadratic.DRAWS:
        problem = quadratic.draw(number)
        experiment = quadratic.scan_experiment(quadratic.LOSSES, quadratic.BATCH_TOKENS, places=4)
        fit, cost = quadratic.run_instrument(problem, experiment, number)
        spent.append(cost)
        for point in fit.points:
            true = quadratic.true_tradeoff(problem, quadratic.BATCH_TOKENS, point.loss).b_crit
            ratios.append(point.tradeoff.b_crit / true)
            assert point.tradeoff.b_crit_interval[0] <= true <= point.tradeoff.b_crit_interval[1]
    assert np.median(ratios) == pytest.approx(1, abs=0.03)
    assert 0.9 < min(ratios) <= max(ratios) < 1.1
    assert np.mean(spent) < 2.6
