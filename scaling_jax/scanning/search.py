"""The learning-rate search of one cell: hill climbing until the best rate at every target has both its neighbours.

Between those, a factor of two costs little where steps are flat in the rate, as they are for small batches. For large
ones the best rate lies just below where training diverges; the grid misses it by up to that factor, always to the side
of more steps, and always at the same batches: B_crit came out 20 % too small (experiments/quadratic_scan.py). So places
between rates are tried as well (`LearningRates.places`).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from scaling_jax.fitting import steps_to_loss
from scaling_jax.scanning.experiment import Cell, Experiment, LearningRates
from scaling_jax.training import Deadline, Run, RunResult, next_evaluation

GAIN = 0.02  # in steps; a parabola that promises less isn't followed


class Outcome(NamedTuple):
    """A run that is done."""

    run: Run  # as it was asked for
    result: RunResult  # its own, or that of one which went as far or farther
    steps: Sequence[int]  # of evaluations with a finite loss
    losses: Sequence[float]  # nats per token


class Tried(NamedTuple):
    """A learning rate of a cell, and what came of it."""

    run: Run
    result: RunResult
    steps: np.ndarray  # of evaluations with a finite loss
    losses: np.ndarray  # nats per token
    steps_to_target: np.ndarray  # [target losses]; NaN where it didn't get there, or was there before it was evaluated
    passed_early: np.ndarray  # [target losses], bool: below the target at its first evaluation


def search(experiment: Experiment, cell: Cell, train: Callable[[Run], Outcome]) -> list[Tried]:
    """Runs the cell's learning rates, in an order and to lengths that depend on results alone; see `next_wave`.

    Args:
      train: gives what came of a run, or of one that is the same and went farther.
    """
    tried: dict[int, Tried] = {}
    while wave := next_wave(experiment, cell, tried):
        for index, run in wave.items():
            tried[index] = look_at(experiment.subject(cell.model).target_losses, train(run))
    return list(tried.values())


def look_at(targets: Sequence[float], outcome: Outcome) -> Tried:
    """Where a run passed each target."""
    steps, losses = np.array(outcome.steps, int), np.array(outcome.losses, float)
    passed, early = np.full(len(targets), math.nan), np.zeros(len(targets), bool)
    if len(steps):  # otherwise it diverged before its first evaluation
        crossings = steps_to_loss(steps, losses, targets)
        passed, early = crossings.steps, crossings.already_below
    return Tried(outcome.run, outcome.result, steps, losses, passed, early)


def next_wave(experiment: Experiment, cell: Cell, tried: Mapping[int, Tried]) -> dict[int, Run]:
    """The runs to be made next, by rate index; none once the search is over.

    The first are `LearningRates.together` around the rule. Then come neighbours of the rate that was best at the lowest
    target until it has one on both sides, then places between them (`refinement`), and so on for each target above. A
    run for the sake of a target ends there, and earlier once it can no longer be best: when it has taken as many steps
    as the best one, or `LearningRates.give_up_factor` times as many to some loss on the way.
    """
    subject = experiment.subject(cell.model)
    rates, targets = subject.learning_rates, subject.target_losses
    last = len(targets) - 1
    if not tried:
        around = [0] + [sign * rates.places * k for k in range(1, rates.most) for sign in (1, -1)]
        return {index: experiment.run(cell, index) for index in around[: min(rates.together, rates.most)]}
    for target in range(last, -1, -1):
        # A run for the sake of a higher loss ended there: it says nothing of this one.
        as_far = {i: t for i, t in tried.items() if _goal(t) <= targets[target]}
        best = best_at(as_far.values(), target)
        if best is None:
            if target < last:
                continue
            best = best_of(as_far.values())
        wanted = [index for index in _wanted(rates, as_far, best, target) if index not in tried]
        room = min(rates.together, rates.most - len(tried))
        if wanted:
            return {index: _contender(experiment, cell, index, best, target) for index in wanted[:room]}
    return {}


def _goal(t: Tried) -> float:
    return 0.0 if t.run.target_loss is None else t.run.target_loss


def _wanted(rates: LearningRates, tried: Mapping[int, Tried], best: Tried, target: int) -> list[int]:
    here, places = next(index for index, t in tried.items() if t is best), rates.places
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
    between = _next_between(here, log_steps, set(tried), math.log(rates.factor) / places)
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
    if t.run.learning_rate > best.run.learning_rate or t.result.status == "diverged" or not len(behind):
        return None
    return max(least + max(float(behind[-1]), 0.0), math.log(t.result.steps))


def _contender(experiment: Experiment, cell: Cell, index: int, best: Tried, target: int) -> Run:
    subject = experiment.subject(cell.model)
    losses, factor = subject.target_losses, subject.learning_rates.give_up_factor
    if not math.isfinite(best.steps_to_target[target]):
        return experiment.run(cell, index)
    # Two evaluations below the target end a run.
    most, growth = math.ceil(best.steps_to_target[target]), best.run.eval_growth
    for _ in range(2):
        most = next_evaluation(most, growth)
    passed = zip(losses[: target + 1], best.steps_to_target, strict=False)
    deadlines = tuple(Deadline(x, math.ceil(factor * n)) for x, n in passed if math.isfinite(n)) if factor else ()
    return experiment.run(cell, index, losses[target], min(most, best.result.steps), deadlines)


def best_at(tried: Collection[Tried], target: int) -> Tried | None:
    """Who took the fewest steps to a target; None if nobody got there."""
    reached = [t for t in tried if math.isfinite(t.steps_to_target[target])]
    return min(reached, key=lambda t: t.steps_to_target[target], default=None)


def best_of(tried: Collection[Tried]) -> Tried:
    """By steps to the lowest target, else by the last loss."""
    return best_at(tried, -1) or min(
        tried, key=lambda t: math.inf if t.result.test_loss is None else t.result.test_loss
    )


def is_tuned(tried: Collection[Tried], target: int) -> bool:
    """Whether the best rate at a target lies between two others that were tried."""
    best = best_at(tried, target)
    rates = [t.run.learning_rate for t in tried]
    return best is not None and min(rates) < best.run.learning_rate < max(rates)


def _next_between(best: int, log_steps: Mapping[int, float], tried: set[int], log_place: float) -> int | None:
    """The grid place to try next to the best one, whose neighbours were tried; None if no better one is to be expected.

    Args:
      best: the place of the fewest steps.
      log_steps: by place, natural logs; only of those whose steps to the target are known.
      tried: all places, with one on either side of the best.
      log_place: natural log of the ratio of rates one place apart.
    """
    below, above = max(i for i in tried if i < best), min(i for i in tried if i > best)
    if below in log_steps and above in log_steps:
        return _vertex(log_steps, tried, below, best, above)
    failed = above if above not in log_steps else below
    if abs(failed - best) > 1:
        return (best + failed) // 2
    if below in log_steps and best - below > 1:
        # Steps can't fall faster than the rate rises: this is what could still lie below the best.
        hope = log_steps[best] - log_steps[below] + (best - below) * log_place
        if hope > 2 * GAIN:
            return (best + below) // 2
    return None


def _vertex(log_steps, tried, below, best, above) -> int | None:
    """The place nearest to the minimum of the parabola through three, if it was not tried and promises enough."""
    rise_above = (log_steps[above] - log_steps[best]) / (above - best)
    rise_below = (log_steps[below] - log_steps[best]) / (best - below)
    curvature = 2 * (rise_above + rise_below) / (above - below)
    slope = (rise_above * (best - below) - rise_below * (above - best)) / (above - below)
    if curvature <= 0 or slope**2 / (2 * curvature) < GAIN:
        return None
    place = round(best - slope / curvature)
    return None if place in tried else place
