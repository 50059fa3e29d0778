"""From a finished scan to measurements.csv, noise_scale.csv and fit.json."""

import csv
import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from scaling_jax.analysis.fit_json import finite, fit_as_json
from scaling_jax.analysis.measurements import Measurement, measure, write_measurements
from scaling_jax.analysis.noise import NoiseMeasurement, measure_noise
from scaling_jax.config import from_dict
from scaling_jax.errors import UserError
from scaling_jax.fitting import FormFit, JointFit, ScanFit, compare_forms, fit_joint, fit_scan
from scaling_jax.scanning import Experiment
from scaling_jax.training.records import write_atomically, write_json


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
    workdir = Path(workdir)
    experiment = read_experiment(workdir)
    measurements = measure(experiment, workdir)
    noise = measure_noise(experiment, workdir)
    columns: dict[str, Any] = {
        "model": [m.model for m in measurements],
        "batch_tokens": [m.batch_tokens for m in measurements],
        "target_loss": [m.target_loss for m in measurements],
        "steps": [m.steps for m in measurements],
        "run": [m.seed for m in measurements],
    }
    fit = fit_scan(**columns, steps_tried=[m.steps_tried for m in measurements])
    sizes = {subject.model.name: subject.model.num_params for subject in experiment.subjects}
    analysis = Analysis(
        experiment=experiment,
        measurements=measurements,
        noise=noise,
        fit=fit,
        notes=fit.notes + _tuning_notes(measurements),
        joint=fit_joint(**columns),
        forms=compare_forms(**columns, num_params=sizes),
    )
    write_measurements(workdir / "measurements.csv", measurements)
    _write_noise(workdir / "noise_scale.csv", noise)
    extra = {"noise_scale_over_b_crit": finite(analysis.noise_ratio), "corpus": _corpus(workdir)}
    write_json(workdir / "fit.json", fit_as_json(fit, analysis.joint, analysis.forms, analysis.notes) | extra)
    return analysis


def read_experiment(workdir: Path) -> Experiment:
    path = workdir / "experiment.json"
    if not path.exists():
        raise UserError(f"{workdir} holds no scan (no experiment.json): give the folder that a scan wrote")
    return from_dict(Experiment, json.loads(path.read_text()))


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


def _tuning_notes(measurements: list[Measurement]) -> tuple[str, ...]:
    notes = []
    for model, batch, seed in dict.fromkeys((m.model, m.batch_tokens, m.seed) for m in measurements):
        rows = [m for m in measurements if (m.model, m.batch_tokens, m.seed) == (model, batch, seed)]
        lowest = min(rows, key=lambda m: m.target_loss)
        if math.isfinite(lowest.steps) and not lowest.tuned:
            notes.append(
                f"model {model} at {batch:,} tokens: the best learning rate, {lowest.learning_rate:g}, "
                "is at the edge of those tried"
            )
        missed = [m.target_loss for m in rows if math.isnan(m.steps)]
        if missed:
            notes.append(
                f"model {model} at {batch:,} tokens: loss {max(missed):g} and below not reached in "
                f"{lowest.steps_tried:,} steps"
            )
    return tuple(notes)


def _corpus(workdir: Path) -> dict[str, Any]:
    config = next((workdir / "runs").glob("*/config.json"))
    return json.loads(config.read_text())["corpus"]


def _write_noise(path: Path, rows: list[NoiseMeasurement]) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(NoiseMeasurement._fields)
    for row in rows:
        writer.writerow([f"{v:.10g}" if isinstance(v, float) else v for v in row])
    write_atomically(path, text.getvalue())
