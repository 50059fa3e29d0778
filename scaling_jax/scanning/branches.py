"""Branches of one run at larger batch sizes: they measure the critical batch size along the run.

Merrill et al. 2025, "Critical Batch Size Revisited" (arXiv 2505.23971). A branch starts from a state of the run, and
trains for a fixed number of tokens with k times the batch size and √k times the learning rate (k times for SGD). The
critical batch size at that state is the largest batch size whose loss is then at most a tolerance above the run's loss.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaling_jax.data import prepare
from scaling_jax.io import UserError
from scaling_jax.scanning.search import Tried
from scaling_jax.training import Progress, Run, RunResult, Stage, train

EVALUATIONS = 8  # per branch, evenly spaced in tokens


@dataclasses.dataclass(frozen=True)
class BranchPlan:
    """The branches of a run with constant batch size. All branches train on the same number of tokens."""

    run: Run
    at_tokens: tuple[int, ...]  # where branches start; rounded to whole steps of the largest batch
    factors: tuple[int, ...] = (2, 4, 8, 16)  # times the run's batch size
    branch_steps: int = 16  # steps of the branch with the largest batch; the others take more

    def __post_init__(self):
        if not self.factors or list(self.factors) != sorted(set(self.factors)) or self.factors[0] < 2:
            raise UserError(f"factors = {self.factors} must increase, and start at 2 or more")
        if self.branch_steps % EVALUATIONS:
            raise UserError(f"branch_steps = {self.branch_steps} must be a multiple of {EVALUATIONS}")
        if not self.at_tokens or self.run.ramp or self.run.live_ramp:
            raise UserError("branches need one or more points to start at, of a run without a ramp")

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
        """The run itself, up to the end of the last branch. It keeps its state at every point."""
        return dataclasses.replace(
            self._evaluated, snapshot_tokens=self.points, max_tokens=self.points[-1] + self.branch_tokens
        )

    def branch(self, point: int, factor: int) -> Run:
        """The branch that starts at `point` tokens, with `factor` times the batch size."""
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
    plans: Sequence[BranchPlan],
    workdir: Path,
    *,
    on_progress: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Trains the missing branches of each plan.

    Raises:
      UserError, Interrupted: see `train`.
    """
    for plan in plans:
        corpus = prepare(plan.run.text, plan.run.model.context, plan.run.tokenizer)

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


def run_branches(plan: BranchPlan, train: Callable[[Run, Run | None], RunResult]) -> None:
    """Trains the trunk, then every branch from a state of the trunk.

    Args:
      train: `(run, branch_of) -> result`; see `training.train`.
    """
    train(plan.trunk, None)
    for point in plan.points:
        for factor in plan.factors:
            train(plan.branch(point, factor), plan.trunk)


def plan_branches(best: Tried, most_points: int = 8, **options: Any) -> BranchPlan:
    """A plan of branches of a cell's best run, which start where the run reached target losses.

    Args:
      most_points: largest number of target losses; they are spread over all that the run reached.
      options: further fields of `BranchPlan`.

    Raises:
      UserError: if the run reached no target.
    """
    if most_points < 1:
        raise UserError(f"points = {most_points} must be at least 1")
    reached = best.steps_to_target[np.isfinite(best.steps_to_target)]
    if not len(reached):
        raise UserError(
            f"{best.result.run_id} reached no target loss, so branches can't start: choose another batch size"
        )
    chosen = np.unique(np.linspace(0, len(reached) - 1, most_points).round().astype(int))
    return BranchPlan(best.run, tuple(int(n * best.run.batch_tokens) for n in reached[chosen]), **options)
