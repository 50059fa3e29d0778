"""Branches of one run at larger batch sizes: they measure the critical batch size along the run.

Merrill et al. 2025, "Critical Batch Size Revisited" (arXiv 2505.23971). A branch starts from a state of the run, and
trains for a fixed number of tokens with k times the batch size and √k times the learning rate (k times for SGD). The
critical batch size at that state is the largest batch size whose loss is then at most a tolerance above the run's loss.

Every branch has replicates, which start from the same state and read other text. So has the run itself from that state
on: replicate r of a branch is compared with replicate r of the run, which reads the same text.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from scaling_jax.io import UserError
from scaling_jax.scanning.tried import Tried
from scaling_jax.training import Progress, Run, RunResult, Skip, Stage, train
from scaling_jax.training.examples import data_of
from scaling_jax.training.run import BETAS, Betas

EVALUATIONS = 8  # per branch, evenly spaced in tokens


@dataclasses.dataclass(frozen=True)
class BranchPlan:
    """The branches of a run with constant batch size. All branches train on the same number of tokens.

    `betas` says what becomes of Adam's β at k times the batch. "run" keeps the β of the run, so a branch differs from
    the run by batch size and learning rate alone. "half-life" takes β^k, which keeps half-lives in tokens (Malladi et
    al. 2022, arXiv 2205.10287; Marek et al. 2025, arXiv 2507.07101); at k = 32, 0.9 becomes 0.03.
    """

    run: Run
    at_tokens: tuple[
        int, ...
    ]  # where branches start; rounded so that run and branches are evaluated at the same tokens
    factors: tuple[int, ...] = (2, 4, 8, 16)  # times the run's batch size
    branch_steps: int = 16  # fewest steps of the branch with the largest batch; the others take more
    replicates: int = 4  # of each branch, and of the run from each point on
    betas: Betas = "run"

    def __post_init__(self):
        if not self.factors or list(self.factors) != sorted(set(self.factors)) or self.factors[0] < 2:
            raise UserError(f"factors = {self.factors} must increase, and start at 2 or more")
        if self.branch_steps < 1 or self.branch_steps % EVALUATIONS:
            raise UserError(f"branch_steps = {self.branch_steps} must be a multiple of {EVALUATIONS}")
        if not 2 <= self.replicates <= 1_000:
            raise UserError(
                f"replicates = {self.replicates} must be 2 or more, up to 1,000: one replicate gives no interval"
            )
        if self.betas not in BETAS:
            raise UserError(f"betas = {self.betas!r}: choose from {', '.join(BETAS)}")
        if not self.at_tokens or self.run.ramp or self.run.live_ramp or self.run.skip:
            raise UserError("branches need one or more points to start at, of a run without a ramp or a skip")

    @property
    def eval_tokens(self) -> int:
        """Tokens between evaluations: a whole number of steps of the run and of every branch."""
        together = math.lcm(*self.factors) * self.run.batch_tokens
        largest = self.factors[-1] * self.run.batch_tokens
        return math.ceil(self.branch_steps * largest / EVALUATIONS / together) * together

    @property
    def branch_tokens(self) -> int:
        return EVALUATIONS * self.eval_tokens

    @property
    def points(self) -> tuple[int, ...]:
        """Tokens at which branches start; multiples of `eval_tokens`, because runs are evaluated at those."""
        every = self.eval_tokens
        return tuple(sorted({max(1, round(tokens / every)) * every for tokens in self.at_tokens}))

    @property
    def trunk(self) -> Run:
        """The run itself, up to the end of the last branch. It keeps its state at every point."""
        return dataclasses.replace(
            self._evaluated, snapshot_tokens=self.points, max_tokens=self.points[-1] + self.branch_tokens
        )

    def continued(self, point: int, replicate: int) -> Run:
        """A replicate of the run itself from `point` tokens on. Replicate 0 is the trunk."""
        if replicate == 0:
            return self.trunk
        return dataclasses.replace(
            self._evaluated, skip=self._skip(point, replicate), max_tokens=point + self.branch_tokens
        )

    def branch(self, point: int, factor: int, replicate: int) -> Run:
        """A replicate of the branch that starts at `point` tokens, with `factor` times the batch size."""
        growth = factor if self.run.optimizer.name in ("sgd", "optax:sgd") else factor**0.5
        stage = Stage(point, factor * self.run.batch_tokens, growth)
        return dataclasses.replace(
            self._evaluated,
            ramp=(stage,),
            betas=self.betas,
            skip=self._skip(point, replicate),
            max_tokens=point + self.branch_tokens,
        )

    @property
    def num_runs(self) -> int:
        """All runs of the plan: the trunk, its replicates and the branches."""
        return len(self.points) * (self.replicates * (1 + len(self.factors)) - 1) + 1

    @property
    def num_tokens(self) -> int:
        """Tokens that all runs of the plan train on."""
        assert self.trunk.max_tokens is not None
        return self.trunk.max_tokens + (self.num_runs - 1) * self.branch_tokens

    def _skip(self, point: int, replicate: int) -> Skip | None:
        """Replicate r reads the r-th stretch of text from the point on, so replicates share no text in an epoch."""
        return Skip(point, replicate * self.branch_tokens) if replicate else None

    @property
    def _evaluated(self) -> Run:
        return dataclasses.replace(
            self.run,
            target_loss=None,
            deadlines=(),
            max_steps=None,
            max_tokens=self.branch_tokens,
            eval_every_tokens=self.eval_tokens,
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
        corpus = data_of(plan.run)

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
    """Trains the trunk, then every replicate of it and of every branch from a state of the trunk.

    Args:
      train: `(run, branch_of) -> result`; see `training.train`.
    """
    train(plan.trunk, None)
    for point in plan.points:
        for replicate in range(plan.replicates):
            if replicate:
                train(plan.continued(point, replicate), plan.trunk)
            for factor in plan.factors:
                train(plan.branch(point, factor, replicate), plan.trunk)


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
    count = min(most_points, len(reached))
    chosen = np.unique(np.linspace(0, len(reached) - 1, count).round().astype(int))
    return BranchPlan(best.run, tuple(int(n * best.run.batch_tokens) for n in reached[chosen]), **options)
