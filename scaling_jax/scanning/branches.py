"""Branches of one run at larger batch sizes, which measure the critical batch size along it (Merrill et al. 2025).

Merrill et al., "Critical Batch Size Revisited", arXiv 2505.23971: from a state of the run, branches go on at k times
its batch size and √k times its learning rate (k times for SGD) for a fixed number of tokens. The critical batch size
there is the largest whose loss then is no more than a tolerance above the run's own.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaling_jax.data import prepare
from scaling_jax.errors import UserError
from scaling_jax.scanning.experiment import Experiment, Group
from scaling_jax.scanning.search import best_of, finished
from scaling_jax.training import Progress, Run, RunResult, Stage, train

EVALUATIONS = 8  # of each branch, evenly spaced in tokens


@dataclasses.dataclass(frozen=True)
class BranchPlan:
    """Where a run of constant batch size branches, and how far.

    Every branch takes `branch_steps` steps at the largest factor, and more at smaller ones: all see the same tokens.
    """

    run: Run
    at_tokens: tuple[int, ...]  # rounded to whole steps of the largest batch
    factors: tuple[int, ...] = (2, 4, 8, 16)  # of the run's batch size
    branch_steps: int = 16  # of the largest batch

    def __post_init__(self):
        if not self.factors or list(self.factors) != sorted(set(self.factors)) or self.factors[0] < 2:
            raise UserError(f"factors = {self.factors} must grow from 2 or more")
        if self.branch_steps % EVALUATIONS:
            raise UserError(f"branch_steps = {self.branch_steps} must be a multiple of {EVALUATIONS}")
        if not self.at_tokens or self.run.ramp or self.run.live_ramp:
            raise UserError("branches start at one or more points of a run of constant batch size")

    @property
    def largest_batch_tokens(self) -> int:
        return self.run.batch_tokens * self.factors[-1]

    @property
    def branch_tokens(self) -> int:
        return self.branch_steps * self.largest_batch_tokens

    @property
    def points(self) -> tuple[int, ...]:
        """Tokens at which branches start."""
        largest = self.largest_batch_tokens
        return tuple(sorted({max(1, round(tokens / largest)) * largest for tokens in self.at_tokens}))

    @property
    def trunk(self) -> Run:
        """The run itself, with a state kept at every point, to the end of the last branch."""
        return dataclasses.replace(
            self._evaluated, snapshot_tokens=self.points, max_tokens=self.points[-1] + self.branch_tokens
        )

    def branch(self, point: int, factor: int) -> Run:
        """The branch at `point` tokens with `factor` times the batch size."""
        growth = factor if self.run.optimizer.name == "sgd" else factor**0.5
        stage = Stage(point, factor * self.run.batch_tokens, growth)
        return dataclasses.replace(self._evaluated, ramp=(stage,), max_tokens=point + self.branch_tokens)

    @property
    def _evaluated(self) -> Run:
        return dataclasses.replace(
            self.run,
            target_loss=None,
            deadlines=(),
            max_steps=None,
            max_tokens=self.branch_tokens,
            eval_every_tokens=self.branch_tokens // EVALUATIONS,
        )


def train_branches(
    experiment: Experiment,
    workdir: Path,
    models: Sequence[str],
    batch_tokens: int,
    *,
    on_progress: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
    **options: Any,
) -> list[BranchPlan]:
    """Trains branches of each model's best runs of one batch size in a finished scan; those there already are kept.

    Args:
      batch_tokens: of the runs that are branched; well below B_crit.
      options: see `plan_branches`.

    Raises:
      UserError: if the scan isn't finished, or has no such model or batch size.
      Interrupted: see `train`.
    """
    plans = []
    for model in models:
        groups = [g for g in experiment.groups if (g.subject.model.name, g.batch_tokens) == (model, batch_tokens)]
        if not groups:
            raise UserError(f"{workdir} has no runs of {model} at {batch_tokens:,} tokens")
        plans += [plan_branches(experiment, group, workdir, **options) for group in groups]
    for plan in plans:
        corpus = prepare(experiment.text, plan.run.model.context, experiment.tokenizer)

        def train_one(run: Run, branch_of: Run | None, corpus=corpus):
            return train(
                run,
                workdir,
                corpus=corpus,
                branch_of=branch_of,
                keep_checkpoint=False,
                on_progress=on_progress,
                should_stop=should_stop,
            )

        run_branches(plan, train_one)
    return plans


def run_branches(plan: BranchPlan, train: Callable[[Run, Run | None], RunResult]) -> None:
    """Trains the trunk, then every branch from the trunk's states.

    Args:
      train: `(run, branch_of) -> result`; see `training.train`.
    """
    train(plan.trunk, None)
    for point in plan.points:
        for factor in plan.factors:
            train(plan.branch(point, factor), plan.trunk)


def plan_branches(
    experiment: Experiment, group: Group, workdir: Path, most_points: int = 8, **options: Any
) -> BranchPlan:
    """Branches of a group's best run, at target losses that it passed.

    Args:
      workdir: holds the finished scan.
      most_points: target losses at most, spread over all that were reached.
      options: of `BranchPlan`.

    Raises:
      UserError: if the group isn't finished, or its best run reached no target.
    """
    if most_points < 1:
        raise UserError(f"points = {most_points} must be positive")
    tried = finished(experiment, group, workdir)
    if tried is None:
        raise UserError(f"{workdir} isn't complete ({group.name} is missing): run the scan again, it continues")
    best = best_of(tried)
    reached = best.steps_to_target[np.isfinite(best.steps_to_target)]
    if not len(reached):
        raise UserError(f"{group.name}: no run reached a target loss, so there is nothing to branch at")
    chosen = np.unique(np.linspace(0, len(reached) - 1, most_points).round().astype(int))
    return BranchPlan(best.run, tuple(int(n * group.batch_tokens) for n in reached[chosen]), **options)
