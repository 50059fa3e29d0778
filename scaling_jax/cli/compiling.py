"""The command that compiles for machines that aren't there."""

import sys
from pathlib import Path

import tyro

from scaling_jax.cli.app import app


@app.command(name="compile")
def compile_ahead(experiment: tyro.conf.Positional[Path], topology: str = "v5e:16x16") -> None:
    """Compile every batch size of an experiment for a TPU slice, without one; exit code 1 if something doesn't fit.

    Example: scaling-jax compile experiments/gpt_85m_ramp.py --topology v5p:4x4x8

    Args:
      experiment: a Python file that defines EXPERIMENT, or RUNS by name.
      topology: v4, v5e, v5p or v6e and the slice's shape, such as v5e:4x4 or v5p:4x4x8.
    """
    from rich.console import Console

    from scaling_jax.parallel.topologies import topology as find_topology
    from scaling_jax.report.compile_table import print_compiled
    from scaling_jax.scanning.ahead_of_time import compile_runs, planned_runs
    from scaling_jax.scanning.files import load_plan

    runs, slice_, console = planned_runs(load_plan(experiment)), find_topology(topology), Console()
    with console.status(f"compiling for {slice_.name}") as status:
        batches = []
        for batch in compile_runs(runs, slice_):
            batches.append(batch)
            status.update(f"compiling for {slice_.name}: {len(batches)} of {len(runs)} batch sizes done")
    console.print(print_compiled(batches, slice_), highlight=False)
    if not all(batch.fits for batch in batches):
        sys.exit(1)
