"""A budget scan on the console: its progress, its plan, and how far it is."""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from rich.console import Group as Rows
from rich.text import Text

from scaling_jax.console.dashboards import Follower, Writer
from scaling_jax.console.grid import Grid
from scaling_jax.console.signals import leave, sigterm_interrupts
from scaling_jax.console.terminal import Terminal
from scaling_jax.report.units import in_unit
from scaling_jax.report.words import clock, duration, short
from scaling_jax.scanning import Event
from scaling_jax.scanning.budget_plan import USUAL_RATES, BudgetPlan
from scaling_jax.scanning.budget_runs import RateDone, scan_budgets
from scaling_jax.scanning.budget_scan import BudgetScan
from scaling_jax.scanning.budget_search import CellSearch
from scaling_jax.scanning.experiment import Cell
from scaling_jax.training import Interrupted, Progress

_GIB = 2**30
_SHARE_FOR_ESTIMATE = 0.02  # of the tokens, before which the time left isn't told


def budget_scan_on_console(scan: BudgetScan, results: Path, writers: Iterable[Callable[[Path], Writer]] = ()) -> Path:
    """Runs a budget scan, prints a line for each learning rate, and returns the path of the table.

    Raises:
      UserError, KeyboardInterrupt: see `scan_budgets`.
      SystemExit: with code 0, after SIGTERM stopped the scan.
    """
    console = Terminal(functools.partial(in_unit, unit=scan.unit))
    console.print(f"{scan.name}: results in {results}", soft_wrap=True)
    with contextlib.ExitStack() as stack:
        followers = [stack.enter_context(Follower(results, writer)) for writer in writers]
        progress = _ProgressOf(scan)
        status = stack.enter_context(console.status("starting")) if console.is_terminal else None

        def on_event(event: Event) -> None:
            if event.cell is None:
                console.print("stopping: runs are being saved …")
            elif event.progress is not None:
                progress.at(event.cell, event.progress)
                if status is not None:
                    status.update(in_unit(progress.in_words(), scan.unit))
            for follower in followers:
                follower.look()

        def on_rate(done: RateDone) -> None:
            console.print(progress.after(done), soft_wrap=True)

        terminated = stack.enter_context(sigterm_interrupts())
        try:
            return scan_budgets(scan, results, on_event=on_event, on_rate=on_rate)
        except (KeyboardInterrupt, Interrupted) as stopped:
            leave(isinstance(stopped, KeyboardInterrupt) and not terminated(), console.print)


class _ProgressOf:
    """What is done of a scan, by tokens."""

    def __init__(self, scan: BudgetScan):
        self._scan = scan
        self._tokens = {cell: scan.plan(cell, 0).num_tokens for cell in scan.cells}
        self._running: dict[str, tuple[Cell, Progress]] = {}  # by run
        self._spent = 0  # tokens of the learning rates that are done since the start
        self._started = time.monotonic()

    def at(self, cell: Cell, progress: Progress) -> None:
        same = [
            name for name, (c, p) in self._running.items() if (c, p.learning_rate) == (cell, progress.learning_rate)
        ]
        for name in same:
            del self._running[name]
        self._running[progress.run_id] = cell, progress

    def in_words(self) -> str:
        """The runs in training."""
        return "; ".join(
            f"{cell.name}, lr {p.learning_rate:.3g}: step {p.step:,} of {p.last_step:,}, loss {p.test_loss:.3f}"
            for cell, p in sorted(self._running.values(), key=lambda entry: entry[0])
        )

    def after(self, done: RateDone) -> str:
        """The line for a learning rate that is done."""
        self._running = {
            name: (cell, p)
            for name, (cell, p) in self._running.items()
            if (cell, p.learning_rate) != (done.cell, done.learning_rate)
        }
        self._spent += self._tokens[done.cell]
        searches = done.searches
        ended = sum(not search.wanted for search in searches.values())
        losses = ", ".join("diverged" if math.isinf(loss) else f"{loss:.3f}" for loss in done.losses)
        return (
            f"{clock(time.monotonic() - self._started)}  {ended} of {len(self._tokens)} batch sizes done, "
            f"{self._time_left(searches)} left  {done.cell.name}, lr {done.learning_rate:.3g}: {losses}"
        )

    def _time_left(self, searches: Mapping[Cell, CellSearch]) -> str:
        left = 0
        for cell, tokens in self._tokens.items():
            search = searches.get(cell)
            if search is None or search.wanted:
                left += tokens * max(USUAL_RATES - (0 if search is None else len(search.tried)), 1)
        if self._spent < _SHARE_FOR_ESTIMATE * (self._spent + left):
            return "…"
        return f"about {clock((time.monotonic() - self._started) * left / self._spent)}"


def budget_plan_table(plan: BudgetPlan) -> Rows:
    """What each missing batch size takes, and the totals."""
    rows = [
        (
            c.cell.name,
            str(c.horizons),
            short(c.trunk_tokens),
            short(c.decay_tokens),
            f"{c.tokens / c.longest_tokens:.2f}",
            f"{c.tokens / c.separate_tokens:.2f}",
            f"{c.least_left}–{c.most_left}",
        )
        for c in plan.cells
    ]
    columns = (
        "model · batch",
        "horizons",
        "trunk",
        "decays",
        "× its\nlongest run",
        "× a run for\neach horizon",
        "rates",
    )
    table = Grid(
        columns, rows, "Tokens of one learning rate: a trunk, and a decay for each horizon", columns[:1], heads=2
    )
    cells = plan.cells
    usual, least, most = (sum(getattr(c, f"{name}_left") for c in cells) for name in ("usual", "least", "most"))
    longest = sum(c.usual_left * c.longest_tokens for c in cells)
    beside = f"; the longest runs alone would take {short(longest)}" if cells else ""
    lines = [
        f"{len(cells)} batch sizes to train, {plan.cells_done} done; {least} to {most} learning rates, usually about "
        f"{usual}; {plan.workers} at a time",
        f"usually: {duration(plan.usual_seconds)}, {short(plan.usual_tokens)} tokens, "
        f"{sum(c.usual_left * c.runs for c in cells):,} runs{beside}",
        f"at most: {duration(plan.most_seconds)}, {short(plan.most_tokens)} tokens, if every learning rate is tried",
        f"times: from steps of {', '.join(plan.timed)}, timed now on this machine, as busy as it is"
        if plan.timed
        else "times: from FLOPs; no steps could be timed in a few seconds",
        f"memory: {plan.bytes_needed / _GIB:.1f} GiB for a run at most; there are "
        f"{plan.bytes_available / _GIB:.1f} GiB for each of {plan.workers} at a time",
    ]
    return Rows(table, *(Text(line) for line in lines))
