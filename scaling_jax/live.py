"""What is being trained, while it is: a scan as a live table on a terminal or plain lines, one run as lines."""

import math
import signal
import threading
import time
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from scaling_jax.data import Corpus
from scaling_jax.report.summary import tokens
from scaling_jax.scanning import Experiment, relative_cost
from scaling_jax.training import Interrupted, Progress, Run, train
from scaling_jax.training.compilation import keep_compiled_programs


class ScanDisplay:
    """A context manager whose `on_event` takes a scan's events."""

    def __init__(self, experiment: Experiment, console: Console):
        self._experiment = experiment
        self._console = console
        self._latest: dict[int, dict[str, Any]] = {}  # of running groups
        self._runs: dict[int, set[str]] = {}
        self._cost = {n: relative_cost(group) for n, group in enumerate(experiment.groups)}
        self._done: set[int] = set()
        self._started = time.monotonic()
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=2, transient=True)

    def __enter__(self) -> "ScanDisplay":
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_):
        self._live.stop()

    def on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "stopping":
            self._console.print("stopping: runs are being saved …")
            return
        number = event["group"]
        if event["event"] == "progress":
            self._latest[number] = event
            self._runs.setdefault(number, set()).add(event["run_id"])
        if event["event"] == "done":
            self._done.add(number)
            last = self._latest.pop(number, None)
            if not self._console.is_terminal:
                name = self._experiment.groups[number].name
                rates = len(self._runs.get(number, ()))
                loss = f", loss {last['test_loss']:.3f}" if last else ""
                self._console.print(
                    f"{self._clock()}  {len(self._done)} of {len(self._cost)} done: {name}, {rates} learning rates"
                    f"{loss}, {self._time_left()} left",
                    highlight=False,
                )

    def _fraction(self) -> float:
        """Of the expected cost; a running group counts by its runs, of which three are usual."""
        spent = sum(self._cost[n] for n in self._done)
        for n, event in self._latest.items():
            within = event["step"] / event["last_step"] if len(self._runs[n]) > 1 else 0.5
            spent += self._cost[n] * min(0.95, (len(self._runs[n]) - 1 + within) / 3)
        return spent / sum(self._cost.values())

    def _time_left(self) -> str:
        fraction = self._fraction()
        if fraction < 0.02:
            return "…"
        return _duration((time.monotonic() - self._started) * (1 - fraction) / fraction)

    def _clock(self) -> str:
        return _duration(time.monotonic() - self._started)

    def _render(self) -> Group:
        table = Table(box=None, header_style="dim", pad_edge=False)
        for column in ("model · batch", "learning rate", "step", "test loss", "tokens/s", "noise scale"):
            table.add_column(
                column, justify="left" if column.startswith("model") else "right", min_width=9, no_wrap=True
            )
        for number, event in sorted(self._latest.items()):
            noise = event["noise_scale_tokens"]
            table.add_row(
                self._experiment.groups[number].name,
                event["run_id"].split("-lr")[1].split("-s")[0],
                f"{event['step']:,}",
                f"{event['test_loss']:.3f}",
                tokens(event["tokens_per_second"]),
                "·" if noise is None or math.isnan(noise) else tokens(noise),
            )
        head = Text(
            f"{self._experiment.name}: {len(self._done)} of {len(self._cost)} batch sizes done · {self._clock()} · "
            f"about {self._time_left()} left"
        )
        bar = Table.grid()  # alone, a progress bar doesn't end its line
        bar.add_row(ProgressBar(total=1.0, completed=self._fraction(), width=60))
        return Group(head, bar, table)


def train_on_console(run: Run, results: Path, corpus: Corpus) -> None:
    """Trains a run with a line an evaluation; Ctrl-C and SIGTERM save it first.

    Raises:
      KeyboardInterrupt: after a run that was stopped has been saved.
    """
    console, stopping = Console(), threading.Event()

    def stop(*_):
        console.print("stopping: the run is being saved …")
        stopping.set()

    def report(p: Progress):
        noise = "·" if math.isnan(p.noise_scale_tokens) else tokens(p.noise_scale_tokens)
        console.print(
            f"step {p.step:,} of {p.last_step:,}  {tokens(p.tokens)} tokens  test loss {p.test_loss:.4f}  "
            f"{tokens(p.tokens_per_second)} tokens/s  noise scale {noise} tokens",
            highlight=False,
            soft_wrap=True,
        )

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    keep_compiled_programs()
    try:
        result = train(run, results, corpus=corpus, should_stop=stopping.is_set, on_progress=report)
    except Interrupted:
        raise KeyboardInterrupt from None
    loss = "not finite" if result.test_loss is None else f"{result.test_loss:.4f}"
    console.print(
        f"{result.status} after {result.steps:,} steps, {tokens(result.tokens)} tokens: test loss {loss}; "
        f"{results / 'runs' / result.run_id}",
        highlight=False,
        soft_wrap=True,
    )


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
