"""The runs in a results folder, grouped by cell, and the noise scale along each run.

Each run is read once, with its own config.json. Noise scales are in tokens. Each step has the batch sizes of its own
line, because a run may continue on another number of devices.
"""

import dataclasses
import functools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import stdtrit

from scaling_jax.noise_scale import Estimate, Moments, estimate, unbiased
from scaling_jax.noise_scale.estimate import fieller
from scaling_jax.scanning import Cell, Experiment, Subject
from scaling_jax.scanning.tried import Outcome, Tried, best_of, look_at
from scaling_jax.tasks import part_names
from scaling_jax.training import Run, RunResult, read_result
from scaling_jax.training.metrics import Course
from scaling_jax.training.records import read_course, read_run_config, whole_result

WINDOWS = 24  # of a run, for its noise scale over training
FEWEST_STEPS = 4  # in such a window
MOST_PART_WINDOWS = 10  # of a run, for the noise scale of a part of the model
FEWEST_LINES = 6  # of metrics.jsonl, in such a window
MOST_DRAWN = 24  # cells of one model in a chart of runs


class NoiseWindow(NamedTuple):
    """The noise scale in a window of a run, in tokens."""

    tokens: float  # processed up to the geometric middle of the window
    noise: Estimate


class PartNoise(NamedTuple):
    """The noise scale of a part of the model in a window of a run, with its interval, in tokens."""

    tokens: float  # processed up to the geometric middle of the window
    value: float
    low: float
    high: float


class MomentsByPart(NamedTuple):
    """Unbiased moments of each part of a model (`tasks.part_names`), averaged over the steps of each line."""

    num_steps: np.ndarray  # [lines]
    grad_sq_norm: np.ndarray  # [lines, parts]
    trace_cov: np.ndarray  # [lines, parts], in tokens


@dataclasses.dataclass(frozen=True, eq=False)
class RunRecord:
    """A run and its records, as read from its folder."""

    folder: Path
    run: Run
    corpus: dict[str, Any]  # the manifest of its text
    result: RunResult | None  # None if the run isn't done
    course: Course

    @property
    def run_id(self) -> str:
        return self.folder.name

    @functools.cached_property
    def noise(self) -> list[NoiseWindow]:
        """The noise scale in windows of the run."""
        return noise_windows(self.course)

    @functools.cached_property
    def noise_by_part(self) -> dict[str, list[PartNoise]]:
        """The noise scale of each part of the model in windows; {} if not measured."""
        return part_windows(self.course, self.corpus.get("parts"))

    @functools.cached_property
    def noise_of_all_parts(self) -> list[PartNoise]:
        """The noise scale of the whole model in the windows of `noise_by_part`; [] if not measured."""
        return all_parts_windows(self.course)

    @property
    def outcome(self) -> Outcome:
        """The outcome of a finished run."""
        assert self.result is not None
        return Outcome(self.run, self.result, self.course.eval_steps.tolist(), self.course.eval_losses.tolist())


class CellRuns(NamedTuple):
    """The finished runs of one cell: one model, batch size and seed."""

    cell: Cell
    subject: Subject
    tried: list[Tried]  # in the order of learning rates
    best: Tried
    record: RunRecord  # of the best run

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
    """Cells for a chart of runs. With many seeds, only the first seeds, so that readers can tell lines apart."""
    of_model = Counter(cell.model for cell in cells)
    seeds = list(dict.fromkeys(cell.cell.seed for cell in cells))
    drawn = set(seeds[: max(1, MOST_DRAWN * len(seeds) // max(of_model.values(), default=1))])
    return [cell for cell in cells if cell.cell.seed in drawn]


def read_runs(workdir: Path, on_run: Callable[[int, int], object] = lambda done, total: None) -> tuple[RunRecord, ...]:
    """Every run in `workdir/runs`, in the order of their names.

    Args:
      on_run: called with the numbers of runs that are read and that there are.

    Raises:
      UserError: if a run is damaged. Names it.
    """
    folders = [folder for folder in sorted((workdir / "runs").glob("*/")) if (folder / "config.json").exists()]
    records: list[RunRecord] = []
    for folder in folders:
        on_run(len(records), len(folders))
        records.append(read_run(folder))
    return tuple(records)


def read_run(folder: Path) -> RunRecord:
    """A run and its records; it may still train. Raises UserError if they are damaged."""
    config, result = read_run_config(folder), read_result(folder)
    return RunRecord(folder, config.run, config.corpus, result, read_course(folder, result, config.sha256))


def check_runs(workdir: Path) -> None:
    """Raises UserError if the records of a finished run in `workdir/runs` are damaged. Names it."""
    for path in sorted((workdir / "runs").glob("*/result.json")):
        whole_result(path.parent)


def deal_by_cell(experiment: Experiment, records: Sequence[RunRecord]) -> dict[Cell, list[RunRecord]]:
    """{cell: its runs}, finished or not, for the cells that have runs."""
    cells = {_curve(experiment.run(cell, 0)): cell for cell in experiment.cells}
    found: dict[Cell, list[RunRecord]] = defaultdict(list)
    for record in records:
        if (cell := cells.get(_curve(record.run))) is not None:
            found[cell].append(record)
    return found


def cell_runs(experiment: Experiment, records: Sequence[RunRecord]) -> dict[Cell, CellRuns]:
    """{cell: its finished runs}. Of several runs with one learning rate, takes the longest."""
    return {
        cell: _cell_runs(experiment, cell, done)
        for cell, runs in deal_by_cell(experiment, records).items()
        if (done := [record for record in runs if record.result is not None])
    }


def moments_by_step(run: Course) -> tuple[np.ndarray, np.ndarray]:
    """Unbiased |G|² and tr(Σ) of each step [steps]; tr(Σ)/|G|² is the noise scale in tokens."""
    return unbiased(Moments(run.small_sq_norm, run.big_sq_norm, run.small_batch_tokens, run.batch_tokens))


def moments_by_part(run: Course) -> MomentsByPart | None:
    """Unbiased moments of each part of the model; None if the run didn't measure them."""
    small, big = run.small_sq_norm_by_part, run.big_sq_norm_by_part
    if small is None or big is None:
        return None
    sizes = run.line_small_batch_tokens[:, None], run.line_batch_tokens[:, None]
    return MomentsByPart(run.line_steps, *unbiased(Moments(small, big, *sizes)))


def last_noise_scale(run: Course, share: float = 0.25, fewest: int = 20) -> Estimate | None:
    """The noise scale in tokens over the last steps of a run; None if they are too few.

    Uses the last part, `share`, of the steps at the run's last batch size, and at least `fewest` of them.
    """
    same = np.flatnonzero(run.batch_tokens != run.batch_tokens[-1]) if len(run.batch_tokens) else np.zeros(0, int)
    start = int(same[-1]) + 1 if len(same) else 0
    steps = len(run.batch_tokens) - start
    if steps < fewest:
        return None
    last = slice(len(run.batch_tokens) - max(fewest, math.ceil(share * steps)), None)
    grad_sq_norm, trace_cov = moments_by_step(run)
    return estimate(grad_sq_norm[last], trace_cov[last])


def noise_windows(run: Course) -> list[NoiseWindow]:
    """The noise scale in windows that are equally long in log steps."""
    grad_sq_norm, trace_cov = moments_by_step(run)
    found = []
    for start, stop in _windows(run.step, WINDOWS, FEWEST_STEPS):
        noise = estimate(grad_sq_norm[start:stop], trace_cov[start:stop])
        found.append(NoiseWindow(math.sqrt(run.tokens[start] * run.tokens[stop - 1]), noise))
    return found


def part_windows(run: Course, names: Any = None) -> dict[str, list[PartNoise]]:
    """{part of the model: its noise scale in windows}, from means over lines. Leaves out unresolved windows.

    Args:
      names: of the parts, as config.json has them; None for a built-in model.
    """
    moments = moments_by_part(run)
    if moments is None:
        return {}
    parts = zip(moments.grad_sq_norm.T, moments.trace_cov.T, strict=True)
    found = [_line_windows(run, moments.num_steps, *series) for series in parts]
    if not isinstance(names, list) or len(set(map(str, names))) != len(found):  # a built-in model, or damaged names
        names = part_names(len(found) - 2) if len(found) > 2 else [f"part {k}" for k in range(1, len(found) + 1)]
    return dict(zip(map(str, names), found, strict=True))


def all_parts_windows(run: Course) -> list[PartNoise]:
    """The noise scale of the whole model in the windows of `part_windows`: Σ tr(Σ) / Σ |G|² over all parts.

    So it lies between those of its parts, where |G|² of each is positive. `noise_windows` has other windows.
    """
    moments = moments_by_part(run)
    if moments is None:
        return []
    return _line_windows(run, moments.num_steps, moments.grad_sq_norm.sum(1), moments.trace_cov.sum(1))


def _line_windows(
    run: Course, num_steps: np.ndarray, grad_sq_norm: np.ndarray, trace_cov: np.ndarray
) -> list[PartNoise]:
    """The resolved noise scales in windows of whole lines, from means [lines]."""
    step, tokens, found = np.cumsum(num_steps), run.tokens, []
    for start, stop in _windows(step, MOST_PART_WINDOWS, FEWEST_LINES):
        first = step[start] - num_steps[start]
        middle = math.sqrt(tokens[first] * tokens[step[stop - 1] - 1])
        ratio = ratio_of_means(num_steps[start:stop], grad_sq_norm[start:stop], trace_cov[start:stop])
        if ratio is not None and ratio[0] > 0:
            found.append(PartNoise(middle, *ratio))
    return found


def ratio_of_means(
    num_steps: np.ndarray, grad_sq_norm: np.ndarray, trace_cov: np.ndarray, confidence: float = 0.95
) -> tuple[float, float, float] | None:
    """(tr(Σ)/|G|², low, high) with Fieller's interval, from means [lines] over steps; None if |G|² may be zero.

    The variance of a line's mean is taken as 1/(its steps): each step has new rows, and drift in a window is small.
    """
    weights = num_steps / num_steps.sum()
    tr_g2_Lx2 = np.stack([trace_cov, grad_sq_norm], axis=1)
    trace, sq_norm = map(float, weights @ tr_g2_Lx2)
    residuals_Lx2 = tr_g2_Lx2 - (trace, sq_norm)
    dof = len(num_steps) - 1
    cov = (weights[:, None] * residuals_Lx2).T @ residuals_Lx2 / dof
    low, high, bounded = fieller(trace, sq_norm, cov, float(stdtrit(dof, 0.5 + confidence / 2)))
    return (trace / sq_norm, max(low, 0.0), high) if bounded and sq_norm > 0 else None


def _curve(run: Run) -> Run:
    """The part of a run that is equal for all runs of its cell."""
    return dataclasses.replace(run.without_limits, learning_rate=1.0)


def _cell_runs(experiment: Experiment, cell: Cell, done: Sequence[RunRecord]) -> CellRuns:
    by_rate: dict[float, RunRecord] = {}
    for record in sorted(done, key=lambda record: record.course.line_steps.sum()):
        by_rate[record.run.learning_rate] = record
    subject = experiment.subject(cell.model)
    tried = [look_at(subject.target_losses, by_rate[rate].outcome) for rate in sorted(by_rate)]
    best = best_of(tried)
    return CellRuns(cell, subject, tried, best, by_rate[best.run.learning_rate])


def _windows(step: np.ndarray, most: int, fewest: int) -> list[tuple[int, int]]:
    """Windows [start, stop) of entries, equally long in log steps; entry i ends at step[i].

    At most `most` windows, of at least `fewest` entries each.
    """
    if len(step) < fewest:
        return []
    found, start = [], 0
    for stop in np.searchsorted(step, np.geomspace(step[fewest - 1], step[-1], most + 1), side="right"):
        if stop - start >= fewest:
            found.append((start, int(stop)))
            start = int(stop)
    return found
