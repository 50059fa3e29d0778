"""Ask and tell: a scan whose runs any trainer makes. The search proposes settings, the caller tells loss curves.

All decisions follow from the finished runs in the folder, as those of `scan` do. So workers on any number of machines
may share a folder, and a worker that dies loses only the run that it was training.
"""

import contextlib
import dataclasses
import hashlib
import math
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from scaling_jax.io import UserError
from scaling_jax.io.files import refuse_links
from scaling_jax.io.locks import InUse, locked
from scaling_jax.scanning.cells import find_outcome, finished_runs, guides
from scaling_jax.scanning.experiment import Cell, Experiment
from scaling_jax.scanning.records import check_same_recipe, write_experiment, write_search
from scaling_jax.scanning.search import in_order, next_wave
from scaling_jax.scanning.tried import Tried, look_at
from scaling_jax.tasks import OtherModel
from scaling_jax.training.integrity import LinesHash
from scaling_jax.training.journal import ending
from scaling_jax.training.metrics import MetricsLine, SquaredNorms, jsonable
from scaling_jax.training.records import (
    RunResult,
    Status,
    records_to_disk,
    run_folder,
    with_checksum,
    write_metrics,
    write_result,
    write_run_config,
)
from scaling_jax.training.run import Run

Ended = Literal["ended", "diverged"]
_POLL_SECONDS = (0.05, 2.0)  # first and longest wait between looks for a free setting


@dataclasses.dataclass(frozen=True)
class Setting:
    """A run to train: `batch` examples (or tokens, …) a step, at a constant learning rate, with no warm-up."""

    subject: str  # name of the model
    batch: int  # in the model's unit
    learning_rate: float
    seed: int
    max_steps: int
    target_loss: float  # the run may end once it was below at two evaluations in a row
    run: Run = dataclasses.field(repr=False)

    @property
    def name(self) -> str:
        """A name for files, the same whenever this setting is asked for."""
        return self.run.run_id


class _Claim(NamedTuple):
    """A setting that is out: its lock, and the lock's descriptor."""

    lock: contextlib.ExitStack
    descriptor: int | None


class Study:
    """Asks for settings to train and takes their loss curves, until every batch size has its best learning rate.

    Several threads, processes and machines may each have a `Study` of the same folder. A setting that one of them asked
    for is given to no other, as long as its process lives.

    Args:
      experiment: with `OtherModel`s as models; its `text` names the data, in your words.
      folder: for the results, on a file system with locks. `analyse`, `write_report` and the command line read it.

    Raises:
      UserError: if the folder holds another experiment, or a model isn't an `OtherModel`.
    """

    def __init__(self, experiment: Experiment, folder: str | Path):
        for subject in experiment.subjects:
            if not isinstance(subject.model, OtherModel):
                raise UserError(
                    f"{subject.model.name} is a model of this package: train it with scan(), or describe yours as "
                    "OtherModel(name, num_params)"
                )
        self.experiment, self.folder = experiment, Path(folder)
        refuse_links(*(self.folder / name for name in ("cells", "logs", "runs")))
        with locked(self.folder / ".lock", str(folder), wait=True, insist=True):
            check_same_recipe(self.folder, experiment)
            write_experiment(self.folder, experiment)
        self._corpus = {"source": experiment.text, "sha256": hashlib.sha256(experiment.text.encode()).hexdigest()}
        self._tried: dict[Cell, dict[int, Tried]] = {cell: {} for cell in in_order(experiment, experiment.cells)}
        self._claims: dict[str, _Claim] = {}
        self._curves: dict[str, list[MetricsLine]] = {}
        self._one_at_a_time = threading.RLock()

    def ask(self, wait: bool = True) -> Setting | None:
        """The next setting to train; None if the study is done.

        Args:
          wait: if all settings that could be trained now are being trained by others, wait until the next is known;
            else return None. `done` tells which it was.

        Raises:
          UserError: if the records of a finished run are damaged.
        """
        pause = _POLL_SECONDS[0]
        while True:
            with self._one_at_a_time:
                wanted = self._wanted()
                for run in wanted:
                    if self._claim(run):
                        return _setting(run)
            if not wanted or not wait:
                return None
            time.sleep(pause)
            pause = min(2 * pause, _POLL_SECONDS[1])

    @property
    def done(self) -> bool:
        """True if every batch size has its best learning rate."""
        with self._one_at_a_time:
            return not self._wanted()

    def should_stop(self, setting: Setting, step: int, loss: float) -> bool:
        """True if the run needs no more steps: it reached its target, can't be the best any more, or diverged.

        Args:
          step: steps taken; more than at the call before.
          loss: held-out loss there.
        """
        lines = self._curves.setdefault(setting.name, [])
        lines.append(_line(setting, lines[-1].step if lines else 0, step, loss))
        return _ended(setting, lines)

    def tell(
        self,
        setting: Setting,
        steps: Sequence[int],
        losses: Sequence[float],
        status: Ended = "ended",
        *,
        norms: Sequence[SquaredNorms | None] | None = None,
    ) -> None:
        """Records the loss curve of a run that has ended.

        Args:
          setting: from this study's `ask`.
          steps: steps taken at each evaluation, rising.
          losses: held-out losses there; one that isn't finite ends the curve, as diverged.
          status: "diverged" if the trainer knows that the run did.
          norms: squared norms of gradients at each evaluation, or None where there are none; for the noise scale.

        Raises:
          UserError: if the curve is empty or can't be one, or the setting isn't out from this study.
        """
        if status not in get_args(Ended):
            raise UserError(f"status = {status!r}: choose from {', '.join(get_args(Ended))}")
        lines = _lines(setting, steps, losses, norms)
        with self._one_at_a_time:
            claim = self._claims.pop(setting.name, None)
            if claim is None:
                raise UserError(f"{setting.name} isn't out: ask() for a setting, and tell each one once")
            with claim.lock:
                _write_run(setting, self._folder(setting), lines, _status(setting, lines, status), self._corpus)
            self._curves.pop(setting.name, None)

    def give_back(self, setting: Setting) -> None:
        """Ends a setting's training without a curve. It will be asked for again."""
        with self._one_at_a_time:
            self._curves.pop(setting.name, None)
            if (claim := self._claims.pop(setting.name, None)) is not None:
                claim.lock.close()

    def give_all_back(self) -> None:
        """`give_back` for every setting that is out from this study."""
        with self._one_at_a_time:
            for claim in self._claims.values():
                claim.lock.close()
            self._claims.clear()
            self._curves.clear()

    def lock_of(self, setting: Setting) -> int | None:
        """The descriptor of a setting's lock. A child process that inherits it holds the lock too."""
        return self._claims[setting.name].descriptor

    @property
    def wanted(self) -> set[str]:
        """Names of the settings that are to be trained now, by this study or others."""
        with self._one_at_a_time:
            return {run.run_id for run in self._wanted()}

    @property
    def cells_left(self) -> tuple[Cell, ...]:
        """The cells whose search hasn't ended."""
        with self._one_at_a_time:
            self._wanted()
            return tuple(self._tried)

    def _folder(self, setting: Setting) -> Path:
        return run_folder(self.folder, setting.run)

    def _wanted(self) -> list[Run]:
        """The runs that the searches want now, without those that are done; [] once all searches have ended."""
        wanted = []
        for cell in list(self._tried):
            if any(inner in self._tried for inner in self.experiment.inner(cell)):
                continue  # their searches come first
            runs = self._missing(cell)
            if not runs:
                del self._tried[cell]  # its search has ended
            wanted += runs
        return wanted

    def _missing(self, cell: Cell) -> list[Run]:
        tried, targets = self._tried[cell], self.experiment.subject(cell.model).target_losses
        if not tried and finished_runs(self.experiment, cell, self.folder) is not None:
            return []
        inner = guides(self.experiment, cell, self.folder)
        while wave := next_wave(self.experiment, cell, tried, inner):
            found = {index: find_outcome(run, self.folder) for index, run in wave.items()}
            if missing := [run for index, run in wave.items() if found[index] is None]:
                return missing
            tried.update({index: look_at(targets, outcome) for index, outcome in found.items() if outcome is not None})
        write_search(self.folder, self.experiment, cell, [t.result.run_id for t in tried.values()])
        return []

    def _claim(self, run: Run) -> bool:
        """Takes the run's lock; False if somebody trains it, or has just told it."""
        stack = contextlib.ExitStack()
        path = self.folder / "logs" / f"{run.run_id}.lock"
        try:
            descriptor = stack.enter_context(locked(path, run.run_id, seconds=0, insist=True))
        except InUse:
            return False
        if find_outcome(run, self.folder) is not None:
            stack.close()
            return False
        self._claims[run.run_id] = _Claim(stack, descriptor)
        return True


def _setting(run: Run) -> Setting:
    assert run.target_loss is not None
    return Setting(
        subject=run.model.name,
        batch=run.batch_tokens,
        learning_rate=run.learning_rate,
        seed=run.seed,
        max_steps=run.steps_left(0, 0, run.batch_tokens),
        target_loss=run.target_loss,
        run=run,
    )


def _line(setting: Setting, before: int, step: int, loss: float, norms: SquaredNorms | None = None) -> MetricsLine:
    if isinstance(step, bool) or step != int(step) or step <= before:
        raise UserError(f"{setting.name}: step {step} must be a whole number above the one before, {before}")
    if math.isfinite(loss) and not loss > 0:
        raise UserError(f"{setting.name}: loss {loss} at step {step} must be positive")
    if norms is not None:
        norms = SquaredNorms(*norms)
        if not 0 < norms.small_batch < setting.batch or int(norms.small_batch) != norms.small_batch:
            raise UserError(
                f"{setting.name}: small_batch = {norms.small_batch} at step {step} must be a whole number from 1 to "
                f"{setting.batch - 1}, below the batch"
            )
        if not all(0 <= x < math.inf for x in norms[1:]):
            raise UserError(f"{setting.name}: squared norms at step {step} must be finite, and 0 or more")
        small, *values = norms
        norms = SquaredNorms(int(small), *(float(f"{x:.8g}") for x in values))
    rounded = jsonable(float(loss))
    return MetricsLine.told(before, int(step), setting.batch, math.nan if rounded is None else rounded, norms)


def _lines(
    setting: Setting,
    steps: Sequence[int],
    losses: Sequence[float],
    norms: Sequence[SquaredNorms | None] | None = None,
) -> list[MetricsLine]:
    """The lines of a curve, up to the first loss that isn't finite."""
    if len(steps) != len(losses) or not len(steps):
        raise UserError(
            f"{setting.name}: tell one loss for each of one or more steps, not {len(losses)} for {len(steps)}"
        )
    norms = [None] * len(steps) if norms is None else norms
    if len(norms) != len(steps):
        raise UserError(f"{setting.name}: tell norms or None for each of {len(steps)} steps, not {len(norms)}")
    lines: list[MetricsLine] = []
    for step, loss, here in zip(steps, losses, norms, strict=True):
        lines.append(_line(setting, lines[-1].step if lines else 0, step, float(loss), here))
        if math.isnan(lines[-1].test_loss):
            break
    return lines


def evaluations_needed(setting: Setting, steps: Sequence[int], losses: Sequence[float]) -> int | None:
    """The number of evaluations after which a run with this curve needs no more steps; None if it needs more."""
    lines = _lines(setting, steps, losses)
    return next((k for k in range(1, len(lines) + 1) if _ended(setting, lines[:k])), None)


def _ended(setting: Setting, lines: Sequence[MetricsLine]) -> bool:
    return ending(setting.run, lines[-2:]) is not None


def _status(setting: Setting, lines: Sequence[MetricsLine], said: Ended) -> Status:
    if said == "diverged" or math.isnan(lines[-1].test_loss):
        return "diverged"
    ends = {ending(setting.run, lines[max(0, k - 2) : k]) for k in range(1, len(lines) + 1)}
    # Trainers may go on after a run's end, and end before it: then the run is exhausted.
    return "reached" if "reached" in ends else "given up" if "given up" in ends else "exhausted"


def _write_run(
    setting: Setting, folder: Path, lines: Sequence[MetricsLine], status: Status, corpus: dict[str, str]
) -> None:
    """Writes a run's records as `train` would, the result last."""
    refuse_links(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_run_config(folder, setting.run, corpus)
    write_metrics(folder, lines)
    last = lines[-1]
    loss = None if math.isnan(last.test_loss) else last.test_loss
    result = RunResult(folder.name, status, last.step, last.tokens, loss, corpus["sha256"])
    records_to_disk(folder)  # before what says that they are complete
    write_result(folder, with_checksum(result, setting.run, corpus, LinesHash(lines).digest))
