"""How far the scan in a results folder is, from its files alone: while it runs, and after it died."""

import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.console import Group as Rows
from rich.table import Table
from rich.text import Text

from scaling_jax.analysis import read_experiment
from scaling_jax.analysis.numbers import short as tokens
from scaling_jax.scanning import relative_cost
from scaling_jax.scanning.search import finished
from scaling_jax.training.records import read_run_config, read_timed_metrics

USUAL_RATES = 3  # tried for a batch size, by and large
RECENT_SECONDS = 60.0  # over which tokens/s are counted

State = Literal["done", "running", "interrupted", "missing"]


class GroupStatus(NamedTuple):
    """One model, batch size and seed; what is of its newest run is None before there is one."""

    name: str
    state: State
    rates_tried: int
    learning_rate: float | None = None
    step: int | None = None
    test_loss: float | None = None  # the newest one, nats per token
    tokens_per_second: float | None = None  # None where it isn't running
    seconds_ago: float | None = None  # since the newest run's last sign of life


class ScanStatus(NamedTuple):
    """A scan; `running` is None where the system can't tell."""

    name: str
    running: bool | None
    groups: list[GroupStatus]
    fraction: float  # of the expected cost
    seconds_left: float | None  # roughly; None where it can't be told


class _RunFiles(NamedTuple):
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    done_at: float | None  # seconds since 1970
    touched_at: float


def read_status(workdir: Path) -> ScanStatus:
    """Reads what a scan wrote so far.

    Raises:
      UserError: if the folder holds no scan.
    """
    experiment, now = read_experiment(workdir), time.time()
    running, since = _in_use(workdir)
    files: dict[tuple, list[_RunFiles]] = {}
    for folder in (workdir / "runs").glob("*"):
        found = _read_run(folder)
        if found is not None and not found.config.get("ramp"):
            key = (_size(found.config["model"]), found.config["batch_tokens"], found.config["seed"])
            files.setdefault(key, []).append(found)
    groups, cost, spent, spent_before = [], 0.0, 0.0, 0.0
    for group in experiment.groups:
        model = group.subject.model
        runs = files.get(((model.n_layer, model.d_model), group.batch_tokens, group.seed), [])
        complete = bool(runs) and finished(experiment, group, workdir) is not None
        groups.append(_group_status(group.name, runs, complete, running, since, now))
        before = [run for run in runs if run.done_at is not None and run.done_at < since]
        was_complete = complete and len(before) == len(runs)
        weight = relative_cost(group)
        cost += weight
        spent += weight * (1.0 if complete else part_done(sum(map(_part, runs))))
        spent_before += weight * (1.0 if was_complete else part_done(len(before)))
    left = None
    if running and spent - spent_before > 0.02 * cost:
        left = (now - since) * (cost - spent) / (spent - spent_before)
    return ScanStatus(experiment.name, running, groups, spent / cost, left)


def part_done(rates_tried: float) -> float:
    """How much of an unfinished group's cost is spent, by the rates tried; parts of runs count as such."""
    return min(0.95, rates_tried / USUAL_RATES)


def print_status(status: ScanStatus) -> Rows:
    """A line that sums up, and a row for each group."""
    count = {state: sum(g.state == state for g in status.groups) for state in ("done", "running", "missing")}
    head = f"{status.name}: {count['done']} of {len(status.groups)} batch sizes done"
    if count["done"] < len(status.groups):
        others = len(status.groups) - sum(count.values())
        head += f", {count['running']} running" * bool(status.running) + f", {others} interrupted" * bool(others)
        head += f", {count['missing']} not begun · {100 * status.fraction:.0f} % of the work"
        if status.seconds_left is not None:
            head += f" · about {duration(status.seconds_left)} left"
        if status.running is False:
            head += "\nIt isn't running: the same command continues it."
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("model · batch", "", "rates", "learning rate", "step", "test loss", "tokens/s", "ago"):
        table.add_column(column, justify="left" if column in ("model · batch", "") else "right", no_wrap=True)
    for g in status.groups:
        newest = (
            "" if g.learning_rate is None else f"{g.learning_rate:.3g}",
            "" if g.step is None else f"{g.step:,}",
            "" if g.test_loss is None else f"{g.test_loss:.3f}",
            "" if g.tokens_per_second is None else tokens(g.tokens_per_second),
            "" if g.seconds_ago is None else duration(g.seconds_ago),
        )
        table.add_row(g.name, g.state, str(g.rates_tried or ""), *(() if g.state == "done" else newest))
    return Rows(Text(head), table)


def duration(seconds: float) -> str:
    """0:09, 12:34 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _group_status(
    name: str, runs: list[_RunFiles], complete: bool, running: bool | None, since: float, now: float
) -> GroupStatus:
    if not runs:
        return GroupStatus(name, "missing", 0)
    newest = max(runs, key=lambda run: run.touched_at)
    alive = running is not False and newest.touched_at >= since
    losses = [line["test_loss"] for line in newest.metrics if line.get("test_loss") is not None]
    return GroupStatus(
        name=name,
        state="done" if complete else "running" if alive else "interrupted",
        rates_tried=len(runs),
        learning_rate=newest.config["learning_rate"],
        step=newest.metrics[-1]["step"] if newest.metrics else None,
        test_loss=losses[-1] if losses else None,
        tokens_per_second=None if complete or not alive else _tokens_per_second(newest.metrics, since),
        seconds_ago=now - newest.touched_at,
    )


def _tokens_per_second(metrics: list[dict[str, Any]], since: float) -> float | None:
    """From the lines' own times, of this session and lately; None for lines that have none."""
    timed = [line for line in metrics if line.get("time", 0.0) >= since]
    recent = [line for line in timed if line["time"] > timed[-1]["time"] - RECENT_SECONDS]
    if len(recent) < 2 or recent[-1]["time"] <= recent[0]["time"]:
        return None
    return (recent[-1]["tokens"] - recent[0]["tokens"]) / (recent[-1]["time"] - recent[0]["time"])


def _part(run: _RunFiles) -> float:
    """How much of a run is done; a group's first runs know no last step."""
    if run.done_at is not None:
        return 1.0
    most = run.config.get("max_steps")
    return min(1.0, run.metrics[-1]["step"] / most) if most and run.metrics else 0.5


def _read_run(folder: Path) -> _RunFiles | None:
    """None for a folder in which nothing has begun."""
    paths = [path for name in ("config.json", "metrics.jsonl", "result.json") if (path := folder / name).exists()]
    if not paths or paths[0].name != "config.json":
        return None
    times = {path.name: path.stat().st_mtime for path in paths}
    config = read_run_config(folder)["run"]
    return _RunFiles(config, read_timed_metrics(folder), times.get("result.json"), max(times.values()))


def _size(model: dict[str, Any]) -> tuple[int, int]:
    return model["n_layer"], model["d_model"]


def _in_use(workdir: Path) -> tuple[bool | None, float]:
    """Whether a scan holds the folder's lock, and since when it or the last one did, in seconds since 1970."""
    path = workdir / ".lock"
    try:
        file = path.open()
    except FileNotFoundError:
        return False, 0.0
    with file:
        since = path.stat().st_mtime
        try:
            import fcntl
        except ImportError:  # not on Windows
            return None, since
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError:
            return True, since
        return False, since
