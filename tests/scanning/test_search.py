import dataclasses
import math

import pytest

from scaling_jax.scanning import Experiment, LearningRates, Subject
from scaling_jax.scanning.search import best_at, best_of, finished, is_tuned, search
from scaling_jax.tasks import model_config
from scaling_jax.training import RunResult
from scaling_jax.training.records import append_metrics, write_result

TARGETS = (3.0, 2.5, 2.0)
EXPERIMENT = Experiment(
    name="made up",
    subjects=(Subject(model_config("1x16"), TARGETS, LearningRates(1e-2, 1_000)),),
    batch_tokens=(128, 256, 512),
    max_tokens=1_000_000,
)
GROUP = EXPERIMENT.groups[0]


class MadeUpTraining:
    """Loss 4·step^(−speed/10), fastest at the learning rate `best` and slower by its distance in factors of two."""

    def __init__(self, workdir, best, diverges_above=math.inf):
        self.workdir, self.best, self.diverges_above, self.runs = workdir, best, diverges_above, []

    def __call__(self, run):
        self.runs.append(run)
        folder = self.workdir / "runs" / run.run_id
        folder.mkdir(parents=True)
        exponent = 0.14 - 0.02 * abs(math.log2(run.learning_rate / self.best))
        status, step, below = "exhausted", 0, 0
        loss: float | None = None
        for step in range(1, run.steps_left(0, 0, run.batch_tokens) + 1):
            loss = 4 * step**-exponent
            if run.learning_rate > self.diverges_above and step > 5:
                status, loss = "diverged", None
                break
            append_metrics(folder, {"step": step, "test_loss": loss})
            below = below + 1 if loss < run.target_loss else 0
            if below == 2:
                status = "reached"
                break
            if any(loss > late.loss for late in run.deadlines if step > late.step):
                status = "given up"
                break
        result = RunResult(run.run_id, status, step, step * run.batch_tokens, loss, "")
        write_result(folder, result)
        return result


@pytest.mark.parametrize("offset", [-2, -1, 0, 1, 2])
def test_the_search_ends_with_the_best_rate_between_two_others(tmp_path, offset):
    rates = GROUP.subject.learning_rates
    training = MadeUpTraining(tmp_path, rates.rate(128, offset))
    tried = search(EXPERIMENT, GROUP, tmp_path, training)
    assert best_of(tried).rate_index == offset
    assert {offset - 1, offset, offset + 1} <= {t.rate_index for t in tried}


def test_shortening_the_others_changes_no_measurement(tmp_path):
    """The fewest steps to every target are what they'd be if every rate had run to the end."""
    training = MadeUpTraining(tmp_path, GROUP.subject.learning_rates.rate(128, 1))
    tried = search(EXPERIMENT, GROUP, tmp_path, training)
    full = MadeUpTraining(tmp_path / "full", training.best)
    for k, target in enumerate(TARGETS):
        measured = min(t.steps_to_target[k] for t in tried if math.isfinite(t.steps_to_target[k]))
        exponents = [0.14 - 0.02 * abs(math.log2(t.run.learning_rate / full.best)) for t in tried]
        assert measured == pytest.approx(min((target / 4) ** (-1 / e) for e in exponents), rel=0.01)
    assert sum(run.steps_left(0, 0, 128) for run in training.runs[2:]) < 10_000


def test_a_rate_that_falls_behind_twofold_is_given_up(tmp_path):
    slow = dataclasses.replace(GROUP.subject.learning_rates, factor=8.0)
    experiment = dataclasses.replace(EXPERIMENT, subjects=(dataclasses.replace(GROUP.subject, learning_rates=slow),))
    tried = search(experiment, experiment.groups[0], tmp_path, MadeUpTraining(tmp_path, slow.rate(128, 0)))
    assert [t.result.status for t in tried] == ["reached", "given up", "given up"]


def test_a_rate_that_diverges_takes_nobody_with_it(tmp_path):
    rates = GROUP.subject.learning_rates
    training = MadeUpTraining(tmp_path, rates.rate(128, 0), diverges_above=rates.rate(128, 0.5))
    tried = search(EXPERIMENT, GROUP, tmp_path, training)
    assert {t.rate_index: t.result.status for t in tried}[1] == "diverged"
    assert best_of(tried).rate_index == 0


def test_the_search_stops_at_the_most_rates(tmp_path):
    few = dataclasses.replace(GROUP.subject.learning_rates, most=2)
    experiment = dataclasses.replace(EXPERIMENT, subjects=(dataclasses.replace(GROUP.subject, learning_rates=few),))
    tried = search(experiment, experiment.groups[0], tmp_path, MadeUpTraining(tmp_path, few.rate(128, 3)))
    assert len(tried) == 2


def test_a_finished_search_is_read_back_from_disk(tmp_path):
    assert finished(EXPERIMENT, GROUP, tmp_path) is None
    tried = search(EXPERIMENT, GROUP, tmp_path, MadeUpTraining(tmp_path, GROUP.subject.learning_rates.rate(128, 1)))
    again = finished(EXPERIMENT, GROUP, tmp_path)
    assert [t.run for t in again] == [t.run for t in tried]
    (tmp_path / "runs" / tried[-1].run.run_id / "result.json").unlink()
    assert finished(EXPERIMENT, GROUP, tmp_path) is None


@pytest.mark.parametrize("offset", [-1.4, -0.5, 0.1, 0.6])
def test_a_refined_search_comes_within_a_place_of_the_best_rate_in_few_runs(tmp_path, offset):
    fine = dataclasses.replace(GROUP.subject.learning_rates, places=4, most=12)
    experiment = dataclasses.replace(EXPERIMENT, subjects=(dataclasses.replace(GROUP.subject, learning_rates=fine),))
    training = MadeUpTraining(tmp_path, fine.rate(128, 4 * offset))
    tried = search(experiment, experiment.groups[0], tmp_path, training)
    assert abs(best_of(tried).rate_index - 4 * offset) <= 1.01
    assert len(tried) <= 7


def test_a_rate_that_diverges_before_it_is_evaluated_takes_nobody_with_it(tmp_path):
    class Wild(MadeUpTraining):
        def __call__(self, run):
            if run.learning_rate > GROUP.subject.learning_rates.rate(128, 0.5):
                append_metrics_folder = tmp_path / "runs" / run.run_id
                append_metrics_folder.mkdir(parents=True)
                append_metrics(append_metrics_folder, {"step": 3, "test_loss": None})
                result = RunResult(run.run_id, "diverged", 3, 384, None, "")
                write_result(append_metrics_folder, result)
                return result
            return super().__call__(run)

    tried = search(EXPERIMENT, GROUP, tmp_path, Wild(tmp_path, GROUP.subject.learning_rates.rate(128, 0)))
    assert best_of(tried).rate_index == 0
    assert {t.rate_index: t.result.status for t in tried}[1] == "diverged"


def test_targets_above_the_lowest_get_a_rate_between_two_others_of_their_own(tmp_path):
    """At high losses the best rate lies two places below that of the lowest target."""

    class TwoRegimes(MadeUpTraining):
        def __call__(self, run):
            self.runs.append(run)
            folder = self.workdir / "runs" / run.run_id
            folder.mkdir(parents=True)
            places = math.log2(run.learning_rate / self.best)
            below, step, status = 0, 0, "exhausted"
            for step in range(1, run.steps_left(0, 0, run.batch_tokens) + 1):
                loss = 4 * (step * 1.5 ** -abs(places + 2)) ** -0.1
                if loss < 3.0:
                    late = (step * 1.5 ** -abs(places + 2)) / (4 / 3.0) ** 10
                    loss = 3.0 * late ** (-0.14 + 0.02 * abs(places))
                append_metrics(folder, {"step": step, "test_loss": loss})
                below = below + 1 if loss < run.target_loss else 0
                if below == 2:
                    status = "reached"
                    break
            result = RunResult(run.run_id, status, step, step * run.batch_tokens, loss, "")
            write_result(folder, result)
            return result

    tried = search(EXPERIMENT, GROUP, tmp_path, TwoRegimes(tmp_path, GROUP.subject.learning_rates.rate(128, 0)))
    assert best_at(tried, 2).rate_index != best_at(tried, 0).rate_index
    assert all(is_tuned(tried, k) for k in range(3))
    shorter = [t for t in tried if t.run.target_loss > min(TARGETS)]
    assert shorter
    assert max(t.result.steps for t in shorter) < max(t.result.steps for t in tried)
