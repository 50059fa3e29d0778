"""The noise scale that training steps measured, window by window of falling loss, in tokens."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

from scaling_jax.analysis.measurements import tried_runs
from scaling_jax.errors import UserError
from scaling_jax.noise_scale import Moments, estimate, unbiased
from scaling_jax.noise_scale.interval import fieller
from scaling_jax.scanning import Experiment, Group
from scaling_jax.scanning.search import best_of
from scaling_jax.training import Run, read_metrics, run_folder


class NoiseMeasurement(NamedTuple):
    """B_simple of one run while its loss fell through a window, with its interval; tokens."""

    model: str
    batch_tokens: int
    seed: int
    loss: float  # the window's geometric middle
    b_simple: float  # NaN where unresolved
    low: float
    high: float  # inf where unresolved
    resolved: bool
    steps: int


def measure_noise(experiment: Experiment, workdir: Path) -> list[NoiseMeasurement]:
    """One measurement for each group's best run and each two neighbouring target losses that it passed."""
    return [row for group in experiment.groups for row in _windows(group, experiment, workdir)]


def moments_by_step(folder: Path, run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Unbiased |G|² and tr(Σ) of each step; tr(Σ) per example, an example being a sequence of the run's context."""
    small, big, small_tokens = [], [], 1
    try:
        for line in read_metrics(folder):
            small += line["small_sq_norm"]
            big += line["big_sq_norm"]
            small_tokens = line["small_batch_tokens"]
    except KeyError as error:
        raise UserError(f"{folder / 'metrics.jsonl'} has no {error}: give results of this version") from None
    context = run.model.context
    sizes = small_tokens / context, run.batch_tokens / context
    return unbiased(Moments(np.array(small, float), np.array(big, float), *sizes))


class MomentsByPart(NamedTuple):
    """Unbiased moments of each part of a model (`models.part_names`), averaged over the steps of each line of a run."""

    num_steps: np.ndarray  # [lines]
    grad_sq_norm: np.ndarray  # [lines, parts]
    trace_cov: np.ndarray  # [lines, parts], per example


def moments_by_part(folder: Path, run: Run) -> MomentsByPart | None:
    """Those of a run at one batch size; None for results of versions that didn't measure them."""
    lines = read_metrics(folder)
    if not lines or not all("big_sq_norm_by_layer" in line for line in lines):
        return None
    num_steps = np.diff([line["step"] for line in lines], prepend=0)
    try:
        small, big = (
            np.array([line[f"{size}_sq_norm_by_layer"] for line in lines], float).reshape(len(lines), -1)
            for size in ("small", "big")
        )
        small_batch = lines[-1]["small_batch_tokens"] / run.model.context
        return MomentsByPart(num_steps, *unbiased(Moments(small, big, small_batch, run.batch_sequences)))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder / 'metrics.jsonl'}: norms by layer are damaged ({error}): train it again") from None


def ratio_of_means(
    num_steps: np.ndarray, grad_sq_norm: np.ndarray, trace_cov: np.ndarray, confidence: float = 0.95
) -> tuple[float, float, float] | None:
    """tr(Σ)/|G|² with Fieller's interval from means [lines] over steps; None where |G|² can't be told from zero.

    A line's mean varies as 1/its steps: each step draws rows of its own, and the windows are short against the drift.
    """
    weights = num_steps / num_steps.sum()
    tr_g2_Lx2 = np.stack([trace_cov, grad_sq_norm], axis=1)
    trace, sq_norm = map(float, weights @ tr_g2_Lx2)
    residuals_Lx2 = tr_g2_Lx2 - (trace, sq_norm)
    dof = len(num_steps) - 1
    cov = (weights[:, None] * residuals_Lx2).T @ residuals_Lx2 / dof
    low, high, bounded = fieller(trace, sq_norm, cov, float(stdtrit(dof, 0.5 + confidence / 2)))
    return (trace / sq_norm, low, high) if bounded and sq_norm > 0 else None


def _windows(group: Group, experiment: Experiment, workdir: Path) -> list[NoiseMeasurement]:
    best = best_of(tried_runs(experiment, group, workdir))
    run, crossings = best.run, best.steps_to_target
    folder = run_folder(workdir, run)
    grad_sq_norm, trace_cov = moments_by_step(folder, run)
    targets = group.subject.target_losses
    rows = []
    for k in range(len(targets) - 1):
        if not np.all(np.isfinite(crossings[k : k + 2])):
            continue
        window = slice(int(crossings[k]), max(int(crossings[k + 1]), int(crossings[k]) + 2))
        found = estimate(grad_sq_norm[window], trace_cov[window]).scaled(run.model.context)
        rows.append(
            NoiseMeasurement(
                model=run.model.name,
                batch_tokens=run.batch_tokens,
                seed=run.seed,
                loss=math.sqrt(targets[k] * targets[k + 1]),
                b_simple=found.value,
                low=found.low,
                high=found.high,
                resolved=found.resolved,
                steps=found.steps,
            )
        )
    return rows
