"""The learning-rate search of one group: hill climbing until the best rate at every target has both its neighbours."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scaling_jax.fitting import steps_to_loss
from scaling_jax.scanning.experiment import Experiment, Group, LearningRates
from scaling_jax.scanning.refinement import next_between
from scaling_jax.training import Deadline, Run, RunResult, next_evaluation, read_metrics, read_result, run_folder

Evaluations = tuple[list[int], list[float]]  # steps and finite test losses of a run


class Tried(NamedTuple):
    """A learning rate of a group, and what came of it."""

    rate_index: int
    run: Run
    result: RunResult
    steps_to_target: np.ndarray  # [target losses]; NaN where it didn't get there, or was there before it was evaluated
    passed_early: np.ndarray  # [target losses], bool: below the target at its first evaluation


def search(
    experiment: Experiment,
    group: Group,
    workdir: Path,
    train: Callable[[Run], RunResult],
    read: Callable[[Path], Evaluations] | None = None,
) -> list[Tried]:
    """Runs the group's learning rates, in an order and to lengths that depend on results alone; see `next_wave`.

    Args:
      read: what a run's folder holds; `evaluations` unless given.
    """
    tried: dict[int, Tried] = {}
    while wave := next_wave(experiment, group, tried):
        results = {index: train(run) for index, run in wave.items()}
        for index, run in wave.items():
            tried[index] = look_at(group, workdir, index, run, results[index], read)
    return list(tried.values())


def look_at(
    group: Group,
    workdir: Path,
    index: int,
    run: Run,
    result: RunResult,
    read: Callable[[Path], Evaluations] | None = None,
) -> Tried:
    """What came of a run that is done; see `search`."""
    steps, losses = (read or evaluations)(run_folder(workdir, run))
    targets = group.subject.target_losses
    if not steps:  # diverged before its first evaluation
        return Tried(index, run, result, np.full(len(targets), math.nan), np.zeros(len(targets), bool))
    crossings = steps_to_loss(steps, losses, targets)
    return Tried(index, run, result, crossings.steps, crossings.already_below)


def next_wave(experiment: Experiment, group: Group, tried: Mapping[int, Tried]) -> dict[int, Run]:
    """The runs to be made next, by rate index; none once the search is over.

    The first are `LearningRates.together` around the rule. Then come neighbours of the rate that was best at the lowest
    target until it has one on both sides, then places between them (`refinement`), and so on for each target above. A
    run for the sake of a target ends there, and earlier once it can no longer be best: when it has taken as many steps
    as the best one, or `LearningRates.give_up_factor` times as many to some loss on the way.
    """
    rates = group.subject.learning_rates
    last = len(group.subject.target_losses) - 1
    if not tried:
        around = [0] + [sign * rates.places * k for k in range(1, rates.most) for sign in (1, -1)]
        return {index: experiment.run(group, index) for index in around[: min(rates.together, rates.most)]}
    for target in range(last, -1, -1):
        # A run for the sake of a higher loss ended there: it says nothing of this one.
        as_far = {i: t for i, t in tried.items() if _goal(t) <= group.subject.target_losses[target]}
        best = best_at(list(as_far.values()), target)
        if best is None:
            if target < last:
                continue
            best = best_of(list(as_far.values()))
        wanted = [index for index in _wanted(rates, as_far, best, target) if index not in tried]
        room = min(rates.together, rates.most - len(tried))
        if wanted:
            return {index: _contender(experiment, group, index, best, target) for index in wanted[:room]}
    return {}


def _goal(t: Tried) -> float:
    return 0.0 if t.run.target_loss is None else t.run.target_loss


def _wanted(rates: LearningRates, tried: Mapping[int, Tried], best: Tried, target: int) -> list[int]:
    here, places = best.rate_index, rates.places
    beyond = []
    if max(tried) == here:
        beyond.append(here - here % places + places)
    if min(tried) == here:
        beyond.append(-(-here // places) * places - places)
    if best.result.status == "diverged":
        beyond.reverse()
    if beyond or places == 1 or not math.isfinite(best.steps_to_target[target]):
        return beyond
    log_steps = {index: x for index, t in tried.items() if (x := _log_steps(t, best, target)) is not None}
    between = next_between(here, log_steps, set(tried), math.log(rates.factor) / places)
    return [] if between is None else [between]


def _log_steps(t: Tried, best: Tried, target: int) -> float | None:
    """To a target; of a slower rate's run that ended above it, by how far behind it was at the last loss of both.

    A run at a higher rate than the best may never get there, whatever it did before.
    """
    least = math.log(best.steps_to_target[target])
    if math.isfinite(t.steps_to_target[target]):
        return math.log(t.steps_to_target[target])
    behind = np.log(t.steps_to_target[:target] / best.steps_to_target[:target])
    behind = behind[np.isfinite(behind)]
    if t.rate_index > best.rate_index or t.result.status == "diverged" or not len(behind):
        return None
    return max(least + max(float(behind[-1]), 0.0), math.log(t.result.steps))


def _contender(experiment: Experiment, group: Group, index: int, best: Tried, target: int) -> Run:
    losses = group.subject.target_losses
    if not math.isfinite(best.steps_to_target[target]):
        return experiment.run(group, index)
    # Two evaluations below the target end a run.
    most, growth = math.ceil(best.steps_to_target[target]), best.run.eval_growth
    for _ in range(2):
        most = next_evaluation(most, growth)
    factor = group.subject.learning_rates.give_up_factor
    passed = zip(losses[: target + 1], best.steps_to_target, strict=False)
    deadlines = tuple(Deadline(x, math.ceil(factor * n)) for x, n in passed if math.isfinite(n)) if factor else ()
    return experiment.run(group, index, losses[target], min(most, best.result.steps), deadlines)


def finished(experiment: Experiment, group: Group, workdir: Path) -> list[Tried] | None:
    """What `search` returned, from disk; None if some of it isn't there yet."""

    class Missing(Exception):
        pass

    def read(run: Run) -> RunResult:
        result = read_result(run_folder(workdir, run))
        if result is None:
            raise Missing
        return result

    try:
        return search(experiment, group, workdir, read)
    except Missing:
        return None


def evaluations(folder: Path) -> Evaluations:
    """Of a run, from disk."""
    lines = [line for line in read_metrics(folder) if line.get("test_loss") is not None]
    return [line["step"] for line in lines], [line["test_loss"] for line in lines]


def best_at(tried: list[Tried], target: int) -> Tried | None:
    """Who took the fewest steps to a target; None if nobody got there."""
    reached = [t for t in tried if math.isfinite(t.steps_to_target[target])]
    return min(reached, key=lambda t: t.steps_to_target[target], default=None)


def best_of(tried: list[Tried]) -> Tried:
    """By steps to the lowest target, else by the last loss."""
    return best_at(tried, -1) or min(
        tried, key=lambda t: math.inf if t.result.test_loss is None else t.result.test_loss
    )


def is_tuned(tried: list[Tried], target: int) -> bool:
    """Whether the best rate at a target lies between two others that were tried."""
    best = best_at(tried, target)
    indices = [t.rate_index for t in tried]
    return best is not None and min(indices) < best.rate_index < max(indices)
