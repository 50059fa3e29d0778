"""A scan by somebody's command, with progress on the console."""

import functools
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaling_jax.console.scan_display import ScanDisplay
from scaling_jax.console.signals import leave, sigterm_interrupts
from scaling_jax.console.terminal import Terminal
from scaling_jax.io import UserError
from scaling_jax.report.units import in_unit
from scaling_jax.scanning import Experiment, Study
from scaling_jax.scanning.by_command import Limits, arguments, check_command, train_by_command
from scaling_jax.scanning.command_jobs import train_by_command_on
from scaling_jax.scanning.executors import parse_options


def scan_by_command(
    experiment: Experiment,
    results: Path,
    command: str,
    limits: Limits,
    dry_run: bool = False,
    executor: str = "local",
    executor_options: Sequence[str] = (),
) -> bool:
    """Runs a scan by a command, and shows its progress; True if it is done. A dry run only shows the first command.

    Args:
      executor: "local", "ray" or "slurm".
      executor_options: of Ray or SLURM, as "key=value".

    Raises:
      UserError, KeyboardInterrupt: see `train_by_command` and `train_by_command_on`.
      SystemExit: with code 0, after SIGTERM stopped the scan.
    """
    console = Terminal(functools.partial(in_unit, unit=experiment.unit))
    check_command(command)
    options = parse_options(executor_options)
    if options and executor == "local":
        raise UserError(f"--executor-options {' '.join(executor_options)} need --executor ray or --executor slurm")
    study = Study(experiment, results)
    left = study.cells_left
    if dry_run:
        console.print(f"{len(left)} of {len(experiment.cells)} batch sizes to do", soft_wrap=True)
        if (setting := study.ask(wait=False)) is not None:
            folder = study.folder / "commands" / setting.name
            console.print(shlex.join(arguments(command, setting, folder / "curve", folder)), soft_wrap=True)
        study.give_all_back()
        return False
    console.print(f"{experiment.name}: results in {results}", soft_wrap=True)
    done = [cell for cell in experiment.cells if cell not in left]
    with ScanDisplay(experiment, console, done) as display, sigterm_interrupts() as terminated:
        shown: dict[str, Any] = {
            "on_event": display.on_event,
            "say": lambda line: console.print(line, soft_wrap=True),
        }
        try:
            if executor == "local":
                train_by_command(study, command, limits, **shown)
            elif left:
                train_by_command_on(executor, study, command, limits, options=options, **shown)
        except KeyboardInterrupt:
            leave(not terminated(), console.print)
    return True
