"""What the report reads of a finished scan's run folders."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaling_jax.analysis.measurements import tried_runs
from scaling_jax.analysis.noise import moments_by_step
from scaling_jax.noise_scale import Estimate, estimate
from scaling_jax.scanning import Experiment, Group
from scaling_jax.scanning.search import Tried, best_of, evaluations
from scaling_jax.training import run_folder
from scaling_jax.training.records import read_run_config

WINDOWS = 24  # of a run, for its noise scale over training
FEWEST_STEPS = 4  # in a window


class NoiseWindow(NamedTuple):
    """The noise scale of a stretch of a run, in tokens."""

    tokens: float  # processed by its geometric middle
    noise: Estimate


class GroupRuns(NamedTuple):
    """One model, batch size and seed: every learning rate tried, and the best one's course."""

    group: Group
    tried: list[Tried]  # by learning rate
    best: Tried
    steps: np.ndarray  # [evaluations] of the best run
    losses: np.ndarray  # [evaluations], nats per token
    noise: list[NoiseWindow]

    @property
    def model(self) -> str:
        return self.group.subject.model.name

    @property
    def batch_tokens(self) -> int:
        return self.group.batch_tokens


def read_runs(experiment: Experiment, workdir: Path) -> list[GroupRuns]:
    """Every group of a finished scan, in order.

    Raises:
      UserError: if runs are missing.
    """
    return [_read_group(experiment, group, workdir) for group in experiment.groups]


def read_corpus(runs: list[GroupRuns], workdir: Path) -> dict[str, Any]:
    """The manifest of the text that was trained on."""
    return read_run_config(run_folder(workdir, runs[0].best.run))["corpus"]


def _read_group(experiment: Experiment, group: Group, workdir: Path) -> GroupRuns:
    tried = sorted(tried_runs(experiment, group, workdir), key=lambda t: t.rate_index)
    best = best_of(tried)
    folder = run_folder(workdir, best.run)
    steps, losses = evaluations(folder)
    moments = moments_by_step(folder, best.run)
    noise = noise_windows(*moments, group.batch_tokens, best.run.model.context)
    return GroupRuns(group, tried, best, np.array(steps), np.array(losses), noise)


def noise_windows(grad_sq_norm, trace_cov, batch_tokens: int, context: int) -> list[NoiseWindow]:
    """Noise scales of windows that are equally long in log steps; moments are per step, tr(Σ) per sequence."""
    edges = np.unique(np.geomspace(FEWEST_STEPS, max(len(trace_cov), FEWEST_STEPS), WINDOWS + 1).astype(int))
    windows, start = [], 0
    for end in edges:
        if end - start < FEWEST_STEPS:
            continue
        found = estimate(grad_sq_norm[start:end], trace_cov[start:end]).scaled(context)
        windows.append(NoiseWindow(math.sqrt((start + 1) * end) * batch_tokens, found))
        start = end
    return windows
