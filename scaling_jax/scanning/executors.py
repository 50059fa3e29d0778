"""Trains a scan's cells on several machines through Ray or SLURM. All machines share the results folder.

A cell is one task of the engine. A task continues what the folder holds of its cell, so the engine may restart it at
any time. If the engine wrongly takes a machine for dead, it may start a cell while the old process still writes. So a
cell is trained under a lock in the folder. The training process holds it, and the file system frees it when that ends.
"""

import contextlib
import importlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from scaling_jax.io import UserError
from scaling_jax.io.files import Tail, append_line
from scaling_jax.io.locks import locked
from scaling_jax.io.stores import cache_folder
from scaling_jax.scanning.experiment import Cell
from scaling_jax.scanning.worker import STOPPING, Event, event_message, read_event, train_in_workers

_LOCK_SECONDS = 300  # much longer than a process takes to save and end once its cell was given to another machine
_STOP_SECONDS = 60
_POLL_SECONDS = 1.0
_MINUTES_PER_JOB = 240  # time limit of a SLURM job; afterwards it is queued again and continues

Ended = Iterable[tuple[Cell, str | None]]  # cells whose task has ended; the text is the error, None if it is done


def train_on_ray(
    workdir: Path,
    cells: Iterable[Cell],
    on_event: Callable[[Event], None],
    options: dict[str, Any] | None = None,
    source: Path | None = None,
) -> None:
    """Trains the cells as tasks of a Ray cluster: the one in `RAY_ADDRESS`, or this machine's, or a new local one.

    Args:
      options: of `ray.remote`, such as num_gpus. The default is one CPU per task, and any number of restarts.
      source: the Python file that defines the experiment's tasks, if it has any; the same path on every machine.

    Raises:
      UserError: if Ray is missing or doesn't know an option, or a cell can't be trained.
      KeyboardInterrupt: after the cells were told to save, and a minute at most.
    """
    ray = _engine("ray", extra="ray")
    try:  # Ray restarts a task if its machine or process dies, but not if its code raises an error
        remote = ray.remote(**({"num_cpus": 1, "max_retries": -1} | (options or {})))(train_in_lock)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"Ray refuses these --executor-options ({' '.join(str(error).split())}): give options of ray.remote"
        ) from None
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False)
    try:
        tasks = {remote.remote(workdir.resolve(), cache_folder().resolve(), cell, source): cell for cell in cells}

        def ended() -> Ended:
            for task in ray.wait(list(tasks), timeout=_POLL_SECONDS)[0]:
                yield tasks.pop(task), ray.get(task)

        def cancel() -> None:
            for force in (False, True):
                for task in tasks:
                    ray.cancel(task, force=force)
                if not tasks or not ray.wait(list(tasks), num_returns=len(tasks), timeout=_STOP_SECONDS)[1]:
                    return

        _watch(workdir, list(tasks.values()), on_event, ended, cancel)
    finally:
        if started_here:
            ray.shutdown()


def train_on_slurm(
    workdir: Path,
    cells: Iterable[Cell],
    on_event: Callable[[Event], None],
    options: dict[str, Any] | None = None,
    source: Path | None = None,
    cluster: str = "slurm",
) -> None:
    """Trains the cells as a SLURM job array, through submitit. The logs of the jobs are in `workdir/logs/slurm`.

    Args:
      options: of submitit's `update_parameters`, such as slurm_partition, gpus_per_node or timeout_min.
      source: see `train_on_ray`.
      cluster: "local" runs the jobs on this machine.

    Raises:
      UserError: if submitit or SLURM is missing, SLURM refuses the jobs, or a cell can't be trained.
      KeyboardInterrupt: after the jobs were cancelled. SLURM gives them time to save: KillWait, by default 30 seconds.
    """
    submitit = _engine("submitit", extra="slurm")
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise UserError("no sbatch on this machine: start the scan on a machine that submits jobs to SLURM")
    waiting = list(cells)
    folder = workdir.resolve() / "logs" / "slurm"
    folder.mkdir(parents=True, exist_ok=True)
    executor = submitit.AutoExecutor(folder, cluster=cluster, slurm_max_num_timeout=1_000)
    defaults = {
        "name": "scaling-jax",
        "timeout_min": _MINUTES_PER_JOB,
        "cpus_per_task": 1,
        "slurm_additional_parameters": {"requeue": True},  # if the machine dies
    }
    try:
        executor.update_parameters(**(defaults | (options or {})))
        submitted = executor.map_array(CellJob(workdir.resolve(), cache_folder().resolve(), source), waiting)
    except (NameError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"SLURM refused the jobs ({' '.join(str(error).split())}): change --executor-options") from None
    jobs = dict(zip(waiting, submitted, strict=True))

    def ended() -> Ended:
        time.sleep(_POLL_SECONDS)
        for cell in [cell for cell, job in jobs.items() if job.done()]:
            job = jobs.pop(cell)
            try:
                yield cell, job.result()
            except submitit.core.utils.UncompletedJobError:
                yield cell, f"SLURM job {job.job_id} ended without a result: see its log {job.paths.stderr}"

    def cancel() -> None:
        for job in jobs.values():
            job.cancel()

    _watch(workdir, waiting, on_event, ended, cancel)


ENGINES = {"ray": train_on_ray, "slurm": train_on_slurm}


def parse_options(pairs: Sequence[str]) -> dict[str, Any]:
    """Options for an engine from `key=value` pairs. A value that is JSON becomes a number, a list, …; else it is text.

    Raises:
      UserError: if an option isn't such a pair.
    """
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not (key and equals):
            raise UserError(f"executor option {pair!r} must have the form key=value, such as num_gpus=1")
        try:
            options[key] = json.loads(value)
        except json.JSONDecodeError:
            options[key] = value
    return options


def train_in_lock(workdir: Path, cache: Path, cell: Cell, source: Path | None = None) -> str | None:
    """Trains one cell on this machine. Returns None, or the error message if the cell can't be trained.

    Args:
      cache: folder for packed text; the same path on every machine.
      source: see `train_on_ray`.
    """
    os.environ["SCALING_JAX_CACHE"] = str(cache)

    def report(event: Event) -> None:
        if event.progress is not None:
            append_line(_event_log(workdir, cell), event_message(event))

    try:
        with locked_cell(workdir, cell) as lock:
            train_in_workers(workdir, [cell], report, [None], lock, platform=None, source=source)
    except (UserError, OSError) as error:
        return str(error)
    return None


class CellJob:
    """`train_in_lock` for submitit, which calls `checkpoint` to know what to queue again: the same job."""

    def __init__(self, workdir: Path, cache: Path, source: Path | None = None):
        self._folders, self._source = (workdir, cache), source

    def __call__(self, cell: Cell) -> str | None:
        return train_in_lock(*self._folders, cell, self._source)

    def checkpoint(self, cell: Cell) -> Any:
        return _engine("submitit", extra="slurm").helpers.DelayedSubmission(self, cell)


def locked_cell(
    workdir: Path, cell: Cell, seconds: float = _LOCK_SECONDS
) -> contextlib.AbstractContextManager[int | None]:
    """Waits until no other process trains the cell, then holds its lock. Yields the lock's descriptor; see `locked`.

    Raises:
      UserError: if another process still holds the lock after `seconds`, or the file system has no locks.
    """
    path = workdir / "logs" / f"{cell.file_name}.lock"
    return locked(path, f"{cell.name} of {workdir}", seconds=seconds, wait=True, insist=True)


def _watch(
    workdir: Path,
    cells: Sequence[Cell],
    on_event: Callable[[Event], None],
    ended: Callable[[], Ended],
    cancel: Callable[[], None],
) -> None:
    """Passes on the events that the cells' machines write to the folder, until all cells have ended."""
    logs = {cell: Tail(_event_log(workdir, cell)) for cell in cells}
    try:
        while logs:
            for cell, refusal in list(ended()):
                if refusal is not None:
                    raise UserError(refusal)
                for message in logs.pop(cell).new():
                    on_event(read_event(message))
                on_event(Event(cell))
            for log in logs.values():
                for message in log.new():
                    on_event(read_event(message))
    except KeyboardInterrupt:
        on_event(STOPPING)
        raise
    finally:
        cancel()


def _event_log(workdir: Path, cell: Cell) -> Path:
    return workdir / "logs" / f"{cell.file_name}.jsonl"


def _engine(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this executor needs the package {module}: pip install 'scaling-jax[{extra}]'") from None
