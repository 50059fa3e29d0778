"""A results folder, read once: its runs, curves, measurements and noise scales; and the fits of a finished scan."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaling_jax.fitting import FormFit, JointFit, LossLaw, ScanFit, Tradeoff, fit_scan, further_fits
from scaling_jax.io import UserError
from scaling_jax.io.files import parse_json, read_whole, write_json, write_rows
from scaling_jax.io.stores import publish, working_copy
from scaling_jax.results.branches import BranchMeasurement, Comparison, compare, find_branches
from scaling_jax.results.measurements import (
    Measurement,
    NoiseMeasurement,
    SeedSpread,
    columns,
    few_steps_notes,
    measure,
    measure_noise,
    measure_spread,
    measurement_notes,
    noise_notes,
    seed_notes,
)
from scaling_jax.results.runs import CellRuns, RunRecord, cell_runs, read_runs
from scaling_jax.scanning import Cell, Experiment
from scaling_jax.scanning.cells import finished_runs
from scaling_jax.scanning.records import read_experiment
from scaling_jax.scanning.tried import Outcome
from scaling_jax.training import Run
from scaling_jax.training.integrity import file_sha256


class Curve(NamedTuple):
    """The evaluations of a run."""

    steps: np.ndarray  # [evaluations]
    losses: np.ndarray  # [evaluations], nats per token


@dataclasses.dataclass(frozen=True, eq=False)
class Results:
    """The contents of a results folder. Properties are computed when first used, without reading the files again."""

    folder: Path
    experiment: Experiment | None  # None if the folder holds single runs, not a scan
    runs: tuple[RunRecord, ...]
    branches: tuple[BranchMeasurement, ...] = ()
    notes: tuple[str, ...] = ()  # for the reader: files that weren't used as they are

    @functools.cached_property
    def curves(self) -> dict[str, Curve]:
        """{run id: its evaluations}."""
        return {r.run_id: Curve(r.course.eval_steps, r.course.eval_losses) for r in self.runs}

    @functools.cached_property
    def cells(self) -> list[CellRuns]:
        """The scan's cells, in the order of its experiment.

        Raises:
          UserError: if the folder holds no scan, or the scan isn't finished.
        """
        experiment = self.scan
        found = cell_runs(experiment, self.runs)
        for cell in experiment.cells:
            if cell not in found or finished_runs(experiment, cell, self.folder, self._outcome) is None:
                raise UserError(
                    f"{self.folder} isn't finished ({cell.name} isn't done): run the same scan again to continue it"
                )
        return [found[cell] for cell in experiment.cells]

    @property
    def scan(self) -> Experiment:
        """The experiment of the scan. Raises UserError if the folder holds no scan."""
        if self.experiment is None:
            raise UserError(f"{self.folder} holds single runs, not a scan: give the folder of a scan, or a table")
        return self.experiment

    @functools.cached_property
    def measurements(self) -> list[Measurement]:
        """Steps to each target loss at the best learning rate. Raises UserError if the scan isn't finished."""
        return measure(self.cells)

    @functools.cached_property
    def noise_scale(self) -> list[NoiseMeasurement]:
        """The noise scale of each cell's best run. Raises UserError if the scan isn't finished."""
        return measure_noise(self.cells)

    @functools.cached_property
    def seeds(self) -> list[SeedSpread]:
        """How far seeds lie apart. Raises UserError if the scan isn't finished."""
        return measure_spread(self.cells)

    def fit(self) -> ScanFit:
        """The trade-offs and their law. Raises UserError if the scan isn't finished, or measured no steps."""
        table = columns(self.measurements)
        if not table["steps"]:
            raise UserError(
                f"{self.folder}: runs were below all target losses at their first evaluation: give lower targets"
            )
        return fit_scan(**table)

    def find(self, run: Run) -> RunRecord | None:
        """The record of a run; None if the folder doesn't hold the run."""
        return self._by_run.get(run)

    @functools.cached_property
    def _by_run(self) -> dict[Run, RunRecord]:
        return {record.run: record for record in self.runs}

    def _outcome(self, run: Run) -> Outcome | None:
        record = self.find(run)
        return None if record is None or record.result is None else record.outcome


def read_results(folder: str | Path, *, on_run: Callable[[int, int], object] = lambda done, total: None) -> Results:
    """Reads the results of a scan or of single runs, written by this version or an earlier one.

    Args:
      folder: on disk, or gs://bucket/folder.
      on_run: called before each run is read, with the numbers of runs that are read and that there are.

    Raises:
      UserError: if the folder holds no results, or a file is damaged. Names the file.
    """
    workdir = working_copy(folder)
    experiment = read_experiment(workdir) if (workdir / "experiment.json").exists() else None
    runs = read_runs(workdir, on_run)
    if experiment is None and not runs:
        raise UserError(f"{folder} holds no results: give a folder that `scan`, `demo` or `train` wrote")
    branches, notes = find_branches(workdir, runs)
    return Results(workdir, experiment, runs, tuple(branches), notes)


def missing_cells(results: Results) -> list[Cell]:
    """The cells of a scan whose search hasn't ended."""
    experiment = results.scan
    return [c for c in experiment.cells if finished_runs(experiment, c, results.folder, results._outcome) is None]


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """A fitted scan: everything that figures, tables and advice need."""

    results: Results
    fit: ScanFit
    notes: tuple[str, ...]  # for the reader: losses left out or not reached, rates not tuned, intervals too narrow
    joint: JointFit | None = None
    forms: tuple[FormFit, ...] = ()
    comparison: tuple[Comparison, ...] = ()

    @property
    def experiment(self) -> Experiment:
        return self.results.scan

    @property
    def measurements(self) -> list[Measurement]:
        return self.results.measurements

    @property
    def noise(self) -> list[NoiseMeasurement]:
        return self.results.noise_scale

    @property
    def branches(self) -> tuple[BranchMeasurement, ...]:
        return self.results.branches

    @property
    def noise_ratio(self) -> float:
        """Median of (noise scale)/(local B_crit) at the same model and loss; NaN if there is none."""
        ratios = [ratio for _, ratio in noise_ratios(self.noise, self.fit)]
        return float(np.median(ratios)) if ratios else math.nan


def analyse(results: str | Path | Results) -> Analysis:
    """Fits a finished scan, and writes fit.json and the CSV files to its folder. The same runs give the same bytes.

    Args:
      results: a folder, gs://bucket/folder, or what `read_results` returned.

    Raises:
      UserError: if the folder holds no scan, or the scan isn't finished.
    """
    found = results if isinstance(results, Results) else read_results(results)
    fit = found.fit()
    sizes = {subject.model.name: subject.model.num_params for subject in found.scan.subjects}
    joint, forms = further_fits(fit, sizes)
    notes = (
        *fit.notes,
        *few_steps_notes(fit.points),
        *measurement_notes(found.measurements),
        *seed_notes(found.seeds),
        *found.notes,
    )
    analysis = Analysis(
        results=found,
        fit=fit,
        notes=notes + noise_notes(found.cells),
        joint=joint,
        forms=forms,
        comparison=tuple(compare(fit, found.noise_scale, found.branches)),
    )
    workdir = found.folder
    write_rows(workdir / "measurements.csv", Measurement, found.measurements)
    write_rows(workdir / "noise_scale.csv", NoiseMeasurement, found.noise_scale)
    if found.branches:
        write_rows(workdir / "three_measurements.csv", Comparison, analysis.comparison)
    if found.seeds:
        write_rows(workdir / "seeds.csv", SeedSpread, found.seeds)
    extra = {
        "noise_scale_over_local_b_crit": finite(analysis.noise_ratio),
        "corpus": found.runs[0].corpus,
        "measurements_sha256": file_sha256(workdir / "measurements.csv"),
    }
    write_json(workdir / "fit.json", fit_as_json(fit, analysis.joint, analysis.forms, notes) | extra)
    publish(workdir)
    return analysis


def check_measurements(workdir: Path) -> None:
    """Raises UserError if a folder's measurements.csv isn't the one that its fit.json was written with.

    A fit.json of an older version doesn't say which one that was.
    """
    try:
        said = parse_json(read_whole(workdir / "fit.json"))["measurements_sha256"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return
    if said != file_sha256(workdir / "measurements.csv"):
        raise UserError(
            f"{workdir / 'measurements.csv'} isn't as `fit` wrote it: run scaling-jax fit {workdir} to write it again, "
            "or give a copy of the table, outside of this folder"
        )


def noise_ratios(noise: list[NoiseMeasurement], fit: ScanFit) -> list[tuple[NoiseMeasurement, float]]:
    """(measurement, (noise scale)/(local B_crit)) for each measurement between windows of its model.

    Both are local. Unresolved noise scales count as infinite; without them, the median would be too small.
    """
    ratios = []
    for m in noise:
        b_crit, _, _ = fit.local_b_crit(m.model, m.loss)
        if np.isfinite(b_crit):
            ratios.append((m, float((m.b_simple if m.resolved else math.inf) / b_crit)))
    return ratios


def fit_as_json(
    fit: ScanFit, joint: JointFit | None, forms: tuple[FormFit, ...], notes: tuple[str, ...]
) -> dict[str, Any]:
    """The values of fit.json. Losses are in nats per token, batches in tokens; names and `formula` give other units."""
    return {
        "law": fit.law and _law_as_json(fit.law),
        "hyperbolas_p": finite(fit.shape_p),
        "joint_law": _law_as_json(joint.law) if joint is not None and joint.law is not None else None,
        "forms": [_form_as_json(form) for form in forms],
        "points": [
            {
                "model": p.model,
                "loss": p.loss,
                "b_crit": finite(p.b_crit),
                "b_crit_interval": [finite(x) for x in p.b_crit_interval],
                "local_b_crit": finite(p.local_b_crit),
                "local_b_crit_interval": [finite(x) for x in p.local_b_crit_interval],
                **_tradeoff_as_json(p.tradeoff),
                "in_law": p.in_law,
                "not_reached": p.not_reached,
                "bounds": p.bounds,
            }
            for p in fit.points
        ],
        "local": fit.local and _local_as_json(fit.local),
        "notes": list(notes),
    }


def _local_as_json(local: ScanFit) -> dict[str, Any]:
    return {
        "law": local.law and _law_as_json(local.law),
        "hyperbolas_p": finite(local.shape_p),
        "points": [
            {
                "model": p.model,
                "loss": p.loss,
                "b_crit": finite(p.b_crit),
                "b_crit_interval": [finite(x) for x in p.b_crit_interval],
                "a": finite(p.tradeoff.shape.a),
                "a_interval": [finite(x) for x in p.tradeoff.shape.a_interval],
                "in_law": p.in_law,
            }
            for p in local.points
        ],
    }


def finite(value: float) -> float | None:
    """The value; None for infinity and NaN."""
    return float(value) if math.isfinite(value) else None


def _law_as_json(law: LossLaw) -> dict[str, Any]:
    return {
        "formula": "b_crit_tokens = b_star * loss**exponent",
        "b_star": law.b_star,
        "b_star_interval": [finite(x) for x in law.b_star_interval],
        "alpha_b": finite(law.alpha_b),
        "exponent": law.exponent,
        "exponent_interval": [finite(x) for x in law.exponent_interval],
        "loss_range": law.loss_range,
        "confidence": law.confidence,
        "shapes": law.shapes,
        "systematic": [refit._asdict() for refit in law.systematic],
    }


def _form_as_json(form: FormFit) -> dict[str, Any]:
    return {
        "form": form.form,
        "formula": "b_crit_tokens = constant * (variable - floor)**exponent",
        "variable": form.variable,
        "constant": form.constant,
        "exponent": form.exponent,
        "exponent_interval": form.exponent_interval,
        "floors": form.floors,
        "floor": form.floor,
        "valid_range": form.valid_range,
        "held_out_error": finite(form.held_out_error),
        "low_loss_error": finite(form.low_loss_error),
        "criterion": finite(form.criterion),
    }


def _tradeoff_as_json(tradeoff: Tradeoff) -> dict[str, Any]:
    return {
        "hyperbola_b_crit": finite(tradeoff.b_crit),
        "hyperbola_b_crit_interval": [finite(x) for x in tradeoff.b_crit_interval],
        "cbs20": finite(tradeoff.cbs20),
        "s_min": finite(tradeoff.s_min),
        "e_min": finite(tradeoff.e_min),
        "one_sided": tradeoff.one_sided,
        "shape": {
            name: [finite(x) for x in value] if isinstance(value, tuple) else finite(value)
            for name, value in tradeoff.shape._asdict().items()
            if name != "u_shaped"
        }
        | {"u_shaped": tradeoff.shape.u_shaped},
    }
