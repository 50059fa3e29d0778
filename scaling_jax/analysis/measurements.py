"""Steps to each target loss at the best learning rate, for each model and batch size: measurements.csv."""

import math
from pathlib import Path
from typing import NamedTuple

from scaling_jax.errors import UserError
from scaling_jax.scanning import Experiment, Group
from scaling_jax.scanning.search import Tried, best_at, finished, is_tuned


class Measurement(NamedTuple):
    """One model, batch size, seed and target loss."""

    model: str
    batch_tokens: int
    seed: int
    target_loss: float  # nats per token
    steps: float  # NaN: no learning rate got there within `steps_tried`
    tokens: float
    learning_rate: float  # of the run that got there first; NaN if none did
    tuned: bool  # False: a better rate may lie beyond the grid
    steps_tried: int  # the longest run
    passed_early: bool = False  # some rate was below the target when first evaluated: its steps are unknown


def measure(experiment: Experiment, workdir: Path) -> list[Measurement]:
    """Every measurement of a finished scan, in the order of its groups.

    Raises:
      UserError: if runs are missing.
    """
    return [row for group in experiment.groups for row in _measure_group(group, tried_runs(experiment, group, workdir))]


def tried_runs(experiment: Experiment, group: Group, workdir: Path) -> list[Tried]:
    """The group's runs, from disk.

    Raises:
      UserError: if some are missing.
    """
    tried = finished(experiment, group, workdir)
    if tried is None:
        raise UserError(f"{workdir} isn't complete ({group.name} is missing): run the scan again, it continues")
    return tried


def _measure_group(group: Group, tried: list[Tried]) -> list[Measurement]:
    targets = group.subject.target_losses
    rows = []
    for k, target in enumerate(targets):
        best = None if any(t.passed_early[k] for t in tried) else best_at(tried, k)
        steps = float(best.steps_to_target[k]) if best else math.nan
        rows.append(
            Measurement(
                model=group.subject.model.name,
                batch_tokens=group.batch_tokens,
                seed=group.seed,
                target_loss=target,
                steps=steps,
                tokens=steps * group.batch_tokens,
                learning_rate=best.run.learning_rate if best else math.nan,
                tuned=is_tuned(tried, k),
                steps_tried=max(t.result.steps for t in tried),
                passed_early=any(bool(t.passed_early[k]) for t in tried),
            )
        )
    return rows
