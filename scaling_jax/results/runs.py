"""Runs from their folders, each read once by what its own config.json says, and dealt to the cells of an experiment."""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scaling_jax.results.noise import NoiseWindow, PartNoise, noise_windows, part_windows
from scaling_jax.scanning import Cell, Experiment, Subject
from scaling_jax.scanning.search import Outcome, Tried, best_of, look_at
from scaling_jax.training import Run, RunResult, read_metrics, read_result
from scaling_jax.training.records import Course, course, read_run_config


@dataclasses.dataclass(frozen=True, eq=False)
class RunRecord:
    """A run as its folder holds it."""

    folder: Path
    run: Run
    corpus: dict[str, Any]  # the manifest of its text
    result: RunResult | None  # None while it isn't done
    course: Course

    @property
    def run_id(self) -> str:
        return self.folder.name

    @functools.cached_property
    def noise(self) -> list[NoiseWindow]:
        """Over the run."""
        return noise_windows(self.course)

    @functools.cached_property
    def noise_by_part(self) -> dict[str, list[PartNoise]]:
        """Of each part of the model; {} where it wasn't measured."""
        return part_windows(self.course)

    @property
    def outcome(self) -> Outcome:
        """Of a run that is done."""
        assert self.result is not None
        return Outcome(self.run, self.result, self.course.eval_steps.tolist(), self.course.eval_losses.tolist())


class CellRuns(NamedTuple):
    """One model, batch size and seed: every learning rate tried, and the best one's course."""

    cell: Cell
    subject: Subject
    tried: list[Tried]  # by learning rate
    best: Tried
    record: RunRecord  # of the best

    @property
    def model(self) -> str:
        return self.cell.model

    @property
    def batch_tokens(self) -> int:
        return self.cell.batch_tokens

    @property
    def name(self) -> str:
        return self.cell.name


def read_runs(workdir: Path) -> tuple[RunRecord, ...]:
    """Every run under `workdir/runs`, in the order of their names.

    Raises:
      UserError: naming the run that is damaged.
    """
    folders = sorted((workdir / "runs").glob("*/"))
    return tuple(_read_run(folder) for folder in folders if (folder / "config.json").exists())


def deal_by_cell(experiment: Experiment, records: Sequence[RunRecord]) -> dict[Cell, list[RunRecord]]:
    """The runs of each cell that has any, done or not, whoever made them."""
    cells = {_curve(experiment.run(cell, 0)): cell for cell in experiment.cells}
    found: dict[Cell, list[RunRecord]] = defaultdict(list)
    for record in records:
        if (cell := cells.get(_curve(record.run))) is not None:
            found[cell].append(record)
    return found


def cell_runs(experiment: Experiment, records: Sequence[RunRecord]) -> dict[Cell, CellRuns]:
    """Of each cell the runs that are done; of those that differ only in where they end the farthest."""
    return {
        cell: _cell_runs(experiment, cell, done)
        for cell, runs in deal_by_cell(experiment, records).items()
        if (done := [record for record in runs if record.result is not None])
    }


def _read_run(folder: Path) -> RunRecord:
    config, result = read_run_config(folder), read_result(folder)
    return RunRecord(folder, config.run, config.corpus, result, course(read_metrics(folder, result)))


def _curve(run: Run) -> Run:
    """What the runs of a cell share."""
    return dataclasses.replace(run.without_limits, learning_rate=1.0)


def _cell_runs(experiment: Experiment, cell: Cell, done: Sequence[RunRecord]) -> CellRuns:
    by_rate: dict[float, RunRecord] = {}
    for record in sorted(done, key=lambda record: len(record.course.batch_tokens)):
        by_rate[record.run.learning_rate] = record
    subject = experiment.subject(cell.model)
    tried = [look_at(subject.target_losses, by_rate[rate].outcome) for rate in sorted(by_rate)]
    best = best_of(tried)
    return CellRuns(cell, subject, tried, best, by_rate[best.run.learning_rate])
