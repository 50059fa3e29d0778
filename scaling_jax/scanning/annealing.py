"""Annealed losses of one run at many horizons: short decays to zero branch off a trunk with a constant learning rate.

A trunk up to the last part of a horizon, and a decay from there, are step by step the run that was made for this
horizon with `Schedule("wsd", …)` (Hu et al. 2024, arXiv 2404.06395; Hägele et al. 2024, arXiv 2405.18392). So one trunk
gives the loss of a decayed run at each horizon, for the price of the decays.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from scaling_jax.io import UserError
from scaling_jax.training import Progress, Run, RunResult, Schedule, run_folder, train
from scaling_jax.training.examples import Data
from scaling_jax.training.records import DamagedRecords, whole_result
from scaling_jax.training.schedules import DecayForm


class AnnealedLoss(NamedTuple):
    """A row of a table for `fit_budget` and `scaling-jax fit`: the last loss of a run that decayed at its end."""

    model: str
    batch_tokens: int
    tokens: int  # the horizon
    loss: float
    learning_rate: float  # before the decay
    seed: int


@dataclasses.dataclass(frozen=True)
class AnnealingPlan:
    """The decays of a run with a constant learning rate, one for each horizon.

    With a `decay_share` of 0.1 and horizons in factors of √2, the decays take a third of the tokens of the longest
    horizon, and the trunk nine tenths: together 1.24 times as many tokens as the longest run alone.
    """

    run: Run
    horizons: tuple[int, ...]  # tokens at which decays end; rounded to whole steps
    decay_share: float = 0.1
    decay_form: DecayForm = "linear"

    def __post_init__(self):
        if self.run.ramp or self.run.live_ramp or self.run.skip or self.run.schedule:
            raise UserError("decays branch off a run with a constant batch size and learning rate, without a skip")
        if not self.horizons or list(self.horizons) != sorted(set(self.horizons)):
            raise UserError(f"horizons = {self.horizons} must be one or more numbers of tokens that increase")
        steps = self.horizons[0] // self.run.batch_tokens
        if steps * self.decay_share < 2:
            raise UserError(
                f"a decay over {self.decay_share:g} of {self.horizons[0]:,} tokens is less than two steps of "
                f"{self.run.batch_tokens:,} tokens: use longer horizons or smaller batches"
            )

    @property
    def trunk(self) -> Run:
        """The run itself, up to the start of the last decay. It keeps its state where decays start."""
        points = tuple(sorted({self._start(run) for run in self.annealed}))
        return dataclasses.replace(self._unlimited, snapshot_tokens=points, max_steps=None, max_tokens=points[-1])

    @property
    def annealed(self) -> tuple[Run, ...]:
        """The run for each horizon."""
        return tuple(
            dataclasses.replace(self._unlimited, schedule=schedule, max_steps=None, max_tokens=schedule.horizon_tokens)
            for schedule in map(self._schedule, self.horizons)
        )

    @property
    def num_tokens(self) -> int:
        """Tokens that the trunk and all decays train on."""
        assert self.trunk.max_tokens is not None
        decays = (run.max_tokens - self._start(run) for run in self.annealed if run.max_tokens is not None)
        return self.trunk.max_tokens + sum(decays)

    def _schedule(self, horizon: int) -> Schedule:
        batch_tokens = self.run.batch_tokens
        return Schedule("wsd", round(horizon / batch_tokens) * batch_tokens, self.decay_share, self.decay_form)

    def _start(self, run: Run) -> int:
        """Tokens of the last whole step before the decay."""
        return run.parted_at // run.batch_tokens * run.batch_tokens

    @property
    def _unlimited(self) -> Run:
        return dataclasses.replace(self.run, target_loss=None, deadlines=())


def log_horizons(first: int, last: int, per_doubling: int = 2, *, largest_batch: int = 1) -> tuple[int, ...]:
    """Horizons from `first` up to `last` tokens, so many for each doubling.

    Args:
      largest_batch: in tokens. Horizons are whole numbers of it, so that all batch sizes have the same ones.
    """
    count = math.floor(per_doubling * math.log2(last / first) + 1e-9)
    steps = (round(first * 2 ** (k / per_doubling) / largest_batch) for k in range(count + 1))
    return tuple(dict.fromkeys(max(1, n) * largest_batch for n in steps))


def train_annealed(
    plan: AnnealingPlan,
    workdir: Path,
    *,
    corpus: Data | None = None,
    num_devices: int | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> list[AnnealedLoss]:
    """Trains the trunk and its decays, unless they are done, and returns the loss at each horizon.

    Horizons at which the loss isn't finite are left out. If the trunk diverges, there are none.

    Raises:
      UserError, Interrupted: see `train`.
    """

    def train_one(run: Run, branch_of: Run | None) -> RunResult:
        return train(
            run,
            workdir,
            corpus=corpus,
            num_devices=num_devices,
            branch_of=branch_of,
            keep_checkpoint=False,
            on_progress=on_progress,
            should_stop=should_stop,
        )

    if train_one(plan.trunk, None).status == "diverged":
        return []
    return _annealed(plan, [train_one(run, plan.trunk) for run in plan.annealed])


def finished_losses(plan: AnnealingPlan, workdir: Path) -> list[AnnealedLoss] | None:
    """What `train_annealed` would return without training; None if some of its runs aren't done, or are damaged."""
    trunk = _finished(run_folder(workdir, plan.trunk))
    if trunk is None or trunk.status == "diverged":
        return None if trunk is None else []
    results = [_finished(run_folder(workdir, run)) for run in plan.annealed]
    done = [result for result in results if result is not None]
    return _annealed(plan, done) if len(done) == len(results) else None


def _finished(folder: Path) -> RunResult | None:
    try:
        return whole_result(folder)
    except DamagedRecords:  # `train` says so and trains it again
        return None


def _annealed(plan: AnnealingPlan, results: list[RunResult]) -> list[AnnealedLoss]:
    return [
        AnnealedLoss(run.model.name, run.batch_tokens, result.tokens, result.test_loss, run.learning_rate, run.seed)
        for run, result in zip(plan.annealed, results, strict=True)
        if result.test_loss is not None and result.status == "exhausted"
    ]
