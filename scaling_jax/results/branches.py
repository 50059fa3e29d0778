"""The critical batch size along a run, measured by branches (branches.csv); comparison with scan and noise scale."""

import csv
import math
import typing
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scaling_jax.fitting import ScanFit
from scaling_jax.io import UserError
from scaling_jax.io.files import write_rows
from scaling_jax.results.measurements import NoiseMeasurement
from scaling_jax.results.runs import RunRecord
from scaling_jax.scanning.branches import EVALUATIONS, BranchPlan
from scaling_jax.training import Run

Runs = Mapping[Run, RunRecord]
_LAST = EVALUATIONS // 2  # average over this many last evaluations of a branch
_STANDARD_ERRORS = 1.96  # for a 95 % interval
_ENDS = ("b_crit", "low", "high")  # fields of BranchMeasurement
_NEAR = 0.04  # in log loss; a measurement this close to a loss counts for it


class BranchMeasurement(NamedTuple):
    """The critical batch size at one point of a run: the largest batch that kept up with the run, in tokens."""

    model: str
    batch_tokens: int  # of the run
    seed: int
    tokens: int  # where the branches start
    loss: float  # mean over the evaluations of the run after this point; nats per token
    b_crit: float  # inf: even the largest batch kept up
    low: float
    high: float


class Excess(NamedTuple):
    """Test loss of a branch minus that of the run after the same number of tokens, in nats per token."""

    batch_tokens: int
    mean: float  # NaN if the branch diverged
    standard_error: float


def check_tolerance(tolerance: float) -> None:
    """Raises UserError unless the tolerance is positive and finite."""
    if not 0 < tolerance < math.inf:
        raise UserError(f"tolerance = {tolerance} nats per token must be positive and finite")


def measure_branches(plans: Iterable[BranchPlan], runs: Runs, tolerance: float) -> list[BranchMeasurement]:
    """One measurement for each point of each plan.

    Args:
      runs: the finished runs and their records.
      tolerance: a branch keeps up if its loss is at most this much above the run's, in nats per token.
    """
    check_tolerance(tolerance)
    rows = []
    for plan in plans:
        for point in plan.points:
            trunk = _losses(runs, plan.trunk, point, plan.branch_tokens)
            found = [excess(plan, runs, point, factor, trunk) for factor in plan.factors]
            low, b_crit, high = (
                _largest_within(plan.run.batch_tokens, found, tolerance, shift)
                for shift in (_STANDARD_ERRORS, 0.0, -_STANDARD_ERRORS)
            )
            run = plan.run
            loss = float(np.mean(list(trunk.values())))
            rows.append(BranchMeasurement(run.model.name, run.batch_tokens, run.seed, point, loss, b_crit, low, high))
    return rows


def write_branches(workdir: Path, rows: Sequence[BranchMeasurement]) -> None:
    write_rows(workdir / "branches.csv", BranchMeasurement, rows)


def read_branches(workdir: Path) -> list[BranchMeasurement]:
    """Every row of branches.csv; an empty list if there is no such file.

    Raises:
      UserError: if a line is damaged. Names the line.
    """
    path = workdir / "branches.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        try:
            return [_read_row(row, f"{path} line {rows.line_num}") for row in rows]
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} isn't a table ({error}): run the same branch command again") from None


class Comparison(NamedTuple):
    """Measurements of one model at one loss, in tokens: local B_crit of the scan, noise scale, B_crit of branches.

    These three are local: they belong to the next bit of loss. The scan's B_crit from the start stands beside them.
    """

    model: str
    loss: float  # nats per token
    scan: float  # from the start to the loss; NaN if not shown
    scan_low: float  # 95 % interval
    scan_high: float
    local: float  # NaN if not measured
    local_low: float  # 95 % interval
    local_high: float
    noise_scale: float  # median over runs; NaN if not measured, infinite if most are unresolved
    noise_scale_low: float  # the middle half of the runs
    noise_scale_high: float
    branches: float  # median over points and seeds; NaN if not measured
    branches_low: float  # medians of the ends of 95 % intervals
    branches_high: float


def compare(fit: ScanFit, noise: Sequence[NoiseMeasurement], branches: Sequence[BranchMeasurement]) -> list[Comparison]:
    """A row for each model and loss at which the scan's B_crit, from the start or the local one, is shown."""
    rows = []
    for point in fit.points:
        if not point.shown and math.isnan(point.local_b_crit):
            continue

        def near(measured, point=point):
            return [m for m in measured if m.model == point.model and abs(math.log(m.loss / point.loss)) < _NEAR]

        scales = [m.b_simple if m.resolved else math.inf for m in near(noise)]
        low, middle, high = np.quantile(scales, (0.25, 0.5, 0.75), method="nearest") if scales else (math.nan,) * 3
        here = near(branches)
        from_branches = [float(np.median([getattr(m, name) for m in here])) if here else math.nan for name in _ENDS]
        rows.append(
            Comparison(
                point.model,
                point.loss,
                *((point.b_crit, *point.b_crit_interval) if point.shown else (math.nan,) * 3),
                point.local_b_crit,
                *point.local_b_crit_interval,
                float(middle),
                float(low),
                float(high),
                *from_branches,
            )
        )
    return rows


def excess(plan: BranchPlan, runs: Runs, point: int, factor: int, trunk: Mapping[int, float]) -> Excess:
    """How far a branch was behind the run, averaged over the later half of its evaluations.

    Args:
      trunk: {tokens processed: test loss} of the run.
    """
    branch = plan.branch(point, factor)
    losses = _losses(runs, branch, point, plan.branch_tokens)
    both = sorted(trunk.keys() & losses.keys())[-_LAST:]
    differences = np.array([losses[tokens] - trunk[tokens] for tokens in both])
    if len(both) < _LAST or not np.all(np.isfinite(differences)):
        return Excess(branch.ramp[0].batch_tokens, math.nan, math.nan)
    return Excess(
        branch.ramp[0].batch_tokens,
        float(differences.mean()),
        float(differences.std(ddof=1) / math.sqrt(len(differences))),
    )


def _read_row(row: dict[str, str], where: str) -> BranchMeasurement:
    kinds = typing.get_type_hints(BranchMeasurement)
    try:
        return BranchMeasurement(**{name: kind(row[name]) for name, kind in kinds.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} isn't a branch measurement ({error}): run the same branch command again") from None


def _losses(runs: Runs, run: Run, after: int, tokens: int) -> dict[int, float]:
    """{tokens processed: test loss} at the evenly spaced evaluations; the last is NaN if the run diverged."""
    every = tokens // EVALUATIONS
    wanted = {after + k * every for k in range(1, EVALUATIONS + 1)}
    record = runs[run]
    evaluations = zip(record.course.eval_tokens.tolist(), record.course.eval_losses.tolist(), strict=True)
    losses = {at: loss for at, loss in evaluations if at in wanted}
    if record.result is not None and record.result.status == "diverged":
        losses[max(wanted)] = math.nan
    return losses


def _largest_within(batch_tokens: int, branches: list[Excess], tolerance: float, shift: float) -> float:
    """Batch size at which the excess, plus `shift` standard errors, reaches the tolerance; linear in log batch size."""
    before_batch, before = batch_tokens, 0.0
    for found in branches:
        here = found.mean + shift * found.standard_error
        if not here <= tolerance:
            if not math.isfinite(here):
                return float(before_batch)
            share = (tolerance - before) / (here - before)
            return float(math.exp(math.log(before_batch) + share * math.log(found.batch_tokens / before_batch)))
        before_batch, before = found.batch_tokens, here
    return math.inf
