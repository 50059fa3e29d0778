"""The critical batch size along a run, measured by branches (branches.csv); comparison with scan and noise scale."""

import csv
import dataclasses
import math
import typing
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaling_jax.fitting import ScanFit
from scaling_jax.io import UserError
from scaling_jax.io.files import cell_text, open_plain, write_rows
from scaling_jax.results.excess import excess, largest_within
from scaling_jax.results.measurements import NoiseMeasurement
from scaling_jax.results.runs import RunRecord
from scaling_jax.scanning.branches import BranchPlan
from scaling_jax.training import Run

TOLERANCE = 0.01  # nats per token; of the branch command, unless given
Runs = Mapping[Run, RunRecord]
_ENDS = ("b_crit", "low", "high")  # fields of BranchMeasurement
_NEAR = 0.04  # in log loss; a measurement this close to a loss counts for it


class BranchMeasurement(NamedTuple):
    """The critical batch size at one point of a run: the largest batch that kept up with the run, in tokens.

    The last three fields have the values of version 0.1, whose files don't hold them.
    """

    model: str
    batch_tokens: int  # of the run
    seed: int
    tokens: int  # where the branches start
    loss: float  # mean over the evaluations of the run after this point; nats per token
    b_crit: float  # inf: even the largest batch kept up, and B_crit is at least `low`
    low: float  # 95 % interval; from one replicate, version 0.1 gave one that is too narrow
    high: float  # inf: not bounded
    replicates: int = 1  # of each branch
    tolerance: float = math.nan  # nats per token that a branch may be above the run
    betas: str = "half-life"  # see `BranchPlan`


_REQUIRED = [name for name in BranchMeasurement._fields if name not in BranchMeasurement._field_defaults]


class Branched(NamedTuple):
    """The runs from one state of a run. Replicates are named by the tokens of text that they skip."""

    run: Run
    point: int  # tokens at which they start
    tokens: int  # that each of them trains on
    betas: str
    continued: Mapping[int, RunRecord]  # {skipped: the run itself from there on}
    branches: Mapping[int, Mapping[int, RunRecord]]  # {batch size in tokens: {skipped: the branch}}


def check_tolerance(tolerance: float) -> None:
    """Raises UserError unless the tolerance is positive and finite."""
    if not 0 < tolerance < math.inf:
        raise UserError(f"tolerance = {tolerance} nats per token must be positive and finite")


def measure_branches(branched: Iterable[Branched], tolerance: float) -> list[BranchMeasurement]:
    """One measurement for each state whose branches can be compared with the run.

    Args:
      branched: see `planned` and `branched_in`.
      tolerance: a branch keeps up if its loss is at most this much above the run's, in nats per token.
    """
    check_tolerance(tolerance)
    return [row for one in branched if (row := _measure(one, tolerance)) is not None]


def planned(plans: Iterable[BranchPlan], runs: Runs) -> list[Branched]:
    """The finished runs of plans. `runs` are all finished runs and their records."""
    return [
        Branched(
            plan.run,
            point,
            plan.branch_tokens,
            plan.betas,
            {_skipped(run): runs[run] for run in (plan.continued(point, r) for r in range(plan.replicates))},
            {
                factor * plan.run.batch_tokens: {
                    _skipped(run): runs[run] for run in (plan.branch(point, factor, r) for r in range(plan.replicates))
                }
                for factor in plan.factors
            },
        )
        for plan in plans
        for point in plan.points
    ]


def branched_in(records: Iterable[RunRecord]) -> list[Branched]:
    """The branches among the runs of a folder, also those of version 0.1, whatever plan they come from."""
    done = [record for record in records if record.result is not None and record.run.eval_every_tokens]
    trunks = [record for record in done if record.run.snapshot_tokens and not _parts(record.run)]
    groups: dict[tuple[Run, int, int], list[RunRecord]] = defaultdict(list)
    for record in done:
        run = record.run
        if _parts(run) and len(run.ramp) < 2 and run.max_tokens is not None:
            groups[_without_parts(run), run.parted_at, run.max_tokens - run.parted_at].append(record)
    found = []
    for (same, point, tokens), members in groups.items():
        trunk = next((t for t in trunks if _without_parts(t.run) == same and point in t.run.snapshot_tokens), None)
        if trunk is None:
            continue
        continued = {0: trunk} | {_skipped(record.run): record for record in members if not record.run.ramp}
        for betas in sorted({record.run.betas for record in members if record.run.ramp}):
            branches: dict[int, dict[int, RunRecord]] = defaultdict(dict)
            for record in members:
                if record.run.ramp and record.run.betas == betas:
                    branches[record.run.ramp[0].batch_tokens][_skipped(record.run)] = record
            found.append(Branched(trunk.run, point, tokens, betas, continued, branches))
    return sorted(found, key=lambda one: (one.run.model.name, one.run.batch_tokens, one.run.seed, one.point))


def find_branches(workdir: Path, records: Sequence[RunRecord]) -> tuple[list[BranchMeasurement], tuple[str, ...]]:
    """The measurements in branches.csv, and notes for the reader.

    If the file is damaged, they are measured again from the folder's runs. Without these, damaged lines are left out.
    """
    kept, problems = _read(workdir / "branches.csv")
    if not problems:
        return kept, ()
    rows = measure_branches(branched_in(records), TOLERANCE)
    now = (
        f"the branches were measured again from their runs, with a tolerance of {TOLERANCE} nats per token"
        if rows
        else f"such lines are left out ({len(problems)}), because the folder holds no runs of branches"
    )
    return rows or kept, (f"{problems[0]}; {now}",)


def write_branches(workdir: Path, rows: Sequence[BranchMeasurement]) -> None:
    write_rows(workdir / "branches.csv", BranchMeasurement, rows)


def read_branches(workdir: Path) -> list[BranchMeasurement]:
    """Every row of branches.csv; an empty list if there is no such file.

    Raises:
      UserError: if a line is damaged. Names the line.
    """
    rows, problems = _read(workdir / "branches.csv")
    if problems:
        raise UserError(f"{workdir}/{problems[0]}")
    return rows


class Comparison(NamedTuple):
    """Measurements of one model at one loss, in tokens: local B_crit of the scan, noise scale, B_crit of branches.

    These three are local: they belong to the next bit of loss. The scan's B_crit from the start stands beside them.
    """

    model: str
    loss: float  # nats per token
    scan: float  # from the start to the loss; NaN if not shown
    scan_low: float  # 95 % interval
    scan_high: float
    noise_scale: float  # median over runs; NaN if not measured, infinite if most are unresolved
    noise_scale_low: float  # the middle half of the runs
    noise_scale_high: float
    branches: float  # median over points and seeds; NaN if not measured
    branches_low: float  # medians of the ends of 95 % intervals
    branches_high: float
    local: float  # by the scan; NaN if not measured
    local_low: float  # 95 % interval
    local_high: float


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
        branches_b_crit, branches_low, branches_high = (
            float(np.median([getattr(m, name) for m in here])) if here else math.nan for name in _ENDS
        )
        rows.append(
            Comparison(
                point.model,
                point.loss,
                *((point.b_crit, *point.b_crit_interval) if point.shown else (math.nan, math.nan, math.nan)),
                float(middle),
                float(low),
                float(high),
                branches_b_crit,
                branches_low,
                branches_high,
                point.local_b_crit,
                *point.local_b_crit_interval,
            )
        )
    return rows


def _measure(branched: Branched, tolerance: float) -> BranchMeasurement | None:
    """None if the run and its branches have no evaluations at the same tokens."""
    window = range(branched.point + 1, branched.point + branched.tokens + 1)
    of_run = {
        skipped: losses
        for skipped, record in branched.continued.items()
        if not _diverged(record) and (losses := _losses(record, window))
    }
    later_half = range(branched.point + branched.tokens // 2 + 1, window.stop)
    found, fewest = [], len(of_run)
    for batch_tokens in sorted(branched.branches):
        differences = []
        for skipped in sorted(of_run.keys() & branched.branches[batch_tokens].keys()):
            record = branched.branches[batch_tokens][skipped]
            losses, beside = _losses(record, later_half), of_run[skipped]
            if _diverged(record):
                differences.append(np.array([math.inf]))
            elif both := sorted(losses.keys() & beside.keys()):
                differences.append(np.array([losses[tokens] - beside[tokens] for tokens in both]))
        if differences:
            found.append(excess(batch_tokens, differences))
            fewest = min(fewest, len(differences))
    if not found:
        return None
    run = branched.run
    loss = float(np.mean([np.mean(list(losses.values())) for losses in of_run.values()]))
    ends = largest_within(run.batch_tokens, found, tolerance)
    point = (run.model.name, run.batch_tokens, run.seed, branched.point)
    return BranchMeasurement(*point, loss, *ends, fewest, tolerance, branched.betas)


def _losses(record: RunRecord, within: range) -> dict[int, float]:
    """{tokens processed: test loss} at the evaluations that are evenly spaced in tokens."""
    every = record.run.eval_every_tokens
    assert every is not None
    evaluations = zip(record.course.eval_tokens.tolist(), record.course.eval_losses.tolist(), strict=True)
    return {tokens: loss for tokens, loss in evaluations if tokens in within and tokens % every == 0}


def _diverged(record: RunRecord) -> bool:
    return record.result is not None and record.result.status == "diverged"


def _skipped(run: Run) -> int:
    return 0 if run.skip is None else run.skip.tokens


def _parts(run: Run) -> bool:
    """True if the run has what parts a branch or a replicate from its trunk."""
    return bool(run.ramp) or run.skip is not None


def _without_parts(run: Run) -> Run:
    """What a run, its replicates and its branches have in common."""
    return dataclasses.replace(run, ramp=(), skip=None, betas="half-life", snapshot_tokens=(), max_tokens=1)


def _read(path: Path) -> tuple[list[BranchMeasurement], list[str]]:
    """The rows that can be read, and what is wrong with the others."""
    found: list[BranchMeasurement] = []
    problems: list[str] = []
    if not path.exists():
        return found, problems
    with open_plain(path, "r", encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file)
        try:
            if missing := set(_REQUIRED) - set(rows.fieldnames or ()):
                problems.append(f"{path.name} lacks {', '.join(sorted(missing))}: run the same branch command again")
                return found, problems
            for row in rows:
                try:
                    found.append(_read_row(row))
                except (TypeError, ValueError) as error:
                    where = f"{path.name} line {rows.line_num}"
                    problems.append(f"{where} isn't a branch measurement ({error}): run the same branch command again")
        except (csv.Error, UnicodeDecodeError) as error:
            problems.append(f"{path.name} isn't a table ({error}): run the same branch command again")
    return found, problems


def _read_row(row: dict[str, str]) -> BranchMeasurement:
    kinds = typing.get_type_hints(BranchMeasurement)
    if None in row.values():
        raise ValueError("the line is cut off")
    values: dict[str, Any] = {name: kind(cell_text(row[name])) for name, kind in kinds.items() if name in row}
    found = BranchMeasurement(**values)
    if any(math.isnan(value) for value in (found.loss, found.b_crit, found.low, found.high)):
        raise ValueError("a value is nan")
    for name in ("batch_tokens", "loss", "b_crit", "high"):
        if not getattr(found, name) > 0:
            raise ValueError(f"{name} = {getattr(found, name)} isn't positive")
    if not (
        found.low >= 0 and found.loss < math.inf and max(found.batch_tokens, abs(found.seed), found.tokens) < 2**63
    ):
        raise ValueError("a value is out of range")
    if "replicates" not in row and found.low == found.high == found.batch_tokens:
        raise ValueError("version 0.1 measured nothing here")  # it evaluated the run at other tokens than its branches
    return found
