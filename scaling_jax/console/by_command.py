"""A scan by somebody's command, with progress on the console."""

import functools
import shlex
from pathlib import Path
from typing import Any

from scaling_jax.console.commands import ScanDisplay
from scaling_jax.console.signals import leave, sigterm_interrupts
from scaling_jax.console.terminal import Terminal
from scaling_jax.report.units import in_unit
from scaling_jax.scanning import Experiment, Study
from scaling_jax.scanning.by_command import arguments, check_command, train_by_command


def scan_by_command(experiment: Experiment, results: Path, command: str, dry_run: bool, **limits: Any) -> bool:
    """Runs a scan by a command, and shows its progress; True if it is done. A dry run only shows the first command.

    Args:
      limits: see `train_by_command`.

    Raises:
      UserError, KeyboardInterrupt: see `train_by_command`.
      SystemExit: with code 0, after SIGTERM stopped the scan.
    """
    console = Terminal(functools.partial(in_unit, unit=experiment.unit))
    check_command(command)
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
        try:
            train_by_command(
                study,
                command,
                on_event=display.on_event,
                say=lambda line: console.print(line, soft_wrap=True),
                **limits,
            )
        except KeyboardInterrupt:
            leave(not terminated(), console.print)
    return True
