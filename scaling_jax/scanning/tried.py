"""The runs that a cell's search has tried, the best of them, and how far a run goes that wants to beat it."""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from scipy import optimize

from scaling_jax.fitting import steps_to_loss
from scaling_jax.scanning.experiment import Cell, Experiment
from scaling_jax.training import Deadline, Run, RunResult, next_evaluation


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

    @property
    def goal(self) -> float:
        """The target loss for which the run was made."""
        return 0.0 if self.run.target_loss is None else self.run.target_loss


def look_at(targets: Sequence[float], outcome: Outcome) -> Tried:
    """A run's steps to each target."""
    steps, losses = np.array(outcome.steps, int), np.array(outcome.losses, float)
    passed, early = np.full(len(targets), math.nan), np.zeros(len(targets), bool)
    if len(steps):  # otherwise it diverged before its first evaluation
        crossings = steps_to_loss(steps, losses, targets)
        passed, early = crossings.steps, crossings.already_below
    return Tried(outcome.run, outcome.result, steps, losses, passed, early)


def best_at(tried: Collection[Tried], target: int) -> Tried | None:
    """The run with the fewest steps to a target; None if no run reached it."""
    reached = [t for t in tried if math.isfinite(t.steps_to_target[target])]
    return min(reached, key=lambda t: t.steps_to_target[target], default=None)


def best_of(tried: Collection[Tried]) -> Tried:
    """The run with the fewest steps to the lowest target; if no run reached it, the one with the lowest last loss."""
    return best_at(tried, -1) or min(
        tried, key=lambda t: math.inf if t.result.test_loss is None else t.result.test_loss
    )


def index_of(tried: Mapping[int, Tried], run: Tried) -> int:
    """The rate index of a run that was tried."""
    return next(index for index, t in tried.items() if t is run)


def is_tuned(tried: Collection[Tried], target: int) -> bool:
    """True if the best rate at a target lies between two other tried rates."""
    best = best_at(tried, target)
    rates = [t.run.learning_rate for t in tried]
    return best is not None and min(rates) < best.run.learning_rate < max(rates)


def contender(
    experiment: Experiment, cell: Cell, index: int, best: Tried, target: int, too_late: Sequence[Deadline] = ()
) -> Run:
    """The run at a rate index, limited to what it needs to beat the best run at a target.

    Args:
      too_late: more deadlines; see `too_late`.
    """
    subject = experiment.subject(cell.model)
    losses, factor = subject.target_losses, subject.learning_rates.give_up_factor
    if not math.isfinite(best.steps_to_target[target]):
        return experiment.run(cell, index)
    most = two_evaluations_on(best.steps_to_target[target], best.run)
    passed = zip(losses[: target + 1], best.steps_to_target, strict=False)
    deadlines = tuple(Deadline(x, math.ceil(factor * n)) for x, n in passed if math.isfinite(n)) if factor else ()
    return experiment.run(cell, index, losses[target], min(most, best.result.steps), (*deadlines, *too_late))


def two_evaluations_on(steps: float, run: Run) -> int:
    """Where a run is evaluated for the second time after `steps`: it ends after two evaluations below its target."""
    return next_evaluation(next_evaluation(math.ceil(steps), run.eval_growth), run.eval_growth)


def too_late(
    best: Tried, steps: float, catch_up: float, tolerance: float, first_step: float, first_gain: float
) -> tuple[Deadline, ...]:
    """The deadlines after which a run can't overtake the best run any more on its way to a target.

    A run that is late at some loss may still make up for a part of the way that is left, in logs of steps. So where the
    best run took s of its `steps` to a loss, another run is given up after s·(steps/s)^catch_up, and `tolerance` more.

    Args:
      catch_up: part of the way left that a run may make up.
      tolerance: in log steps.
      first_step: no deadlines for losses that the best run reached before it.
      first_gain: instead of `tolerance` before `FIRST_STEP`, where losses say little of a run.
    """
    smooth = optimize.isotonic_regression(best.losses, increasing=False).x
    way = [(s, loss) for s, loss in zip(best.steps.tolist(), smooth.tolist(), strict=True) if first_step <= s < steps]
    return tuple(
        Deadline(
            round(loss, 6),
            math.ceil(s * (steps / s) ** catch_up * math.exp(tolerance if s >= FIRST_STEP else first_gain)),
        )
        for s, loss in way[::2]
    )


FIRST_STEP = 30  # before it, losses say little of a run
