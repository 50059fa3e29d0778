"""How far what a folder holds is, from its files alone: while it is trained, and after its processes died."""

import math
import time
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np

from scaling_jax.io.locks import lock_state
from scaling_jax.results.results import Results, missing_cells, read_results
from scaling_jax.results.runs import RunRecord, deal_by_cell
from scaling_jax.scanning import relative_cost
from scaling_jax.training.records import read_clock

USUAL_RATES = 3  # tried for a batch size, by and large
RECENT_SECONDS = 60.0  # over which tokens/s are counted

State = Literal["done", "running", "interrupted", "not begun"]


class PartStatus(NamedTuple):
    """A cell of a scan, or a single run; what is of its newest run is None before there is one."""

    name: str
    state: State
    rates_tried: int
    learning_rate: float | None = None
    step: int | None = None
    test_loss: float | None = None  # the newest one, nats per token
    tokens_per_second: float | None = None  # None where it isn't running
    seconds_ago: float | None = None  # since the newest run's last sign of life


class Status(NamedTuple):
    """A folder; `running` is None where the system can't tell."""

    name: str
    what: Literal["batch sizes", "runs"]
    running: bool | None
    parts: list[PartStatus]
    fraction: float  # of the expected cost
    seconds_left: float | None  # roughly; None where it can't be told


class _Seen(NamedTuple):
    """A run, and its files' times in seconds since 1970."""

    record: RunRecord
    done_at: float | None
    touched_at: float


def read_status(folder: str | Path) -> Status:
    """Reads what a scan, or single runs, wrote so far.

    Raises:
      UserError: if the folder holds neither.
    """
    results = read_results(folder)
    seen = [_see(record) for record in results.runs]
    return _of_runs(results, seen) if results.experiment is None else _of_scan(results, seen)


def part_done(rates_tried: float) -> float:
    """How much of an unfinished cell's cost is spent, by the rates tried; parts of runs count as such."""
    return min(0.95, rates_tried / USUAL_RATES)


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
    """From the evaluations' own times, of this session and lately; None where there are too few."""
    times = read_clock(record.folder)
    tokens = dict(zip(record.course.eval_steps.tolist(), record.course.eval_tokens.tolist(), strict=True))
    timed = np.array([(times[step], n) for step, n in tokens.items() if times.get(step, 0.0) >= since])
    if not len(timed):
        return None
    recent = timed[timed[:, 0] > timed[-1, 0] - RECENT_SECONDS]
    seconds, processed = recent[-1] - recent[0]
    return float(processed / seconds) if len(recent) > 1 and seconds > 0 else None


def _share(run: _Seen) -> float:
    """How much of a run is done; a cell's first runs know no last step."""
    if run.done_at is not None:
        return 1.0
    steps, most = run.record.course.line_steps.sum(), run.record.run.max_steps
    return min(1.0, float(steps) / most) if most and steps else 0.5


def _see(record: RunRecord) -> _Seen:
    paths = [record.folder / name for name in ("config.json", "metrics.jsonl", "result.json")]
    times = {path.name: path.stat().st_mtime for path in paths if path.exists()}
    return _Seen(record, times.get("result.json"), max(times.values(), default=math.nan))
