"""Trains a study by a command on several machines, through Ray or SLURM.

Each job runs one command after another, as a scan on one machine does. All decisions follow from the runs in the shared
folder. So the jobs need not know of each other, and a job that is lost loses only the run that it was training.
"""

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from scaling_jax.io import UserError
from scaling_jax.io.files import append_line
from scaling_jax.scanning.by_command import Limits, check_command, train_by_command
from scaling_jax.scanning.executors import ENGINES, Job, Listener
from scaling_jax.scanning.records import read_experiment
from scaling_jax.scanning.study import Study
from scaling_jax.scanning.worker import STOPPING, Event, event_message, read_event


@dataclasses.dataclass(frozen=True)
class CommandJob:
    """Trains what the study in a folder asks for, until it is done."""

    folder: Path
    command: str
    limits: Limits  # of this job
    directory: Path  # in which the command runs
    number: int

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"command-{self.number}.jsonl"

    def __call__(self) -> str | None:
        def report(event: Event) -> None:
            if event is not STOPPING:
                append_line(self.log, event_message(event))

        try:
            os.chdir(self.directory)
            train_by_command(
                Study(read_experiment(self.folder), self.folder),
                self.command,
                self.limits,
                on_event=report,
                say=lambda line: append_line(self.log, {"said": line}),
            )
        except (UserError, OSError) as error:
            return str(error)
        return None


def train_by_command_on(
    executor: str,
    study: Study,
    command: str,
    limits: Limits,
    *,
    options: dict[str, Any] | None = None,
    on_event: Callable[[Event], None] = lambda _: None,
    say: Callable[[str], None] = lambda _: None,
    **further: Any,
) -> None:
    """`train_by_command` with `limits.jobs` jobs of "ray" or "slurm", each with one command at a time.

    Raises:
      UserError, KeyboardInterrupt: see `train_by_command`, `run_on_ray` and `run_on_slurm`.
    """
    check_command(command)
    one = dataclasses.replace(limits, jobs=1)
    jobs: list[Job] = [
        CommandJob(study.folder.resolve(), command, one, Path.cwd(), number) for number in range(limits.jobs)
    ]

    def on_message(message: Any) -> None:
        if "said" in message:
            say(message["said"])
        else:
            on_event(read_event(message))

    listener = Listener(on_message, on_end=lambda _: None, on_stop=lambda: on_event(STOPPING))
    ENGINES[executor](study.folder, jobs, listener, options, **further)
