"""The progress of a scan: a live table on a terminal, else a line now and then."""

import math
import time
from collections.abc import Collection

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from scaling_jax.console.grid import Grid
from scaling_jax.report.words import clock, short
from scaling_jax.results.status import part_done
from scaling_jax.scanning import Cell, Event, Experiment, relative_cost
from scaling_jax.training import Progress

LOG_SECONDS = 60.0  # between lines if the output is no terminal


class ScanDisplay:
    """Shows the progress of a scan: a live table on a terminal, else a line now and then. Use it as a context manager.

    Args:
      done: cells that were done before.
    """

    def __init__(self, experiment: Experiment, console: Console, done: Collection[Cell] = ()):
        self._experiment = experiment
        self._console = console
        self._latest: dict[Cell, Progress] = {}  # newest progress of each running cell
        self._runs: dict[Cell, dict[str, float]] = {}  # {run id: lowest loss} of each cell
        self._cost = {cell: relative_cost(experiment, cell) for cell in experiment.cells}
        self._done = set(done)
        self._fraction_before = self._fraction()
        self._started = self._printed = time.monotonic()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=2, transient=True)

    def __enter__(self) -> "ScanDisplay":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_):
        self._live.stop()

    def on_event(self, event: Event) -> None:
        cell = event.cell
        if cell is None:
            self._print("stopping: runs are being saved …")
        elif event.progress is not None:
            self._latest[cell] = event.progress
            losses = self._runs.setdefault(cell, {})
            # NaN, of a run that diverged, is never below
            losses[event.progress.run_id] = min(losses.get(event.progress.run_id, math.inf), event.progress.test_loss)
            if time.monotonic() - self._printed > LOG_SECONDS:
                self._log(f"running: {'; '.join(self._running())}")
        else:
            self._done.add(cell)
            self._latest.pop(cell, None)
            losses = self._runs.get(cell, {})
            lowest = min(losses.values(), default=math.inf)
            loss = f", lowest loss {lowest:.3f}" if lowest < math.inf else ""
            self._log(f"done: {cell.name}, {len(losses)} learning rates{loss}")

    def _log(self, what: str) -> None:
        """Prints a line for a log. A terminal shows the same live, so it gets no line."""
        if not self._console.is_terminal:
            count = f"{len(self._done)} of {len(self._cost)} done"
            self._print(f"{self._clock()}  {count}, about {self._time_left()} left  {what}")
            self._printed = time.monotonic()

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)

    def _running(self) -> list[str]:
        return [
            f"{cell.name} at step {p.step:,}, loss {p.test_loss:.3f}, {short(p.tokens_per_second)} tokens/s"
            for cell, p in sorted(self._latest.items())
        ]

    def _fraction(self) -> float:
        """Part of the scan's expected cost that is done."""
        spent = sum(self._cost[cell] for cell in self._done)
        for cell, p in self._latest.items():
            within = p.step / p.last_step if len(self._runs[cell]) > 1 else 0.5
            spent += self._cost[cell] * part_done(len(self._runs[cell]) - 1 + within)
        return spent / sum(self._cost.values())

    def _time_left(self) -> str:
        gained = self._fraction() - self._fraction_before
        if gained < 0.02:
            return "…"
        return clock((time.monotonic() - self._started) * (1 - self._fraction()) / gained)

    def _clock(self) -> str:
        return clock(time.monotonic() - self._started)

    def _render(self) -> Group:
        rows = [
            (
                cell.name,
                f"{p.learning_rate:.3g}".rjust(9),  # so that columns don't move
                f"{p.step:,}".rjust(9),
                f"{p.test_loss:.3f}",
                short(p.tokens_per_second).rjust(6),
                "·" if math.isnan(p.noise_scale_tokens) else short(p.noise_scale_tokens),
            )
            for cell, p in sorted(self._latest.items())
        ]
        columns = ("model · batch", "learning\nrate", "step", "test\nloss", "tokens/s", "noise\nscale")
        table = Grid(columns, rows, "", columns[:1], bordered=False)
        head = Text(
            f"{self._experiment.name}: {len(self._done)} of {len(self._cost)} batch sizes done · {self._clock()} · "
            f"about {self._time_left()} left"
        )
        bar = Table.grid()  # a progress bar outside of a table has no line end
        bar.add_row(ProgressBar(total=1.0, completed=self._fraction(), width=60))
        return Group(head, bar, table)
