"""Runs a scan: trains the cells that a results folder doesn't hold yet, and continues an interrupted scan."""

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Literal

import jax

from scaling_jax.io import UserError
from scaling_jax.io.config import to_dict
from scaling_jax.io.files import read_whole, refuse_links
from scaling_jax.io.locks import locked
from scaling_jax.io.stores import in_bucket, publish, working_copy
from scaling_jax.io.workers import available_cores
from scaling_jax.parallel import from_first, is_first, leave_if_one_is_gone, together
from scaling_jax.parallel.devices import keep_compiled_programs
from scaling_jax.parallel.processes import stop_on_signals
from scaling_jax.scanning.cells import (
    can_run_together,
    compile_ahead,
    corpus_of,
    finished_runs,
    train_alike,
    train_cell,
)
from scaling_jax.scanning.executors import parse_options, train_cells
from scaling_jax.scanning.experiment import Cell, Experiment
from scaling_jax.scanning.plan import MOST_WORKERS, tokens_by_batch
from scaling_jax.scanning.records import check_same_recipe, read_search, source_of, write_experiment, write_search
from scaling_jax.scanning.search import in_order
from scaling_jax.scanning.worker import Event, train_in_workers
from scaling_jax.tasks import Model
from scaling_jax.training import Interrupted, Progress, Recipe, Run
from scaling_jax.training.optimizers import check_optimizer
from scaling_jax.training.program import program_for

_MOST_COMPILING = 8  # programs at a time; each takes memory on the device while XLA tries its kernels


def scan(
    experiment: Experiment,
    workdir: str | Path,
    *,
    on_event: Callable[[Event], None] = lambda _: None,
    executor: Literal["local", "ray", "slurm"] = "local",
    executor_options: Sequence[str] = (),
    outwards: bool = False,
) -> Path:
    """Trains every run of an experiment that `workdir` doesn't hold yet. Returns `workdir`, or its working copy.

    The folder may hold a smaller scan, with fewer batch sizes, seeds, subjects, learning rates or target losses. Its
    runs are reused.

    On CPUs, one worker process per core trains cells; a `Task` that no experiment file defines is trained in this
    process, as workers couldn't import it. On accelerators, this process drives all devices. If the
    experiment has several seeds, or tries several learning rates together, many runs train at once, spread over the
    devices. Otherwise one run trains after another, with its batch split over as many devices as divide it.

    With several processes (`parallel.connect`), all must call this. They train one run after another on all of their
    devices, also on CPUs, and only the first process writes.

    Args:
      workdir: a folder that all processes see, or gs://bucket/folder.
      on_event: called with each `Event`, in the first process only.
      executor: "local" trains on this machine; "ray" and "slurm" on machines that share `workdir`, see `executors`.
      executor_options: options for Ray or SLURM, as "key=value".
      outwards: train the middle batch sizes of all models first, for a scan that may be stopped. Otherwise the most
        expensive cells come first, so that all cores stay busy to the end. The results are the same.

    Raises:
      UserError: if the folder holds another experiment or text, or is in use; if a cell can't be trained; if the
        processes have different experiments.
      KeyboardInterrupt: after all runs in training are saved. Calling `scan` again continues them.
      Interrupted: the same after SIGTERM, or if another process was asked to stop.
    """
    for cell in experiment.cells:
        _ = experiment.run(cell, 0).trainable  # refuses models of other trainers, and tasks without their code
    check_optimizer(experiment.optimizer)
    source, importable = source_of(experiment)
    if executor == "local" and executor_options:
        raise UserError(f"--executor-options {' '.join(executor_options)} need --executor ray or --executor slurm")
    with leave_if_one_is_gone(), contextlib.ExitStack() as stack:
        with together():
            workdir = working_copy(workdir, is_first())
            if executor != "local" and in_bucket(workdir):
                raise UserError(
                    f"--executor {executor} needs locks, which buckets lack: use a results folder on a shared disk"
                )
        lock, missing, checksums = None, [], {}
        given = from_first(to_dict(experiment))
        with together():
            if to_dict(experiment) != given:
                raise UserError("the processes of this scan differ: give all of them the same experiment")
        with together():
            if is_first():
                refuse_links(*(workdir / name for name in ("cells", "logs", "logs/slurm", "runs")))
                lock = stack.enter_context(locked(workdir / ".lock", str(workdir)))
                check_same_recipe(workdir, experiment)
                missing = _missing(experiment, workdir, outwards)
        missing = [Cell(*values) for values in from_first(missing)]
        with together():
            # Before the workers start, so that only one packs, and before experiment.json: the text may be wrong.
            for cell in {cell.model: cell for cell in experiment.cells}.values() if missing else ():
                corpus = corpus_of(experiment, cell)
                checksums[cell.model] = corpus.manifest["sha256"]
                if is_first():
                    check_same_text(workdir, experiment, checksums[cell.model])
            if len(set(checksums.values())) > 1:
                raise UserError(f"{' and '.join(checksums)} have different data: scan them in two folders")
            if is_first():
                write_experiment(workdir, experiment)
                publish(workdir)
        if not missing:
            return workdir
        if executor != "local":
            if not importable:
                raise UserError(
                    f"--executor {executor} needs the Python file that defines the tasks: give it to scaling-jax scan"
                )
            train_cells(executor, workdir, missing, on_event, parse_options(executor_options), source)
        elif jax.default_backend() == "cpu" and jax.process_count() == 1 and importable:
            train_in_workers(
                workdir,
                missing,
                on_event,
                available_cores()[:MOST_WORKERS],
                lock,
                source=source,
                first=experiment.inner,
            )
        else:
            _train_here(experiment, workdir, missing, on_event)
    return workdir


def relative_cost(experiment: Experiment, cell: Cell) -> float:
    """Expected FLOPs of a cell up to a factor."""
    model = experiment.subject(cell.model).model
    per_token = model.flops_per_token if isinstance(model, Model) else model.num_params
    return per_token * tokens_by_batch(cell.batch_tokens)


def _missing(experiment: Experiment, workdir: Path, outwards: bool) -> list[Cell]:
    """The cells to train, each after its guides; see `scan` for `outwards`."""
    missing = []
    for cell in experiment.cells:
        runs = finished_runs(experiment, cell, workdir)
        if runs is None:
            missing.append(cell)
        elif read_search(workdir, cell) is None:  # schema 1 has no search records
            write_search(workdir, experiment, cell, runs)

    def rank(cell: Cell) -> tuple[int, float]:
        return len(experiment.towards_middle(cell)) if outwards else 0, -relative_cost(experiment, cell)

    return in_order(experiment, sorted(missing, key=rank))


def check_same_text(workdir: Path, experiment: Recipe, sha256: str) -> None:
    """Raises UserError if a folder holds runs on other data than those with this checksum."""
    for path in (workdir / "runs").glob("*/result.json"):
        found = None
        with contextlib.suppress(OSError, ValueError, AttributeError):  # `read_result` reports a damaged file later
            found = json.loads(read_whole(path)).get("corpus_sha256")
        if found not in (None, sha256):
            raise UserError(
                f"{workdir} holds runs on other text; the text {experiment.text} has changed since: use another folder"
            )


def _train_here(
    experiment: Experiment, workdir: Path, missing: Sequence[Cell], on_event: Callable[[Event], None]
) -> None:
    keep_compiled_programs()
    alike: dict[tuple[str, int], list[Cell]] = {}  # cells of the same model and batch size
    for cell in missing:
        alike.setdefault(cell[:2], []).append(cell)
    num_devices = {cell: _devices_for(experiment.run(cell, 0)) for cell in missing}
    with stop_on_signals() as should_stop, contextlib.ExitStack() as stack:
        ready: dict[tuple[str, int], Future] = {}
        if jax.process_count() == 1:  # several would start their programs in different orders
            pool = ThreadPoolExecutor(min(_MOST_COMPILING, len(available_cores())), "compiles ahead")
            stack.callback(pool.shutdown, cancel_futures=True)
            for key, cells in alike.items():
                devices = num_devices[cells[0]], jax.device_count()
                ready[key] = pool.submit(compile_ahead, experiment, cells, *devices)
        for key, cells in alike.items():

            def report(progress: Progress) -> None:
                on_event(Event(Cell(progress.model, progress.batch_tokens, progress.seed), progress))

            if key in ready:
                ready[key].result()
            try:
                if can_run_together(experiment, cells[0]):
                    train_alike(experiment, cells, workdir, should_stop, report, jax.device_count())
                else:
                    for cell in cells:
                        train_cell(experiment, cell, workdir, should_stop, report, num_devices[cell])
            except Interrupted:
                if should_stop.by_hand:
                    raise KeyboardInterrupt from None
                raise
            if is_first():
                for cell in cells:
                    on_event(Event(cell))


def _devices_for(run: Run) -> int:
    """Number of devices for a run: as many as divide its batch. With several processes, all devices or a UserError."""
    if jax.process_count() > 1:
        return program_for(run, jax.device_count()).num_devices
    return math.gcd(run.batch_sequences, jax.device_count())
