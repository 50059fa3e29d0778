"""From a finished scan to measurements.csv, noise_scale.csv and fit.json."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np

from scaling_jax.analysis.branches import BranchMeasurement, read_branches
from scaling_jax.analysis.comparison import Comparison, compare
from scaling_jax.analysis.csv_rows import write_rows
from scaling_jax.analysis.fit_json import finite, fit_as_json
from scaling_jax.analysis.measurements import Measurement, measure
from scaling_jax.analysis.noise import NoiseMeasurement, measure_noise
from scaling_jax.analysis.seeds import SeedSpread, measure_spread, seed_notes
from scaling_jax.config import read_config
from scaling_jax.errors import UserError
from scaling_jax.fitting import FormFit, JointFit, ScanFit, compare_forms, fit_joint, fit_scan
from scaling_jax.scanning import Experiment
from scaling_jax.training.buckets import publish, working_copy
from scaling_jax.training.records import read_run_config, write_json


@dataclasses.dataclass(frozen=True, eq=False)
class Analysis:
    """All that figures, tables and advice read."""

    experiment: Experiment
    measurements: list[Measurement]
    noise: list[NoiseMeasurement]
    fit: ScanFit
    notes: tuple[str, ...]  # what the reader must know: left out, untuned, not reached
    joint: JointFit | None = None
    forms: tuple[FormFit, ...] = ()
    branches: tuple[BranchMeasurement, ...] = ()
    comparison: tuple[Comparison, ...] = ()

    @property
    def noise_ratio(self) -> float:
        """Median over the fitted range of noise scale / B_crit at the same model and loss; NaN if there is none."""
        ratios = [ratio for _, ratio in noise_ratios(self.noise, self.fit)]
        return float(np.median(ratios)) if ratios else math.nan


def analyse(workdir: str | Path) -> Analysis:
    """Fits a finished scan and writes what it found beside the runs; the same runs give the same bytes.

    Raises:
      UserError: if the folder holds no scan, or an unfinished one.
    """
    workdir = working_copy(workdir)
    experiment = read_experiment(workdir)
    measurements = measure(experiment, workdir)
    noise = measure_noise(experiment, workdir)
    branches = tuple(read_branches(workdir))
    spreads = measure_spread(experiment, workdir)
    early = {(m.model, m.target_loss) for m in measurements if m.passed_early}
    used = [m for m in measurements if (m.model, m.target_loss) not in early]
    columns: dict[str, Any] = {
        "model": [m.model for m in used],
        "batch_tokens": [m.batch_tokens for m in used],
        "target_loss": [m.target_loss for m in used],
        "steps": [m.steps for m in used],
        "run": [m.seed for m in used],
        "steps_tried": [m.steps_tried for m in used],
    }
    fit = fit_scan(**columns)
    sizes = {subject.model.name: subject.model.num_params for subject in experiment.subjects}
    analysis = Analysis(
        experiment=experiment,
        measurements=measurements,
        noise=noise,
        fit=fit,
        notes=fit.notes + _early_notes(early) + _tuning_notes(used) + seed_notes(spreads),
        joint=fit_joint(**columns),
        forms=compare_forms(**columns, num_params=sizes),
        branches=branches,
        comparison=tuple(compare(fit, noise, branches)),
    )
    write_rows(workdir / "measurements.csv", Measurement, measurements)
    write_rows(workdir / "noise_scale.csv", NoiseMeasurement, noise)
    if branches:
        write_rows(workdir / "three_measurements.csv", Comparison, analysis.comparison)
    if spreads:
        write_rows(workdir / "seeds.csv", SeedSpread, spreads)
    extra = {"noise_scale_over_b_crit": finite(analysis.noise_ratio), "corpus": _corpus(workdir)}
    write_json(workdir / "fit.json", fit_as_json(fit, analysis.joint, analysis.forms, analysis.notes) | extra)
    publish(workdir)
    return analysis


def read_experiment(workdir: Path) -> Experiment:
    """The experiment whose scan a folder holds.

    Raises:
      UserError: if it holds none, or one of another version.
    """
    path = workdir / "experiment.json"
    if not path.exists():
        raise UserError(f"{workdir} holds no scan (no experiment.json): give the folder that a scan wrote")
    return read_config(Experiment, path, "give the folder of a scan by this version, or scan again in another folder")


def noise_ratios(noise: list[NoiseMeasurement], fit: ScanFit) -> list[tuple[NoiseMeasurement, float]]:
    """Each measurement inside its model's fitted range with noise scale / B_crit, which is interpolated in log loss.

    Unresolved measurements count as infinite: leaving them out would pull the median down.
    """
    ratios = []
    for model in dict.fromkeys(point.model for point in fit.points):
        points = sorted((p.loss, p.tradeoff.b_crit) for p in fit.points if p.model == model and p.in_law)
        if len(points) < 2:
            continue
        loss, b_crit = np.log(np.array(points)).T
        for m in noise:
            if m.model == model and loss[0] <= math.log(m.loss) <= loss[-1]:
                at_loss = math.exp(np.interp(math.log(m.loss), loss, b_crit))
                ratios.append((m, (m.b_simple if m.resolved else math.inf) / at_loss))
    return ratios


def _early_notes(early: set[tuple[str, float]]) -> tuple[str, ...]:
    return tuple(
        f"model {model}: loss {loss:g} is left out, some run was below it when it was first evaluated"
        for model, loss in sorted(early, reverse=True)
    )


def _tuning_notes(measurements: list[Measurement]) -> tuple[str, ...]:
    notes = []
    for model, batch, seed in dict.fromkeys((m.model, m.batch_tokens, m.seed) for m in measurements):
        rows = [m for m in measurements if (m.model, m.batch_tokens, m.seed) == (model, batch, seed)]
        where = f"model {model} at {batch:,} tokens" + (f", seed {seed}" if seed else "")
        at_edge = [m for m in rows if math.isfinite(m.steps) and not m.tuned]
        if at_edge:
            rates = ", ".join(dict.fromkeys(f"{m.learning_rate:g}" for m in at_edge))
            notes.append(
                f"{where}: the best learning rate, {rates}, is at the edge of those tried at {len(at_edge)} of "
                f"{len(rows)} losses"
            )
        missed = [m for m in rows if math.isnan(m.steps)]
        if missed:
            highest = max(m.target_loss for m in missed)
            notes.append(f"{where}: loss {highest:g} and below not reached in {missed[0].steps_tried:,} steps")
    return tuple(notes)


def _corpus(workdir: Path) -> dict[str, Any]:
    return read_run_config(next((workdir / "runs").glob("*/config.json")).parent)["corpus"]
