"""Worker processes, one per core, that train the cells of a scan; the events that they send.

On two cores, two pinned processes trained small models 1.4 to 2.5 times as fast as one process on both cores
(benchmarks/placement.py).
"""

import dataclasses
import os
import re
import signal
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from scaling_jax.io.config import to_dict
from scaling_jax.io.workers import Command, Message, run_jobs, serve
from scaling_jax.scanning.experiment import Cell
from scaling_jax.training import Progress


@dataclasses.dataclass(frozen=True)
class Event:
    """News of a scan: a run of a cell was evaluated, or a cell is done, or the scan is stopping."""

    cell: Cell | None  # None: the whole scan is stopping
    progress: Progress | None = None  # of a run after an evaluation; None: the cell is done


STOPPING = Event(None)
_START = "import pathlib, sys; from scaling_jax.scanning.worker import main; main(*map(pathlib.Path, sys.argv[1:]))"


def train_in_workers(
    workdir: Path,
    cells: Sequence[Cell],
    on_event: Callable[[Event], None],
    cores: Sequence[int | None],
    lock: int | None = None,
    platform: str | None = "cpu",
    source: Path | None = None,
    first: Callable[[Cell], Sequence[Cell]] = lambda _: (),
) -> None:
    """Trains the cells in order, with one worker on each of `cores`.

    Args:
      first: the cells that must be done before a cell; those that aren't among `cells` are done.
      lock: descriptor of the lock file, so that the workers hold the lock until they end.
      platform: JAX's platform; None lets JAX choose, which prefers accelerators.
      source: the Python file that defines the experiment's tasks, if it has any. Workers run it.

    Raises:
      UserError, OSError: if a worker raised it, or a worker died.
      KeyboardInterrupt: after the workers have saved their runs and ended.
    """
    left, given = set(cells), set()

    def ready() -> list[Cell]:
        found = [cell for cell in cells if cell not in given and not left.intersection(first(cell))]
        given.update(found)
        return found

    def done(cell: Cell) -> None:
        left.remove(cell)
        on_event(Event(cell))

    log = f"worker-{socket.gethostname()}-{os.getpid()}"
    run_jobs(
        ready(),
        [
            Command(
                ("-c", _START, str(workdir), *([str(source)] if source else [])),
                environment=worker_environment(platform),
                core=core,
                log=workdir / "logs" / f"{log}-{core}.log",
                lock=lock,
            )
            for core in cores
        ],
        on_done=done,
        further=lambda _: ready(),
        on_message=lambda message: on_event(read_event(message)),
        on_interrupt=lambda: on_event(STOPPING),
    )


def event_message(event: Event) -> Message:
    """The JSON values of an event of a cell; `read_event` is the inverse."""
    if event.progress is None:
        return {"cell": event.cell, "progress": None}
    return {"cell": event.cell, "progress": {k: None if v != v else v for k, v in to_dict(event.progress).items()}}


def read_event(message: Message) -> Event:
    """The event in a message of `event_message`."""
    if message["progress"] is None:
        return Event(Cell(*message["cell"]))
    values: dict[str, Any] = {
        name: float("nan") if value is None else value for name, value in message["progress"].items()
    }
    return Event(Cell(*message["cell"]), Progress(**values))


def main(workdir: Path, source: Path | None = None) -> None:
    """The main function of a worker process; for `source` see `train_in_workers`."""
    # JAX takes a second to import, and only workers need it.
    import jax

    from scaling_jax.parallel.devices import keep_compiled_programs
    from scaling_jax.scanning.cells import train_cell
    from scaling_jax.scanning.records import load_experiment, read_experiment
    from scaling_jax.training import Interrupted

    stopping = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopping.set())  # sent by SLURM, and on preempted machines
    keep_compiled_programs()
    experiment = read_experiment(workdir)
    if source is not None:
        experiment = experiment.with_tasks_of(load_experiment(source))

    def work(job: list, send: Callable[[Message], None]) -> bool:
        cell = Cell(*job)
        try:
            train_cell(
                experiment,
                cell,
                workdir,
                stopping.is_set,
                lambda progress: send(event_message(Event(cell, progress))),
                jax.local_device_count(),
            )
        except Interrupted:
            return False
        return True

    serve(work, stopping.set)


def worker_environment(platform: str | None) -> dict[str, str]:
    """A worker's environment. On CPUs it has one thread and one device, whatever the parent's flags are."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\S+", "", os.environ.get("XLA_FLAGS", ""))
    chosen = dict(os.environ) if platform is None else os.environ | {"JAX_PLATFORMS": platform}
    return chosen | {"XLA_FLAGS": f"{flags} --xla_cpu_multi_thread_eigen=false".strip()}
