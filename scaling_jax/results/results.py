"""A results folder, read once: runs, curves, measurements, noise scales, and the fit of a scan."""

import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scaling_jax.errors import UserError
from scaling_jax.fitting import ScanFit, fit_scan
from scaling_jax.io.stores import working_copy
from scaling_jax.results.branches import BranchMeasurement, read_branches
from scaling_jax.results.measurements import (
    Measurement,
    NoiseMeasurement,
    SeedSpread,
    columns,
    measure,
    measure_noise,
    measure_spread,
)
from scaling_jax.results.runs import CellRuns, RunRecord, cell_runs, read_runs
from scaling_jax.scanning import Cell, Experiment
from scaling_jax.scanning.cells import finished_runs
from scaling_jax.scanning.records import read_experiment
from scaling_jax.scanning.search import Outcome
from scaling_jax.training import Run


class Curve(NamedTuple):
    """A run's evaluations: steps and losses [evaluations], nats per token."""

    steps: np.ndarray
    losses: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """What a folder holds. What is asked of it is computed from memory; nothing is read again."""

    folder: Path
    experiment: Experiment | None  # None in a folder of single runs
    runs: tuple[RunRecord, ...]
    branches: tuple[BranchMeasurement, ...] = ()

    @functools.cached_property
    def curves(self) -> dict[str, Curve]:
        """By run id."""
        return {r.run_id: Curve(r.course.eval_steps, r.course.eval_losses) for r in self.runs}

    @functools.cached_property
    def cells(self) -> list[CellRuns]:
        """The scan's cells, in the order of its experiment.

        Raises:
          UserError: if the folder holds no scan, or an unfinished one.
        """
        experiment = self.scan
        found = cell_runs(experiment, self.runs)
        for cell in experiment.cells:
            if cell not in found or finished_runs(experiment, cell, self.folder, self._outcome) is None:
                raise UserError(
                    f"{self.folder} isn't complete ({cell.name} is missing): run the scan again, it continues"
                )
        return [found[cell] for cell in experiment.cells]

    @property
    def scan(self) -> Experiment:
        """The experiment; raises UserError where there is none."""
        if self.experiment is None:
            raise UserError(f"{self.folder} holds single runs and no scan: a fit takes a scan's folder, or a table")
        return self.experiment

    @functools.cached_property
    def measurements(self) -> list[Measurement]:
        """Steps to each target loss at the best learning rate; raises UserError for an unfinished scan."""
        return measure(self.cells)

    @functools.cached_property
    def noise_scale(self) -> list[NoiseMeasurement]:
        """Of each cell's best run, window by window of falling loss; raises UserError for an unfinished scan."""
        return measure_noise(self.cells)

    @functools.cached_property
    def seeds(self) -> list[SeedSpread]:
        return measure_spread(self.cells)

    def fit(self) -> ScanFit:
        """Trade-offs and their law; raises UserError for an unfinished scan."""
        return fit_scan(**columns(self.measurements))

    def find(self, run: Run) -> RunRecord | None:
        """A run by its values; None if it isn't there."""
        return self._by_run.get(run)

    @functools.cached_property
    def _by_run(self) -> dict[Run, RunRecord]:
        return {record.run: record for record in self.runs}

    def _outcome(self, run: Run) -> Outcome | None:
        record = self.find(run)
        return None if record is None or record.result is None else record.outcome


def read_results(folder: str | Path) -> Results:
    """Reads what a scan or single runs left in a folder, or in gs://bucket/folder, of this version or any before.

    Raises:
      UserError: if the folder holds neither, or naming the file that is damaged.
    """
    workdir = working_copy(folder)
    experiment = read_experiment(workdir) if (workdir / "experiment.json").exists() else None
    runs = read_runs(workdir)
    if experiment is None and not runs:
        raise UserError(f"{folder} holds no results: give the folder that `scan`, `demo` or `train` wrote")
    return Results(workdir, experiment, runs, tuple(read_branches(workdir)))


def missing_cells(results: Results) -> list[Cell]:
    """Cells of a scan whose search hasn't ended."""
    experiment = results.scan
    return [c for c in experiment.cells if finished_runs(experiment, c, results.folder, results._outcome) is None]
