"""The learning-rate search of one group: hill climbing on the grid, until both neighbours of the best were tried."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scaling_jax.fitting import steps_to_loss
from scaling_jax.scanning.experiment import Experiment, Group
from scaling_jax.training import Deadline, Run, RunResult, read_metrics, read_result

GIVE_UP_FACTOR = 2.0  # a rate that needs this many times the best one's steps to some loss is given up


class Tried(NamedTuple):
    """A learning rate of a group, and what came of it."""

    rate_index: int
    run: Run
    result: RunResult
    steps_to_target: np.ndarray  # [target losses]; NaN where it didn't get there


def search(experiment: Experiment, group: Group, workdir: Path, train: Callable[[Run], RunResult]) -> list[Tried]:
    """Runs the group's learning rates, in an order and to lengths that depend on results alone.

    Best is who reaches the lowest target first, else who is lowest at the end. A run that has taken as many steps as
    the best one can't be the best at any target any more, above or below, so it ends there and nothing is lost by it;
    one that has fallen behind by `GIVE_UP_FACTOR` ends earlier.
    """
    tried: dict[int, Tried] = {}
    index: int | None = 0
    while index is not None:
        reached = [t for t in tried.values() if t.result.status == "reached"]
        best = best_of(reached) if reached else None
        run = experiment.run(group, index, best and best.result.steps, (best and _deadlines(group, best)) or ())
        result = train(run)
        steps = steps_to_loss(*evaluations(workdir / "runs" / run.run_id), group.subject.target_losses).steps
        tried[index] = Tried(index, run, result, steps)
        index = _next_index(tried, group.subject.learning_rates.most)
    return list(tried.values())


def _deadlines(group: Group, best: Tried) -> tuple[Deadline, ...]:
    pairs = zip(group.subject.target_losses, best.steps_to_target, strict=True)
    return tuple(Deadline(loss, math.ceil(GIVE_UP_FACTOR * steps)) for loss, steps in pairs if math.isfinite(steps))


def finished(experiment: Experiment, group: Group, workdir: Path) -> list[Tried] | None:
    """What `search` returned, from disk; None if some of it isn't there yet."""

    class Missing(Exception):
        pass

    def read(run: Run) -> RunResult:
        result = read_result(workdir / "runs" / run.run_id)
        if result is None:
            raise Missing
        return result

    try:
        return search(experiment, group, workdir, read)
    except Missing:
        return None


def evaluations(folder: Path) -> tuple[list[int], list[float]]:
    """Steps and finite test losses of a run."""
    lines = [line for line in read_metrics(folder) if line.get("test_loss") is not None]
    return [line["step"] for line in lines], [line["test_loss"] for line in lines]


def best_of(tried: list[Tried]) -> Tried:
    """By steps to the lowest target, else by the last loss."""
    return min(tried, key=_rank)


def _rank(t: Tried) -> tuple[bool, float]:
    steps = t.steps_to_target[-1]
    if math.isfinite(steps):
        return (False, float(steps))
    return (True, math.inf if t.result.test_loss is None else t.result.test_loss)


def _next_index(tried: dict[int, Tried], most: int) -> int | None:
    best = best_of(list(tried.values())).rate_index
    if len(tried) >= most:
        return None
    return next((index for index in (best + 1, best - 1) if index not in tried), None)
