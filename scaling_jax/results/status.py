"""How far a scan or a run is, from its files alone: during training, and after its processes have ended."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from scaling_jax.io.locks import lock_state
from scaling_jax.io.stores import working_copy
from scaling_jax.results.results import Results, missing_cells, read_results
from scaling_jax.results.runs import RunRecord, deal_by_cell, read_runs
from scaling_jax.scanning import relative_cost
from scaling_jax.scanning.budget_plan import USUAL_RATES as BUDGET_RATES
from scaling_jax.scanning.budget_records import finder, is_budget_scan, read_budget_scan
from scaling_jax.scanning.budget_search import search_all
from scaling_jax.training.records import read_clock

USUAL_RATES = 3  # learning rates that a cell usually tries
RECENT_SECONDS = 60.0  # time over which tokens/s are counted

State = Literal["done", "running", "interrupted", "not begun"]


class PartStatus(NamedTuple):
    """State of a cell of a scan, or of a single run. The values from `learning_rate` on are of its newest run."""

    name: str
    state: State
    rates_tried: int
    learning_rate: float | None = None  # None, like the values below, before the first run
    step: int | None = None
    test_loss: float | None = None  # at the last evaluation, nats per token
    tokens_per_second: float | None = None  # None if it isn't running
    seconds_ago: float | None = None  # since the run last wrote to its files


class Status(NamedTuple):
    """State of a results folder."""

    name: str
    what: Literal["batch sizes", "runs"]  # what `parts` are
    running: bool | None  # None if the system can't tell
    parts: list[PartStatus]
    fraction: float  # part of the expected cost that is done
    seconds_left: float | None  # an estimate; None if there is none


def read_status(folder: str | Path, on_run: Callable[[int, int], object] = lambda done, total: None) -> Status:
    """The state of a scan, a budget scan or single runs, from what they have written so far.

    Args:
      on_run: see `read_results`.

    Raises:
      UserError: if the folder holds no results.
    """
    workdir = working_copy(folder)
    if is_budget_scan(workdir):
        return _of_budgets(workdir, [_see(record) for record in read_runs(workdir, on_run)])
    results = read_results(workdir, on_run=on_run)
    seen = [_see(record) for record in results.runs]
    return _of_runs(results, seen) if results.experiment is None else _of_scan(results, seen)


def part_done(rates_tried: float) -> float:
    """Estimated part of an unfinished cell that is done. `rates_tried` counts unfinished runs as fractions."""
    return min(0.95, rates_tried / USUAL_RATES)


class _Seen(NamedTuple):
    """A run and the times of its files, in seconds since 1970."""

    record: RunRecord
    done_at: float | None
    touched_at: float


def _of_scan(results: Results, seen: list[_Seen]) -> Status:
    experiment, now = results.scan, time.time()
    running, since = lock_state(results.folder / ".lock")
    missing = set(missing_cells(results))
    by_cell = deal_by_cell(experiment, results.runs)
    files = {run.record.run_id: run for run in seen}
    parts, cost, spent, spent_before = [], 0.0, 0.0, 0.0
    for cell in experiment.cells:
        runs = [files[record.run_id] for record in by_cell.get(cell, ())]
        complete = cell not in missing
        parts.append(_part_status(cell.name, runs, complete, running, since, now))
        before = [run for run in runs if run.done_at is not None and run.done_at < since]
        was_complete = complete and len(before) == len(runs)
        weight = relative_cost(experiment, cell)
        cost += weight
        spent += weight * (1.0 if complete else part_done(sum(map(_share, runs))))
        spent_before += weight * (1.0 if was_complete else part_done(len(before)))
    left = None
    if running and spent - spent_before > 0.02 * cost:
        left = (now - since) * (cost - spent) / (spent - spent_before)
    return Status(experiment.name, "batch sizes", running, parts, spent / cost, left)


def _of_budgets(workdir: Path, seen: list[_Seen]) -> Status:
    scan, now = read_budget_scan(workdir), time.time()
    running, since = lock_state(workdir / ".lock")
    searches = search_all(scan, finder(scan, workdir))
    of_cell = {cell: [r for r in seen if cell == (r.record.run.model.name, *_batch_and_seed(r))] for cell in scan.cells}
    parts, cost, spent = [], 0, 0
    for cell in scan.cells:
        search, tokens = searches.get(cell), scan.plan(cell, 0).num_tokens
        tried = 0 if search is None else len(search.tried)
        complete = search is not None and not search.wanted
        parts.append(_part_status(cell.name, of_cell[cell], complete, running, since, now))
        spent += tokens * tried
        cost += tokens * (tried if complete else max(BUDGET_RATES, tried + 1))
    return Status(scan.name, "batch sizes", running, parts, spent / cost, None)


def _batch_and_seed(run: _Seen) -> tuple[int, int]:
    return run.record.run.batch_tokens, run.record.run.seed


def _of_runs(results: Results, seen: list[_Seen]) -> Status:
    now, parts, shares = time.time(), [], []
    states = {run.record.run_id: lock_state(run.record.folder / ".lock") for run in seen}
    for run in seen:
        held, since = states[run.record.run_id]
        done = run.done_at is not None
        parts.append(_part_status(run.record.run.label, [run], done, held, since, now))
        shares.append(_share(run))
    running = any(state.held for state in states.values())
    return Status(results.folder.name, "runs", running, parts, sum(shares) / len(shares), None)


def _part_status(
    name: str, runs: list[_Seen], complete: bool, running: bool | None, since: float, now: float
) -> PartStatus:
    if not runs:
        return PartStatus(name, "not begun", 0)
    newest = max(runs, key=lambda run: run.touched_at)
    alive = running is not False and newest.touched_at >= since
    course = newest.record.course
    return PartStatus(
        name=name,
        state="done" if complete else "running" if alive else "interrupted",
        rates_tried=len({run.record.run.learning_rate for run in runs}),
        learning_rate=newest.record.run.learning_rate,
        step=int(course.line_steps.sum()) or None,
        test_loss=float(course.eval_losses[-1]) if len(course.eval_losses) else None,
        tokens_per_second=None if complete or not alive else _tokens_per_second(newest.record, since),
        seconds_ago=now - newest.touched_at,
    )


def _tokens_per_second(record: RunRecord, since: float) -> float | None:
    """Speed over the last evaluations since the process started; None if there are too few."""
    times = read_clock(record.folder)
    tokens = dict(zip(record.course.eval_steps.tolist(), record.course.eval_tokens.tolist(), strict=True))
    timed = np.array([(times[step], n) for step, n in tokens.items() if times.get(step, 0.0) >= since])
    if not len(timed):
        return None
    recent = timed[timed[:, 0] > timed[-1, 0] - RECENT_SECONDS]
    seconds, processed = recent[-1] - recent[0]
    return float(processed / seconds) if len(recent) > 1 and seconds > 0 else None


def _share(run: _Seen) -> float:
    """Part of a run that is done; 0.5 if its last step isn't known, as for a cell's first runs."""
    if run.done_at is not None:
        return 1.0
    steps, most = run.record.course.line_steps.sum(), run.record.run.max_steps
    return min(1.0, float(steps) / most) if most and steps else 0.5


def _see(record: RunRecord) -> _Seen:
    paths = [record.folder / name for name in ("config.json", "metrics.jsonl", "result.json")]
    times = {path.name: path.stat().st_mtime for path in paths if path.exists()}
    return _Seen(record, times.get("result.json"), max(times.values(), default=math.nan))
