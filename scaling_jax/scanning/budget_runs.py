"""Trains a budget scan: the trunk and the decays of each learning rate that its searches want."""

import contextlib
import math
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax

from scaling_jax.io import UserError
from scaling_jax.io.files import refuse_links
from scaling_jax.io.locks import locked
from scaling_jax.io.stores import publish, working_copy
from scaling_jax.io.workers import Command, Message, available_cores, run_jobs, serve
from scaling_jax.parallel.devices import keep_compiled_programs
from scaling_jax.parallel.processes import stop_on_signals
from scaling_jax.scanning.annealing import train_annealed
from scaling_jax.scanning.budget_records import (
    TABLE,
    check_same_scan,
    finder,
    read_budget_scan,
    write_budget_scan,
    write_table,
)
from scaling_jax.scanning.budget_scan import BudgetScan
from scaling_jax.scanning.budget_search import CellSearch, Losses, search_all
from scaling_jax.scanning.experiment import Cell
from scaling_jax.scanning.plan import MOST_WORKERS
from scaling_jax.scanning.records import load_scan, source_of
from scaling_jax.scanning.scan import check_same_text
from scaling_jax.scanning.worker import STOPPING, Event, event_message, read_event, worker_environment
from scaling_jax.training import Interrupted, Progress
from scaling_jax.training.examples import data_of
from scaling_jax.training.optimizers import check_optimizer

_START = (
    "import pathlib, sys; from scaling_jax.scanning.budget_runs import main; main(*map(pathlib.Path, sys.argv[1:]))"
)


class RateDone(NamedTuple):
    """A learning rate of a cell has its losses."""

    cell: Cell
    learning_rate: float
    losses: Losses  # at each horizon; infinite where the run diverged
    searches: dict[Cell, CellSearch]  # all that have begun, with this rate


def scan_budgets(
    scan: BudgetScan,
    workdir: str | Path,
    *,
    on_event: Callable[[Event], None] = lambda _: None,
    on_rate: Callable[[RateDone], None] = lambda _: None,
) -> Path:
    """Trains what `workdir` doesn't hold yet of a budget scan, and writes annealed.csv. Returns the path of the table.

    On CPUs, one worker process per core trains learning rates; on accelerators, and for a `Task` that no file defines,
    this process trains one run after another.

    Args:
      workdir: a folder, or gs://bucket/folder.
      on_event: called after each evaluation of a run.
      on_rate: called with each learning rate that is done.

    Raises:
      UserError: if the folder holds another scan or text, or is in use; if a run can't be trained.
      KeyboardInterrupt: after all runs in training are saved. Calling `scan_budgets` again continues them.
      Interrupted: the same after SIGTERM.
    """
    if jax.process_count() > 1:
        raise UserError("a budget scan trains in one process: start it on one machine, without --coordinator")
    runs = [scan.plan(cell, 0).run for cell in scan.cells]
    for run in runs:
        _ = run.trainable  # refuses tasks without their code
    check_optimizer(scan.optimizer)
    source, importable = source_of(scan)
    workdir = working_copy(workdir)
    refuse_links(*(workdir / name for name in ("logs", "runs")))
    with locked(workdir / ".lock", str(workdir)) as lock:
        check_same_scan(workdir, scan)
        for run in {run.model.name: run for run in runs}.values():
            # Before the workers start, so that only one packs, and before budget_scan.json: the text may be wrong.
            check_same_text(workdir, scan, data_of(run).manifest["sha256"])
        write_budget_scan(workdir, scan)
        publish(workdir)
        todo = _ToDo(scan, workdir, on_rate)
        if any(search.wanted for search in todo.searches.values()):
            (workdir / TABLE).unlink(missing_ok=True)  # of a smaller scan
        if jax.default_backend() == "cpu" and importable:
            _train_in_workers(todo, workdir, on_event, lock, source)
        else:
            _train_here(todo, workdir, on_event)
        table = write_table(workdir, scan, todo.searches)
        publish(workdir)
    return table


class _ToDo:
    """What is to be trained now, and what was given out."""

    def __init__(self, scan: BudgetScan, workdir: Path, on_rate: Callable[[RateDone], None]):
        self.scan, self._on_rate = scan, on_rate
        self._find = finder(scan, workdir)
        self._given: set[tuple[Cell, int]] = set()
        self.searches = search_all(scan, self._find)

    def next(self) -> list[tuple[Cell, int]]:
        """(cell, rate index) of each learning rate that is wanted, and wasn't given out before."""
        wanted = [(cell, index) for cell, found in self.searches.items() for index in found.wanted]
        new = [key for key in wanted if key not in self._given]
        self._given.update(new)
        return new

    def done(self, cell: Cell, index: int) -> None:
        losses = self._find(cell, index)
        if losses is None:
            raise UserError(f"the runs of {cell.name} were removed while the scan ran: run the same command again")
        self.searches = search_all(self.scan, self._find)
        self._on_rate(RateDone(cell, self.scan.rate(cell, index), losses, self.searches))


def _train_in_workers(
    todo: _ToDo, workdir: Path, on_event: Callable[[Event], None], lock: int | None, source: Path | None
) -> None:
    log = f"worker-{socket.gethostname()}-{os.getpid()}"
    commands = [
        Command(
            ("-c", _START, str(workdir), *([str(source)] if source else [])),
            environment=worker_environment("cpu"),
            core=core,
            log=workdir / "logs" / f"{log}-{core}.log",
            lock=lock,
        )
        for core in available_cores()[:MOST_WORKERS]
    ]
    run_jobs(
        todo.next(),
        commands,
        on_done=lambda job: todo.done(*job),
        further=lambda job: todo.next(),
        on_message=lambda message: on_event(read_event(message)),
        on_interrupt=lambda: on_event(STOPPING),
    )


def _train_here(todo: _ToDo, workdir: Path, on_event: Callable[[Event], None]) -> None:
    keep_compiled_programs()
    waiting = todo.next()
    with stop_on_signals() as should_stop:
        while waiting:
            cell, index = waiting.pop(0)
            plan = todo.scan.plan(cell, index)

            def report(progress: Progress, cell=cell) -> None:
                on_event(Event(cell, progress))

            try:
                train_annealed(
                    plan,
                    workdir,
                    corpus=data_of(plan.run),
                    num_devices=math.gcd(plan.run.batch_sequences, jax.device_count()),
                    should_stop=should_stop,
                    on_progress=report,
                )
            except Interrupted:
                if should_stop.by_hand:
                    raise KeyboardInterrupt from None
                raise
            todo.done(cell, index)
            waiting += todo.next()


def main(workdir: Path, source: Path | None = None) -> None:
    """The main function of a worker process; `source` is the Python file that defines the scan's tasks."""
    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())
    keep_compiled_programs()
    scan = read_budget_scan(workdir)
    if source is not None:
        defined = load_scan(source)
        assert isinstance(defined, BudgetScan)
        scan = scan.with_tasks_of(defined)

    def work(job: list, send: Callable[[Message], None]) -> bool:
        cell, plan = Cell(*job[0]), scan.plan(Cell(*job[0]), job[1])
        with contextlib.suppress(Interrupted):
            train_annealed(
                plan,
                workdir,
                corpus=data_of(plan.run),
                num_devices=1,
                should_stop=stopping.is_set,
                on_progress=lambda progress: send(event_message(Event(cell, progress))),
            )
            return True
        return False

    serve(work, stopping.set)
