"""Trains a scan on several machines through Ray or SLURM. All machines share the results folder.

A cell is one job of the engine. It continues what the folder holds of its cell, so the engine may restart it at any
time. If the engine wrongly takes a machine for dead, it may start a cell while the old process still writes. So a
cell is trained under a lock in the folder. The training process holds it, and the file system frees it when that ends.

A guided search needs those of other cells first. So a job trains these too, unless others have, or waits while they do.
"""

import contextlib
import dataclasses
import importlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from scaling_jax.io import UserError
from scaling_jax.io.files import Tail, append_line
from scaling_jax.io.locks import locked
from scaling_jax.io.stores import cache_folder
from scaling_jax.scanning.cells import finished_runs
from scaling_jax.scanning.experiment import Cell
from scaling_jax.scanning.records import read_experiment
from scaling_jax.scanning.worker import STOPPING, Event, event_message, read_event, train_in_workers

_LOCK_SECONDS = 300  # much longer than a process takes to save and end once its cell was given to another machine
_STOP_SECONDS = 60
_POLL_SECONDS = 1.0
_MINUTES_PER_JOB = 240  # time limit of a SLURM job; afterwards it is queued again and continues


class Job(Protocol):
    """What a machine shall do: a value that travels there by pickle, and may be called again after it was lost."""

    @property
    def log(self) -> Path:
        """File in the shared folder to which the job appends messages, as JSON lines."""
        ...

    def __call__(self) -> str | None:
        """Does the work. Returns None, or the error message if it can't be done."""
        ...


Ended = Iterable[tuple[Job, str | None]]  # jobs that have ended; the text is the error, None if it is done


class Listener(NamedTuple):
    """What to do with the news of jobs."""

    on_message: Callable[[Any], None]  # a line of a job's log
    on_end: Callable[[Job], None]  # a job is done
    on_stop: Callable[[], None]  # an interrupt; the jobs are told to stop


def train_cells(
    executor: str,
    workdir: Path,
    cells: Sequence[Cell],
    on_event: Callable[[Event], None],
    options: dict[str, Any] | None = None,
    source: Path | None = None,
    **further: Any,
) -> None:
    """Trains the cells of a scan by the executor "ray" or "slurm", a job for each.

    Args:
      source: the Python file that defines the experiment's tasks, if it has any; the same path on every machine.

    Raises:
      UserError, KeyboardInterrupt: see `run_on_ray` and `run_on_slurm`; also if a cell can't be trained.
    """
    jobs: dict[Job, Cell] = {CellJob(workdir.resolve(), cache_folder().resolve(), cell, source): cell for cell in cells}
    listener = Listener(
        on_message=lambda message: on_event(read_event(message)),
        on_end=lambda job: on_event(Event(jobs[job])),
        on_stop=lambda: on_event(STOPPING),
    )
    ENGINES[executor](workdir, list(jobs), listener, options, **further)


def run_on_ray(workdir: Path, jobs: Sequence[Job], listener: Listener, options: dict[str, Any] | None = None) -> None:
    """Runs the jobs as tasks of a Ray cluster: the one in `RAY_ADDRESS`, or this machine's, or a new local one.

    Args:
      options: of `ray.remote`, such as num_gpus. The default is one CPU per task, and any number of restarts.

    Raises:
      UserError: if Ray is missing or doesn't know an option, or a job returns an error.
      KeyboardInterrupt: after the jobs were told to save, and a minute at most.
    """
    ray = _engine("ray", extra="ray")
    try:  # Ray restarts a task if its machine or process dies, but not if its code raises an error
        remote = ray.remote(**({"num_cpus": 1, "max_retries": -1} | (options or {})))(_call)
    except (ValueError, TypeError) as error:
        raise UserError(
            f"Ray refuses these --executor-options ({' '.join(str(error).split())}): give options of ray.remote"
        ) from None
    started_here = not ray.is_initialized()
    if started_here:
        ray.init(log_to_driver=False)
    try:
        tasks = {remote.remote(job): job for job in jobs}

        def ended() -> Ended:
            for task in ray.wait(list(tasks), timeout=_POLL_SECONDS)[0]:
                yield tasks.pop(task), ray.get(task)

        def cancel() -> None:
            for force in (False, True):
                for task in tasks:
                    ray.cancel(task, force=force)
                if not tasks or not ray.wait(list(tasks), num_returns=len(tasks), timeout=_STOP_SECONDS)[1]:
                    return

        _watch(jobs, listener, ended, cancel)
    finally:
        if started_here:
            ray.shutdown()


def run_on_slurm(
    workdir: Path,
    jobs: Sequence[Job],
    listener: Listener,
    options: dict[str, Any] | None = None,
    cluster: str = "slurm",
) -> None:
    """Runs the jobs as a SLURM job array, through submitit. Their logs are in `workdir/logs/slurm`.

    Args:
      options: of submitit's `update_parameters`, such as slurm_partition, gpus_per_node or timeout_min.
      source: see `train_on_ray`.
      cluster: "local" runs the jobs on this machine.

    Raises:
      UserError: if submitit or SLURM is missing, SLURM refuses the jobs, or a job returns an error.
      KeyboardInterrupt: after the jobs were cancelled. SLURM gives them time to save: KillWait, by default 30 seconds.
    """
    submitit = _engine("submitit", extra="slurm")
    if cluster == "slurm" and shutil.which("sbatch") is None:
        raise UserError("no sbatch on this machine: start the scan on a machine that submits jobs to SLURM")
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
        submitted = executor.map_array(_Submitted(), jobs)
    except (NameError, submitit.core.utils.FailedJobError) as error:
        raise UserError(f"SLURM refused the jobs ({' '.join(str(error).split())}): change --executor-options") from None
    waiting = dict(zip(jobs, submitted, strict=True))

    def ended() -> Ended:
        time.sleep(_POLL_SECONDS)
        for job in [job for job, slurm in waiting.items() if slurm.done()]:
            slurm = waiting.pop(job)
            try:
                yield job, slurm.result()
            except submitit.core.utils.UncompletedJobError:
                yield job, f"SLURM job {slurm.job_id} ended without a result: see its log {slurm.paths.stderr}"

    def cancel() -> None:
        for slurm in waiting.values():
            slurm.cancel()

    _watch(jobs, listener, ended, cancel)


ENGINES: dict[str, Callable[..., None]] = {"ray": run_on_ray, "slurm": run_on_slurm}


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


@dataclasses.dataclass(frozen=True)
class CellJob:
    """Trains one cell."""

    workdir: Path
    cache: Path  # folder for packed text; the same path on every machine
    cell: Cell
    source: Path | None = None  # the Python file that defines the experiment's tasks; the same path on every machine

    @property
    def log(self) -> Path:
        return self.workdir / "logs" / f"{self.cell.file_name}.jsonl"

    def __call__(self) -> str | None:
        os.environ["SCALING_JAX_CACHE"] = str(self.cache)

        def report(event: Event) -> None:
            if event.progress is not None:
                append_line(self.log, event_message(event))

        try:
            experiment = read_experiment(self.workdir)
            for cell in (*reversed(experiment.inner(self.cell)), self.cell):
                seconds = _LOCK_SECONDS if cell == self.cell else math.inf
                with locked_cell(self.workdir, cell, seconds) as lock:
                    if cell != self.cell and finished_runs(experiment, cell, self.workdir) is not None:
                        continue
                    train_in_workers(self.workdir, [cell], report, [None], lock, platform=None, source=self.source)
        except (UserError, OSError) as error:
            return str(error)
        return None


class _Submitted:
    """Calls a job for submitit, which calls `checkpoint` to know what to queue again: the same job."""

    def __call__(self, job: Job) -> str | None:
        return job()

    def checkpoint(self, job: Job) -> Any:
        return _engine("submitit", extra="slurm").helpers.DelayedSubmission(self, job)


def _call(job: Job) -> str | None:
    return job()


def locked_cell(
    workdir: Path, cell: Cell, seconds: float = _LOCK_SECONDS
) -> contextlib.AbstractContextManager[int | None]:
    """Waits until no other process trains the cell, then holds its lock. Yields the lock's descriptor; see `locked`.

    Raises:
      UserError: if another process still holds the lock after `seconds`, or the file system has no locks.
    """
    path = workdir / "logs" / f"{cell.file_name}.lock"
    return locked(path, f"{cell.name} of {workdir}", seconds=seconds, wait=True, insist=True)


def _watch(jobs: Sequence[Job], listener: Listener, ended: Callable[[], Ended], cancel: Callable[[], None]) -> None:
    """Passes on what the jobs' machines write to the folder, until all jobs have ended."""
    logs = {job: Tail(job.log) for job in jobs}
    try:
        while logs:
            for job, refusal in list(ended()):
                for message in logs.pop(job).new():
                    listener.on_message(message)
                if refusal is not None:
                    raise UserError(refusal)
                listener.on_end(job)
            for log in logs.values():
                for message in log.new():
                    listener.on_message(message)
    except KeyboardInterrupt:
        listener.on_stop()
        raise
    finally:
        cancel()


def _engine(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"this executor needs the package {module}: pip install 'scaling-jax[{extra}]'") from None
