"""Trains a scan, a run or branches, with progress on the console. A signal saves the runs, then ends the command."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from scaling_jax.console.dashboards import Follower, Writer
from scaling_jax.console.scan_display import ScanDisplay
from scaling_jax.console.signals import Limits, heard_at_once, leave, sigterm_interrupts
from scaling_jax.console.terminal import Terminal
from scaling_jax.io import UserError
from scaling_jax.parallel import Sharding, from_first, is_first, together
from scaling_jax.parallel.devices import keep_compiled_programs
from scaling_jax.parallel.processes import Asked, stop_on_signals
from scaling_jax.report.units import in_unit
from scaling_jax.report.words import branch_line, ending, short
from scaling_jax.results import Results, read_results
from scaling_jax.results.branches import check_tolerance, measure_branches, planned, write_branches
from scaling_jax.results.runs import last_noise_scale
from scaling_jax.scanning import Cell, Event, Experiment, scan
from scaling_jax.scanning.branches import BranchPlan, plan_branches, train_branches
from scaling_jax.scanning.cells import done_part, finished_runs
from scaling_jax.scanning.experiment import FEWEST_BATCHES
from scaling_jax.scanning.widening import wider
from scaling_jax.training import Interrupted, Progress, Run, run_folder, train
from scaling_jax.training.examples import Data
from scaling_jax.training.records import read_course


def scan_on_console(
    experiment: Experiment,
    results: Path,
    writers: Iterable[Callable[[Path], Writer]] = (),
    minutes: float | None = None,
    tokens: float | None = None,
    **options: Any,
) -> bool:
    """Runs a scan, and shows its progress on the console and in dashboards. Returns False if it is too early for a fit.

    Args:
      writers: open a run in a dashboard; see `dashboards.asked_for`.
      minutes, tokens: the scan stops then, with all runs saved, and `results` becomes that of what is done, which the
        same call lets grow again. Tokens are those of the runs that this call trains. None: it goes on to its end.
      options: see `scan`.

    Raises:
      UserError, KeyboardInterrupt: see `scan`.
      SystemExit: with code 0, after SIGTERM stopped the scan, in this process or another one of the scan.
    """
    console = Terminal(functools.partial(in_unit, unit=experiment.unit), quiet=not is_first())
    console.print(f"{experiment.name}: results in {results}", soft_wrap=True)
    done: list[Cell] = []
    followers: list[Follower] = []
    with contextlib.ExitStack() as stack:
        with together():
            if is_first():
                done = [c for c in experiment.cells if finished_runs(experiment, c, results) is not None]
                followers = [stack.enter_context(Follower(results, writer)) for writer in writers]
        display = stack.enter_context(ScanDisplay(experiment, console, done))

        def on_event(event: Event) -> None:
            display.on_event(event)
            for follower in followers:
                follower.look()
            if event.progress is not None:
                limits.count(event.progress.run_id, event.progress.tokens)

        terminated = stack.enter_context(sigterm_interrupts())
        limits = stack.enter_context(Limits(minutes, tokens))
        outwards = minutes is not None or tokens is not None
        try:
            scan(experiment, results, on_event=on_event, outwards=outwards, **options)
        except (KeyboardInterrupt, Interrupted) as stopped:
            if limits.reached is not None:
                return _keep_what_is_done(experiment, results, limits.reached, console.print)
            leave(isinstance(stopped, KeyboardInterrupt) and not terminated(), console.print)
    return True


def scan_and_widen(experiment: Experiment, results: Path, least: int | None, most: int | None, **options: Any) -> bool:
    """`scan_on_console`, then again with half the smallest or twice the largest batch while `wider` asks for it.

    Args:
      least, most: see `wider`.
      options: see `scan_on_console`.
    """
    found: Experiment | None = experiment
    complete = True
    while found is not None:
        complete = scan_on_console(found, results, **options)
        found = _wider(found, results, least, most) if complete else None
    return complete


def _keep_what_is_done(experiment: Experiment, results: Path, why: str, say: Callable[[str], None]) -> bool:
    """Makes a stopped scan one of the models and batch sizes that are done; False if they are too few."""
    again, done = "run the same command again to continue", done_part(experiment, results)
    if done is None:
        say(f"{why}, and no model has {FEWEST_BATCHES} batch sizes, the least for a fit; {again}")
        return False
    scan(done, results)
    names = ", ".join(subject.model.name for subject in done.subjects)
    say(f"{why}: {names} at {len(done.batch_tokens)} of {len(experiment.batch_tokens)} batch sizes; {again}")
    return True


def _wider(experiment: Experiment, results: Path, least: int | None, most: int | None) -> Experiment | None:
    """What the first process finds, in all processes."""
    if least is None and most is None:
        return None
    found, console = None, Terminal(functools.partial(in_unit, unit=experiment.unit), quiet=not is_first())
    with together():
        if is_first() and (found := wider(experiment, read_results(results).fit(), least, most)) is not None:
            batches = found.experiment.batch_tokens
            for models, end, what in (
                (found.not_linear, batches[0], "aren't yet in proportion to 1/B at the smallest batch"),
                (found.not_saturated, batches[-1], "still fall with the batch at the largest"),
            ):
                if models:
                    console.print(f"{', '.join(models)}: steps {what}, so {end:,} tokens are next", soft_wrap=True)
    batches = from_first(() if found is None else found.experiment.batch_tokens)
    return dataclasses.replace(experiment, batch_tokens=tuple(batches)) if batches else None


def train_on_console(
    run: Run,
    results: Path,
    corpus: Data,
    writers: Iterable[Callable[[Path], Writer]] = (),
    sharding: Sharding = "replicated",
) -> None:
    """Trains a run, and prints a line per evaluation. Ctrl-C and SIGTERM save the run first.

    Raises:
      KeyboardInterrupt: after Ctrl-C, once the run is saved.
      SystemExit: with code 0 after SIGTERM, in this process or another one of the run, once the run is saved.
    """
    console = Terminal(functools.partial(in_unit, unit=run.model.unit))

    of = "of at most" if run.live_ramp is not None and run.max_steps is None else "of"

    def report(p: Progress):
        noise = "·" if math.isnan(p.noise_scale_tokens) else short(p.noise_scale_tokens)
        console.print(
            f"step {p.step:,} {of} {p.last_step:,}  {short(p.tokens)} tokens  test loss {p.test_loss:.4f}  "
            f"{short(p.tokens_per_second)} tokens/s  noise scale {noise} tokens",
            soft_wrap=True,
        )
        for follower in followers:
            follower.look()

    def should_stop() -> bool:
        if asked() and asked.why:  # a signal is told of at once
            console.print(f"{asked.why}: the run is being saved …")
        return asked()

    keep_compiled_programs()
    if is_first() and (note := _note_of_others(run, results)):
        console.print(note, soft_wrap=True)
    with contextlib.ExitStack() as stack:
        followers = [stack.enter_context(Follower(results, writer)) for writer in writers]
        asked = stack.enter_context(stop_on_signals())
        stack.enter_context(_told_at_once(console, asked))
        try:
            result = train(run, results, corpus=corpus, sharding=sharding, should_stop=should_stop, on_progress=report)
        except Interrupted:
            leave(asked.by_hand, console.print)
    if not is_first():
        return
    loss = "not finite" if result.test_loss is None else f"{result.test_loss:.4f}"
    done = "finished: " if result.status in ("reached", "exhausted") else ""
    folder = run_folder(results, run)
    for line in (
        f"{done}{ending(run, result)}; {result.steps:,} steps, {short(result.tokens)} tokens, test loss {loss}",
        *_noise_scale_lines(folder),
        f"records: {folder}",
    ):
        console.print(line, soft_wrap=True)


def branch_on_console(
    results: Results,
    models: Sequence[str],
    batch_tokens: int,
    tolerance: float,
    tasks: Experiment | None = None,
    **options: Any,
) -> None:
    """Trains branches of a scan's best runs, prints a line per run and measurement, and writes branches.csv.

    Args:
      batch_tokens: batch size of the runs to branch; well below B_crit.
      tolerance: a branch keeps up if its loss is at most this much above the run's, in nats per token.
      tasks: an experiment with the code of the scan's tasks, if it has any.
      options: see `plan_branches`.

    Raises:
      UserError: if the scan isn't finished, or has no such model or batch size; if the tolerance isn't positive; see
        `train`.
      KeyboardInterrupt: after Ctrl-C, once the run is saved.
      SystemExit: with code 0 after SIGTERM, once the run is saved.
    """
    check_tolerance(tolerance)
    plans = _branch_plans(results, models, batch_tokens, **options)
    if tasks is not None:
        known = {subject.model.name: subject.model for subject in tasks.subjects}
        plans = [
            dataclasses.replace(p, run=dataclasses.replace(p.run, model=known.get(p.run.model.name, p.run.model)))
            for p in plans
        ]
    for plan in plans:
        _ = plan.run.trainable  # refuses models of other trainers, and tasks without their code
    console = Terminal(functools.partial(in_unit, unit=plans[0].run.model.unit if plans else "tokens"))

    def say(line: str) -> None:
        console.print(line, soft_wrap=True)

    num_runs, tokens = sum(plan.num_runs for plan in plans), sum(plan.num_tokens for plan in plans)
    say(f"{num_runs:,} runs of {short(tokens)} tokens in all; those that are done aren't trained again")
    begun: dict[str, None] = {}

    def report(p: Progress) -> None:
        if p.step == p.last_step or p.run_id not in begun:
            begun[p.run_id] = None
            say(f"{len(begun):,}: {p.run_id}  step {p.step:,} of {p.last_step:,}  test loss {p.test_loss:.4f}")

    keep_compiled_programs()
    with stop_on_signals() as asked, _told_at_once(console, asked):
        try:
            train_branches(plans, results.folder, on_progress=report, should_stop=asked)
        except Interrupted:
            leave(asked.by_hand, console.print)
    trained = {record.run: record for record in read_results(results.folder).runs}
    measured = measure_branches(planned(plans, trained), tolerance)
    for m in measured:
        say(branch_line(m))
    if left_out := sum(len(plan.points) for plan in plans) - len(measured):
        say(f"note: {left_out} points are left out, because the run or its branches diverged there")
    write_branches(results.folder, measured)


def _told_at_once(console: Console, asked: Asked) -> contextlib.AbstractContextManager[None]:
    """Until this process has trained a step, a signal ends it at once, unless others wait for it."""
    return heard_at_once(
        lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
        lambda: not asked.was_asked and not jax.distributed.is_initialized(),
    )


def _note_of_others(run: Run, results: Path) -> str | None:
    """A note if a new run starts beside others, because the user may have meant to continue one of them."""
    folder = run_folder(results, run)
    others = len(list(folder.parent.glob("*/config.json")))
    if not others or (folder / "config.json").exists():
        return None
    what, beside = ("1 other run", "it") if others == 1 else (f"{others} other runs", "them")
    return f"note: {results} holds {what}; these arguments start a new one beside {beside}"


def _noise_scale_lines(folder: Path) -> list[str]:
    found = last_noise_scale(read_course(folder))
    if found is None:
        return ["noise scale: too few steps for an interval"]
    said = f"unresolved, at least {short(found.low)} tokens"
    if found.resolved:
        said = f"{short(found.value)} tokens [{short(found.low)}, {short(found.high)}] (95 % interval)"
    notes = [f"note: {found.warning}"] if found.warning else []
    return [f"noise scale over the last {found.steps:,} steps: {said}", *notes]


def _branch_plans(results: Results, models: Sequence[str], batch_tokens: int, **options: Any) -> list[BranchPlan]:
    plans = []
    for model in models:
        cells = [cell for cell in results.cells if (cell.model, cell.batch_tokens) == (model, batch_tokens)]
        if not cells:
            there = ", ".join(f"{cell.model} at {cell.batch_tokens:,}" for cell in results.cells)
            raise UserError(
                f"{results.folder} has no runs of {model} at {batch_tokens:,} tokens: choose one of {there}"
            )
        plans += [plan_branches(cell.best, **options) for cell in cells]
    return plans
