"""A scan that goes on beyond its batch sizes until both limits of the trade-off are seen."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

from scaling_jax.console.commands import scan_on_console
from scaling_jax.console.terminal import Terminal
from scaling_jax.parallel import from_first, is_first, together
from scaling_jax.report.units import in_unit
from scaling_jax.results import read_results
from scaling_jax.scanning import Experiment
from scaling_jax.scanning.widening import wider


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
