"""What the report reads of a finished scan's run folders."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaling_jax.analysis.measurements import tried_runs
from scaling_jax.analysis.noise import MomentsByPart, moments_by_part, moments_by_step, ratio_of_means
from scaling_jax.models import ModelConfig, part_names
from scaling_jax.noise_scale import Estimate, estimate
from scaling_jax.scanning import Experiment, Group
from scaling_jax.scanning.search import Tried, best_of, evaluations
from scaling_jax.training import run_folder
from scaling_jax.training.records import read_run_config

WINDOWS = 24  # of a run, for its noise scale over training
FEWEST_STEPS = 4  # in a window
MOST_PART_WINDOWS = 10  # for the noise scale of a part of the model
FEWEST_LINES = 6  # of metrics.jsonl, in one of those


class NoiseWindow(NamedTuple):
    """The noise scale of a stretch of a run, in tokens."""

    tokens: float  # processed by its geometric middle
    noise: Estimate


class PartNoise(NamedTuple):
    """The noise scale of a part of the model in a stretch of a run, with its interval; all in tokens."""

    tokens: float  # processed by its geometric middle
    value: float
    low: float
    high: float


class GroupRuns(NamedTuple):
    """One model, batch size and seed: every learning rate tried, and the best one's course."""

    group: Group
    tried: list[Tried]  # by learning rate
    best: Tried
    steps: np.ndarray  # [evaluations] of the best run
    losses: np.ndarray  # [evaluations], nats per token
    noise: list[NoiseWindow]
    noise_by_part: dict[str, list[PartNoise]]  # of the model; {} where it wasn't measured

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
    by_part = moments_by_part(folder, best.run)
    noise_by_part = {} if by_part is None else part_windows(by_part, best.run.model, group.batch_tokens)
    return GroupRuns(group, tried, best, np.array(steps), np.array(losses), noise, noise_by_part)


def noise_windows(grad_sq_norm, trace_cov, batch_tokens: int, context: int) -> list[NoiseWindow]:
    """Noise scales of windows that are equally long in log steps; moments are per step, tr(Σ) per sequence."""
    found = []
    for start, stop in _windows(np.arange(1, len(trace_cov) + 1), WINDOWS, FEWEST_STEPS):
        noise = estimate(grad_sq_norm[start:stop], trace_cov[start:stop]).scaled(context)
        found.append(NoiseWindow(math.sqrt((start + 1) * stop) * batch_tokens, noise))
    return found


def part_windows(moments: MomentsByPart, model: ModelConfig, batch_tokens: int) -> dict[str, list[PartNoise]]:
    """The same of each part of a model, from means over the steps of each line; unresolved ones are left out."""
    step = np.cumsum(moments.num_steps)
    found: dict[str, list[PartNoise]] = {part: [] for part in part_names(model.n_layer)}
    for start, stop in _windows(step, MOST_PART_WINDOWS, FEWEST_LINES):
        steps_before = step[start] - moments.num_steps[start]
        tokens = math.sqrt((steps_before + 1) * step[stop - 1]) * batch_tokens
        for k, windows in enumerate(found.values()):
            series = moments.grad_sq_norm[start:stop, k], moments.trace_cov[start:stop, k]
            ratio = ratio_of_means(moments.num_steps[start:stop], *series)
            if ratio is not None and ratio[0] > 0:
                windows.append(PartNoise(tokens, *(model.context * x for x in ratio)))
    return found


def _windows(step: np.ndarray, most: int, fewest: int) -> list[tuple[int, int]]:
    """Stretches [start, stop) of entries that end at steps, equally long in log steps, of no fewer entries each."""
    if len(step) < fewest:
        return []
    found, start = [], 0
    for stop in np.searchsorted(step, np.geomspace(step[fewest - 1], step[-1], most + 1), side="right"):
        if stop - start >= fewest:
            found.append((start, int(stop)))
            start = int(stop)
    return found
