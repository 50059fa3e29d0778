"""The learning-rate search of one group: hill climbing on the grid, until both neighbours of the best were tried."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from scaling_jax.config import from_dict
from scaling_jax.scan.experiment import Experiment, Group
from scaling_jax.training import Run, RunResult, read_metrics, read_result


class Tried(NamedTuple):
    """A learning rate of a group, and what came of it."""

    rate_index: int
    run: Run
    result: RunResult


def search(experiment: Experiment, group: Group, train: Callable[[Run], RunResult]) -> list[Tried]:
    """Runs the group's learning rates, in an order and to lengths that depend on results alone.

    A run that has taken as many steps as the best one needed for the lowest target can't be the best at any target any
    more, above or below, so it ends there: nothing is lost by it. Best is who reaches the lowest target first, else who
    is lowest at the end.
    """
    tried: dict[int, Tried] = {}
    index: int | None = 0
    while index is not None:
        reached = [t.result.steps for t in tried.values() if t.result.status == "reached"]
        run = experiment.run(group, index, min(reached, default=None))
        tried[index] = Tried(index, run, train(run))
        index = _next_index(tried, experiment.learning_rates.most)
    return list(tried.values())


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
        return search(experiment, group, read)
    except Missing:
        return None


def run_from_disk(folder: Path) -> Run:
    """The run that a folder of `runs/` holds."""
    return from_dict(Run, json.loads((folder / "config.json").read_text())["run"])


def evaluations(folder: Path) -> tuple[list[int], list[float]]:
    """Steps and finite test losses of a run."""
    lines = [line for line in read_metrics(folder) if line.get("test_loss") is not None]
    return [line["step"] for line in lines], [line["test_loss"] for line in lines]


def best_of(tried: list[Tried]) -> Tried:
    """By steps to the lowest target, else by the last loss."""
    return min(tried, key=_rank)


def _rank(t: Tried) -> tuple[bool, float]:
    if t.result.status == "reached":
        return (False, t.result.steps)
    lost = t.result.status == "diverged" or t.result.test_loss is None
    return (True, math.inf if lost else t.result.test_loss)  # type: ignore[return-value]


def _next_index(tried: dict[int, Tried], most: int) -> int | None:
    best = best_of(list(tried.values())).rate_index
    if len(tried) >= most:
        return None
    return next((index for index in (best + 1, best - 1) if index not in tried), None)
