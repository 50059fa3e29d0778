"""Runs from their folders, each read once by what its own config.json says, and the noise scale along each.

Noise scales are in tokens. Every step enters with the batch sizes of its own line: a run may go on over another number
of devices.
"""

import dataclasses
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from scaling_jax.noise_scale import Estimate, Moments, estimate, unbiased
from scaling_jax.noise_scale.estimate import fieller
from scaling_jax.scanning import Cell, Experiment, Subject
from scaling_jax.scanning.search import Outcome, Tried, best_of, look_at
from scaling_jax.tasks import part_names
from scaling_jax.training import Run, RunResult, read_metrics, read_result
from scaling_jax.training.records import Course, course, read_run_config

WINDOWS = 24  # of a run, for its noise scale over training
FEWEST_STEPS = 4  # in a window
MOST_PART_WINDOWS = 10  # for the noise scale of a part of the model
MOST_DRAWN = 40  # cells of one model in a chart of runs
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


class MomentsByPart(NamedTuple):
    """Unbiased moments of each part of a model (`tasks.part_names`), averaged over the steps of each line of a run."""

    num_steps: np.ndarray  # [lines]
    grad_sq_norm: np.ndarray  # [lines, parts]
    trace_cov: np.ndarray  # [lines, parts], in tokens


def moments_by_step(run: Course) -> tuple[np.ndarray, np.ndarray]:
    """Unbiased |G|² and tr(Σ) of each step [steps], in tokens: their ratio is the noise scale in tokens."""
    return unbiased(Moments(run.small_sq_norm, run.big_sq_norm, run.small_batch_tokens, run.batch_tokens))


def moments_by_part(run: Course) -> MomentsByPart | None:
    """None for a run that didn't measure them."""
    small, big = run.small_sq_norm_by_part, run.big_sq_norm_by_part
    if small is None or big is None:
        return None
    sizes = run.line_small_batch_tokens[:, None], run.line_batch_tokens[:, None]
    return MomentsByPart(run.line_steps, *unbiased(Moments(small, big, *sizes)))


def last_noise_scale(run: Course, share: float = 0.25, fewest: int = 20) -> Estimate | None:
    """Over the last steps of a run, in tokens: a share of those at its last batch size; None if they are too few."""
    same = np.flatnonzero(run.batch_tokens != run.batch_tokens[-1]) if len(run.batch_tokens) else np.zeros(0, int)
    start = int(same[-1]) + 1 if len(same) else 0
    steps = len(run.batch_tokens) - start
    if steps < fewest:
        return None
    last = slice(len(run.batch_tokens) - max(fewest, math.ceil(share * steps)), None)
    grad_sq_norm, trace_cov = moments_by_step(run)
    return estimate(grad_sq_norm[last], trace_cov[last])


def noise_windows(run: Course) -> list[NoiseWindow]:
    """Noise scales of windows that are equally long in log steps."""
    grad_sq_norm, trace_cov = moments_by_step(run)
    tokens = np.cumsum(run.batch_tokens)
    found = []
    for start, stop in _windows(np.arange(1, len(trace_cov) + 1), WINDOWS, FEWEST_STEPS):
        noise = estimate(grad_sq_norm[start:stop], trace_cov[start:stop])
        found.append(NoiseWindow(math.sqrt(tokens[start] * tokens[stop - 1]), noise))
    return found


def part_windows(run: Course) -> dict[str, list[PartNoise]]:
    """The same of each part of a model, from means over the steps of each line; unresolved ones are left out."""
    moments = moments_by_part(run)
    if moments is None:
        return {}
    step, tokens = np.cumsum(moments.num_steps), np.cumsum(run.batch_tokens)
    found: dict[str, list[PartNoise]] = {part: [] for part in part_names(moments.trace_cov.shape[1] - 2)}
    for start, stop in _windows(step, MOST_PART_WINDOWS, FEWEST_LINES):
        first = step[start] - moments.num_steps[start]
        middle = math.sqrt(tokens[first] * tokens[step[stop - 1] - 1])
        for k, windows in enumerate(found.values()):
            series = moments.grad_sq_norm[start:stop, k], moments.trace_cov[start:stop, k]
            ratio = ratio_of_means(moments.num_steps[start:stop], *series)
            if ratio is not None and ratio[0] > 0:
                windows.append(PartNoise(middle, *ratio))
    return found


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


def few_enough(cells: Sequence[CellRuns]) -> list[CellRuns]:
    """Cells for a chart that draws runs: of many seeds the first ones alone, so that lines can be told apart."""
    of_model = Counter(cell.model for cell in cells)
    seeds = list(dict.fromkeys(cell.cell.seed for cell in cells))
    drawn = set(seeds[: max(1, MOST_DRAWN * len(seeds) // max(of_model.values(), default=1))])
    return [cell for cell in cells if cell.cell.seed in drawn]


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
