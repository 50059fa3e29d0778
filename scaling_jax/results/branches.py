"""The critical batch size along a run, from its branches: branches.csv."""

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
_LAST = EVALUATIONS // 2  # evaluations at a branch's end that are averaged
_STANDARD_ERRORS = 1.96  # of a 95 % interval


class BranchMeasurement(NamedTuple):
    """The largest batch that kept up with a run over a stretch of it; batch quantities in tokens."""

    model: str
    batch_tokens: int  # the run's own
    seed: int
    tokens: int  # where the branches start
    loss: float  # of the run, mean over the stretch; nats per token
    b_crit: float  # inf: the largest tried kept up
    low: float
    high: float


class Excess(NamedTuple):
    """Test loss of a branch above that of the run after as many tokens, nats per token."""

    batch_tokens: int
    mean: float  # NaN: the branch diverged
    standard_error: float


def check_tolerance(tolerance: float) -> None:
    """Raises UserError unless it is positive and finite, before anything is trained for it."""
    if not 0 < tolerance < math.inf:
        raise UserError(f"tolerance = {tolerance} must be positive and finite: nats per token")


def measure_branches(plans: Iterable[BranchPlan], runs: Runs, tolerance: float) -> list[BranchMeasurement]:
    """One measurement for each point of each plan.

    Args:
      runs: that are done, by their values.
      tolerance: nats per token by which a branch may fall behind.
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
    """Every row of `branches.csv`; none if there is no such file.

    Raises:
      UserError: naming the line that doesn't hold what it should.
    """
    path = workdir / "branches.csv"
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        try:
            return [_read_row(row, f"{path} line {rows.line_num}") for row in rows]
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} isn't a table ({error}): measure the branches again") from None


def _read_row(row: dict[str, str], where: str) -> BranchMeasurement:
    kinds = typing.get_type_hints(BranchMeasurement)
    try:
        return BranchMeasurement(**{name: kind(row[name]) for name, kind in kinds.items()})
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where} isn't a branch measurement ({error}): measure the branches again") from None


def excess(plan: BranchPlan, runs: Runs, point: int, factor: int, trunk: Mapping[int, float]) -> Excess:
    """How far a branch fell behind the run, over the evaluations of its later half.

    Args:
      trunk: the run's own test losses, by tokens processed.
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


def _losses(runs: Runs, run: Run, after: int, tokens: int) -> dict[int, float]:
    """Test losses by tokens processed, at evenly spaced evaluations; NaN at the end for a run that diverged."""
    every = tokens // EVALUATIONS
    wanted = {after + k * every for k in range(1, EVALUATIONS + 1)}
    record = runs[run]
    evaluations = zip(record.course.eval_tokens.tolist(), record.course.eval_losses.tolist(), strict=True)
    losses = {at: loss for at, loss in evaluations if at in wanted}
    if record.result is not None and record.result.status == "diverged":
        losses[max(wanted)] = math.nan
    return losses


def _largest_within(batch_tokens: int, branches: list[Excess], tolerance: float, shift: float) -> float:
    """Where the excess, moved by `shift` standard errors, passes the tolerance; interpolated in log batch size."""
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


_ENDS = ("b_crit", "low", "high")  # of a branch measurement
_NEAR = 0.04  # of log loss: measurements so close to a loss count as its


class Comparison(NamedTuple):
    """One model at one loss of the scan's fit; tokens, with 95 % intervals or, for several runs, the middle half."""

    model: str
    loss: float  # nats per token
    scan: float
    scan_low: float
    scan_high: float
    noise_scale: float  # median over runs; NaN where none was measured, infinite where most are unresolved
    noise_scale_low: float
    noise_scale_high: float
    branches: float  # median over points and seeds; NaN where none was measured
    branches_low: float
    branches_high: float


def compare(fit: ScanFit, noise: Sequence[NoiseMeasurement], branches: Sequence[BranchMeasurement]) -> list[Comparison]:
    """A row for each loss at which the scan's B_crit enters its law."""
    rows = []
    for point in fit.points:
        if not point.in_law:
            continue

        def near(measured, point=point):
            return [m for m in measured if m.model == point.model and abs(math.log(m.loss / point.loss)) < _NEAR]

        scales = [m.b_simple if m.resolved else math.inf for m in near(noise)]
        low, middle, high = np.quantile(scales, (0.25, 0.5, 0.75), method="nearest") if scales else (math.nan,) * 3
        here = near(branches)
        from_branches = [float(np.median([getattr(m, name) for m in here])) if here else math.nan for name in _ENDS]
        scan = point.tradeoff
        rows.append(
            Comparison(
                point.model,
                point.loss,
                scan.b_crit,
                *scan.b_crit_interval,
                float(middle),
                float(low),
                float(high),
                *from_branches,
            )
        )
    return rows
