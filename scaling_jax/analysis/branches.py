"""The critical batch size along a run, from its branches: branches.csv."""

import csv
import math
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from scaling_jax.analysis.csv_rows import write_rows
from scaling_jax.errors import UserError
from scaling_jax.scanning.branches import EVALUATIONS, BranchPlan
from scaling_jax.training import Run, read_metrics, run_folder

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


def write_branches(plans: Iterable[BranchPlan], workdir: Path, tolerance: float) -> list[BranchMeasurement]:
    """Measures trained branches and writes `branches.csv`.

    Args:
      tolerance: nats per token by which a branch may fall behind.
    """
    check_tolerance(tolerance)
    rows = [row for plan in plans for row in measure_branches(plan, workdir, tolerance)]
    write_rows(workdir / "branches.csv", BranchMeasurement, rows)
    return rows


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


def measure_branches(plan: BranchPlan, workdir: Path, tolerance: float) -> list[BranchMeasurement]:
    """One measurement for each point; `tolerance` in nats per token."""
    rows = []
    for point in plan.points:
        trunk = _losses(workdir, plan.trunk, point, plan.branch_tokens)
        found = [excess(plan, workdir, point, factor, trunk) for factor in plan.factors]
        low, b_crit, high = (
            _largest_within(plan.run.batch_tokens, found, tolerance, shift)
            for shift in (_STANDARD_ERRORS, 0.0, -_STANDARD_ERRORS)
        )
        run = plan.run
        loss = float(np.mean(list(trunk.values())))
        rows.append(BranchMeasurement(run.model.name, run.batch_tokens, run.seed, point, loss, b_crit, low, high))
    return rows


def excess(plan: BranchPlan, workdir: Path, point: int, factor: int, trunk: Mapping[int, float]) -> Excess:
    """How far a branch fell behind the run, over the evaluations of its later half.

    Args:
      trunk: the run's own test losses, by tokens processed.
    """
    branch = plan.branch(point, factor)
    losses = _losses(workdir, branch, point, plan.branch_tokens)
    both = sorted(trunk.keys() & losses.keys())[-_LAST:]
    differences = np.array([losses[tokens] - trunk[tokens] for tokens in both])
    if len(both) < _LAST or not np.all(np.isfinite(differences)):
        return Excess(branch.ramp[0].batch_tokens, math.nan, math.nan)
    return Excess(
        branch.ramp[0].batch_tokens,
        float(differences.mean()),
        float(differences.std(ddof=1) / math.sqrt(len(differences))),
    )


def _losses(workdir: Path, run: Run, after: int, tokens: int) -> dict[int, float]:
    """Test losses by tokens processed, at the evenly spaced evaluations of a stretch."""
    every = tokens // EVALUATIONS
    wanted = {after + k * every for k in range(1, EVALUATIONS + 1)}
    lines = [line for line in read_metrics(run_folder(workdir, run)) if "test_loss" in line]
    return {
        line["tokens"]: math.nan if line["test_loss"] is None else line["test_loss"]
        for line in lines
        if line["tokens"] in wanted
    }


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
