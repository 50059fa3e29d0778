"""What is being trained, while it is: a scan as a live table on a terminal or plain lines, one run as lines."""

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from scaling_jax.analysis.branches import check_tolerance, write_branches
from scaling_jax.analysis.numbers import short as tokens
from scaling_jax.data import Corpus
from scaling_jax.parallel import is_first, together
from scaling_jax.report.status import duration, part_done
from scaling_jax.scanning import Experiment, relative_cost, scan
from scaling_jax.scanning.branches import train_branches
from scaling_jax.scanning.search import finished
from scaling_jax.trackers import Follower, Writer
from scaling_jax.training import Interrupted, Progress, Run, train
from scaling_jax.training.compilation import keep_compiled_programs
from scaling_jax.training.stopping import stop_on_signals

LOG_SECONDS = 60.0  # between lines where there is no terminal


class ScanDisplay:
    """A context manager whose `on_event` takes a scan's events.

    Args:
      done: groups, by number, that were done before.
    """

    def __init__(self, experiment: Experiment, console: Console, done: Collection[int] = ()):
        self._experiment = experiment
        self._console = console
        self._latest: dict[int, dict[str, Any]] = {}  # of running groups
        self._runs: dict[int, set[str]] = {}
        self._cost = {n: relative_cost(group) for n, group in enumerate(experiment.groups)}
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

    def on_event(self, event: dict[str, Any]) -> None:
        if event["event"] == "stopping":
            self._print("stopping: runs are being saved …")
            return
        number = event["group"]
        if event["event"] == "progress":
            self._latest[number] = event
            self._runs.setdefault(number, set()).add(event["run_id"])
            if time.monotonic() - self._printed > LOG_SECONDS:
                self._log(f"running: {'; '.join(self._running())}")
        if event["event"] == "done":
            self._done.add(number)
            last = self._latest.pop(number, None)
            name = self._experiment.groups[number].name
            loss = f", loss {last['test_loss']:.3f}" if last else ""
            self._log(f"done: {name}, {len(self._runs.get(number, ()))} learning rates{loss}")

    def _log(self, what: str) -> None:
        """A line for a log; a terminal shows the same live."""
        if not self._console.is_terminal:
            count = f"{len(self._done)} of {len(self._cost)} done"
            self._print(f"{self._clock()}  {count}, about {self._time_left()} left  {what}")
            self._printed = time.monotonic()

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, markup=False, soft_wrap=True)

    def _running(self) -> list[str]:
        return [
            f"{self._experiment.groups[n].name} at step {event['step']:,}, loss {event['test_loss']:.3f}, "
            f"{tokens(event['tokens_per_second'])} tokens/s"
            for n, event in sorted(self._latest.items())
        ]

    def _fraction(self) -> float:
        """Of the expected cost."""
        spent = sum(self._cost[n] for n in self._done)
        for n, event in self._latest.items():
            within = event["step"] / event["last_step"] if len(self._runs[n]) > 1 else 0.5
            spent += self._cost[n] * part_done(len(self._runs[n]) - 1 + within)
        return spent / sum(self._cost.values())

    def _time_left(self) -> str:
        gained = self._fraction() - self._fraction_before
        if gained < 0.02:
            return "…"
        return duration((time.monotonic() - self._started) * (1 - self._fraction()) / gained)

    def _clock(self) -> str:
        return duration(time.monotonic() - self._started)

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


def scan_on_console(
    experiment: Experiment, results: Path, writers: Iterable[Callable[[Path], Writer]] = (), **options: Any
) -> None:
    """A scan with what it does on the console, and in the dashboards that `writers` open (`trackers`).

    Args:
      options: see `scan`.

    Raises:
      UserError, KeyboardInterrupt: see `scan`.
      SystemExit: with code 0, after SIGTERM stopped it, here or in another of its processes.
    """
    console = Console(quiet=not is_first())
    console.print(f"{experiment.name}: results in {results}", highlight=False, markup=False, soft_wrap=True)
    done: list[int] = []
    followers: list[Follower] = []
    with contextlib.ExitStack() as stack:
        with together():
            if is_first():
                done = [n for n, g in enumerate(experiment.groups) if finished(experiment, g, results) is not None]
                followers = [stack.enter_context(Follower(results, writer)) for writer in writers]
        display = stack.enter_context(ScanDisplay(experiment, console, done))

        def on_event(event: dict[str, Any]) -> None:
            display.on_event(event)
            for follower in followers:
                follower.look()

        terminated = stack.enter_context(_sigterm_interrupts())
        try:
            scan(experiment, results, on_event=on_event, **options)
        except (KeyboardInterrupt, Interrupted) as stopped:
            _leave(console, by_hand=isinstance(stopped, KeyboardInterrupt) and not terminated())


def train_on_console(run: Run, results: Path, corpus: Corpus, writers: Iterable[Callable[[Path], Writer]] = ()) -> None:
    """Trains a run with a line an evaluation; Ctrl-C and SIGTERM save it first.

    Raises:
      KeyboardInterrupt: after a run that Ctrl-C stopped has been saved.
      SystemExit: with code 0, after one has been that SIGTERM stopped, here or in another process of the run.
    """
    console = Console()

    def report(p: Progress):
        noise = "·" if math.isnan(p.noise_scale_tokens) else tokens(p.noise_scale_tokens)
        console.print(
            f"step {p.step:,} of {p.last_step:,}  {tokens(p.tokens)} tokens  test loss {p.test_loss:.4f}  "
            f"{tokens(p.tokens_per_second)} tokens/s  noise scale {noise} tokens",
            highlight=False,
            soft_wrap=True,
        )
        for follower in followers:
            follower.look()

    def should_stop() -> bool:
        if asked():
            console.print(f"{asked.why or 'stopping'}: the run is being saved …")
        return asked()

    keep_compiled_programs()
    with contextlib.ExitStack() as stack:
        followers = [stack.enter_context(Follower(results, writer)) for writer in writers]
        asked = stack.enter_context(stop_on_signals())
        try:
            result = train(run, results, corpus=corpus, should_stop=should_stop, on_progress=report)
        except Interrupted:
            _leave(console, asked.by_hand)
    if not is_first():
        return
    loss = "not finite" if result.test_loss is None else f"{result.test_loss:.4f}"
    console.print(
        f"{result.status} after {result.steps:,} steps, {tokens(result.tokens)} tokens: test loss {loss}; "
        f"{results / 'runs' / result.run_id}",
        highlight=False,
        soft_wrap=True,
    )


def branch_on_console(
    experiment: Experiment, results: Path, models: Sequence[str], batch_tokens: int, tolerance: float, **options: Any
) -> None:
    """Branches of a scan's runs with a line an evaluation of each, and `branches.csv`; see `train_branches`.

    Raises:
      UserError: see `train_branches`, or of the tolerance.
      KeyboardInterrupt: after a run that Ctrl-C stopped has been saved.
      SystemExit: with code 0, after one has been that SIGTERM stopped.
    """
    console = Console()

    def report(p: Progress) -> None:
        console.print(
            f"{p.run_id}  step {p.step:,} of {p.last_step:,}  test loss {p.test_loss:.4f}",
            highlight=False,
            soft_wrap=True,
        )

    check_tolerance(tolerance)
    keep_compiled_programs()
    with stop_on_signals() as asked:
        try:
            plans = train_branches(
                experiment,
                results,
                models,
                batch_tokens,
                on_progress=report,
                should_stop=asked,
                **options,
            )
        except Interrupted:
            _leave(console, asked.by_hand)
    write_branches(plans, results, tolerance)


def _leave(console: Console, by_hand: bool) -> NoReturn:
    """Ends a command whose runs have been saved: as Ctrl-C does, or with code 0 where SIGTERM or a notice asked for it.

    Who restarts commands and must tell one that was saved from one that is done names a file in SCALING_JAX_SAVED.
    """
    if by_hand:
        raise KeyboardInterrupt from None
    if marker := os.environ.get("SCALING_JAX_SAVED"):
        Path(marker).touch()
    console.print("saved; the same command continues where it was")
    raise SystemExit(0) from None


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[Callable[[], bool]]:
    """SIGTERM interrupts as Ctrl-C does, once; yields what tells whether it has."""
    came = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # which alone may handle signals
        yield came.is_set
        return
    before = signal.getsignal(signal.SIGTERM)

    def interrupt(*_):
        came.set()
        signal.signal(signal.SIGTERM, before)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield came.is_set
    finally:
        signal.signal(signal.SIGTERM, before)
