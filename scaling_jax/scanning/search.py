"""The learning-rate search of one cell: hill climbing until, at every target, the best rate lies between two others.

With small batches, steps depend little on the rate, and neighbours at a factor of two are close enough. With large
batches, the best rate lies just below the rates at which training diverges. The grid then misses it, and the cell needs
too many steps, always at the same batch sizes: B_crit came out 20 % too small (experiments/quadratic_scan.py). So the
search can also try rates between the neighbours (`LearningRates.places`).
"""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from scaling_jax.fitting import steps_to_loss
from scaling_jax.scanning.experiment import Cell, Experiment, LearningRates
from scaling_jax.training import Deadline, Run, RunResult, next_evaluation

GAIN = 0.02  # in log steps; the search ignores a parabola that promises less
FIRST_STEP = 30  # before it, losses say too little of a run


class Outcome(NamedTuple):
    """A finished run and its evaluations."""

    run: Run  # the run that was wanted
    result: RunResult  # of this run, or of a run that is the same and trained farther
    steps: Sequence[int]  # of evaluations with a finite loss
    losses: Sequence[float]  # nats per token


class Tried(NamedTuple):
    """A run of a cell's search, with its steps to each target loss."""

    run: Run
    result: RunResult
    steps: np.ndarray  # of evaluations with a finite loss
    losses: np.ndarray  # nats per token
    steps_to_target: np.ndarray  # [target losses]; NaN if not reached, or passed before the first evaluation
    passed_early: np.ndarray  # [target losses], True if the loss was below the target at the first evaluation


def search(experiment: Experiment, cell: Cell, train: Callable[[Run], Outcome]) -> list[Tried]:
    """Runs the learning-rate search of a cell. Which runs it makes depends only on the results; see `next_wave`.

    Args:
      train: returns the outcome of a run.
    """
    tried: dict[int, Tried] = {}
    while wave := next_wave(experiment, cell, tried):
        for index, run in wave.items():
            tried[index] = look_at(experiment.subject(cell.model).target_losses, train(run))
    return list(tried.values())


def look_at(targets: Sequence[float], outcome: Outcome) -> Tried:
    """A run's steps to each target."""
    steps, losses = np.array(outcome.steps, int), np.array(outcome.losses, float)
    passed, early = np.full(len(targets), math.nan), np.zeros(len(targets), bool)
    if len(steps):  # otherwise it diverged before its first evaluation
        crossings = steps_to_loss(steps, losses, targets)
        passed, early = crossings.steps, crossings.already_below
    return Tried(outcome.run, outcome.result, steps, losses, passed, early)


def next_wave(experiment: Experiment, cell: Cell, tried: Mapping[int, Tried]) -> dict[int, Run]:
    """The next runs of the search, {rate index: run}; empty when the search has ended.

    The first runs are `LearningRates.together` rates around the rule. Then the search takes the best rate at the lowest
    target and tries its neighbours, until both sides are tried, then places between them. It goes on with the same for
    each higher target. A run that is made for a target ends at that target. It ends earlier once it can no longer be
    the best: after the steps of the best run, after `LearningRates.give_up_factor` times the best run's steps to some
    target on the way, or when it is `too_late` at some loss.
    """
    subject = experiment.subject(cell.model)
    rates, targets = subject.learning_rates, subject.target_losses
    last = len(targets) - 1
    if not tried:
        count = min(rates.together, rates.most)
        around = [0] + [sign * rates.places * k for k in range(1, count) for sign in (1, -1)]
        return {index: experiment.run(cell, index) for index in around[:count]}
    for target in range(last, -1, -1):
        # Leave out runs that were made for a higher target and ended there.
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


def best_at(tried: Collection[Tried], target: int) -> Tried | None:
    """The run with the fewest steps to a target; None if no run reached it."""
    reached = [t for t in tried if math.isfinite(t.steps_to_target[target])]
    return min(reached, key=lambda t: t.steps_to_target[target], default=None)


def best_of(tried: Collection[Tried]) -> Tried:
    """The run with the fewest steps to the lowest target; if no run reached it, the one with the lowest last loss."""
    return best_at(tried, -1) or min(
        tried, key=lambda t: math.inf if t.result.test_loss is None else t.result.test_loss
    )


def is_tuned(tried: Collection[Tried], target: int) -> bool:
    """True if the best rate at a target lies between two other tried rates."""
    best = best_at(tried, target)
    rates = [t.run.learning_rate for t in tried]
    return best is not None and min(rates) < best.run.learning_rate < max(rates)


def _goal(t: Tried) -> float:
    """The target loss for which a run was made."""
    return 0.0 if t.run.target_loss is None else t.run.target_loss


def _wanted(rates: LearningRates, tried: Mapping[int, Tried], best: Tried, target: int) -> list[int]:
    """Rate indices to try next for a target: beyond the tried rates, or between the best rate and a neighbour."""
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
    """log(steps to a target); if the run ended above it, an estimate from its delay at the last loss that both reached.

    None for a run that diverged, or whose rate is higher than the best: it might never reach the target.
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
    """The run at a rate index, limited to what it needs to beat the best run at a target."""
    subject = experiment.subject(cell.model)
    losses, factor = subject.target_losses, subject.learning_rates.give_up_factor
    if not math.isfinite(best.steps_to_target[target]):
        return experiment.run(cell, index)
    # A run ends after two evaluations below the target, so allow two more than the best run's steps.
    most, growth = math.ceil(best.steps_to_target[target]), best.run.eval_growth
    for _ in range(2):
        most = next_evaluation(most, growth)
    passed = zip(losses[: target + 1], best.steps_to_target, strict=False)
    deadlines = tuple(Deadline(x, math.ceil(factor * n)) for x, n in passed if math.isfinite(n)) if factor else ()
    if subject.learning_rates.catch_up is not None:
        deadlines += too_late(best, best.steps_to_target[target], subject.learning_rates.catch_up)
    return experiment.run(cell, index, losses[target], min(most, best.result.steps), deadlines)


def too_late(best: Tried, steps: float, catch_up: float) -> tuple[Deadline, ...]:
    """The deadlines after which a run can't overtake the best run any more on its way to a target.

    A run that is late at some loss may still make up for it. In the demo's searches, a run that was the best in the end
    had made up at most 0.15 of the way that was left, in logs of steps. So where the best run took s of its `steps` to
    a loss, another run is given up after s·(steps/s)^catch_up, and `GAIN` more.
    """
    smooth = optimize.isotonic_regression(best.losses, increasing=False).x
    way = [(s, loss) for s, loss in zip(best.steps.tolist(), smooth.tolist(), strict=True) if FIRST_STEP <= s < steps]
    return tuple(
        Deadline(round(loss, 6), math.ceil(s * (steps / s) ** catch_up * math.exp(GAIN))) for s, loss in way[::2]
    )


def _next_between(best: int, log_steps: Mapping[int, float], tried: set[int], log_place: float) -> int | None:
    """The next grid place to try between the best place and its tried neighbours; None if none promises to be better.

    Args:
      best: the place with the fewest steps.
      log_steps: {place: natural log of steps to the target}, where known.
      tried: all tried places; at least one on each side of the best.
      log_place: natural log of the ratio of rates at neighbouring places.
    """
    below, above = max(i for i in tried if i < best), min(i for i in tried if i > best)
    if below in log_steps and above in log_steps:
        return _vertex(log_steps, tried, below, best, above)
    failed = above if above not in log_steps else below
    if abs(failed - best) > 1:
        return (best + failed) // 2
    if below in log_steps and best - below > 1:
        # Steps can't fall faster than the rate rises, so this is the most that a rate below the best can gain.
        hope = log_steps[best] - log_steps[below] + (best - below) * log_place
        if hope > 2 * GAIN:
            return (best + below) // 2
    return None


def _vertex(log_steps, tried, below, best, above) -> int | None:
    """The place nearest to the minimum of the parabola through three; None if tried, or if it gains too little."""
    rise_above = (log_steps[above] - log_steps[best]) / (above - best)
    rise_below = (log_steps[below] - log_steps[best]) / (best - below)
    curvature = 2 * (rise_above + rise_below) / (above - below)
    slope = (rise_above * (best - below) - rise_below * (above - best)) / (above - below)
    if curvature <= 0 or slope**2 / (2 * curvature) < GAIN:
        return None
    place = round(best - slope / curvature)
    return None if place in tried else place
