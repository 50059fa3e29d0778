"""Experiment files: Python that defines EXPERIMENT."""

import runpy
from pathlib import Path

from scaling_jax.errors import UserError
from scaling_jax.scanning.experiment import Experiment


def load_experiment(path: Path) -> Experiment:
    """The `EXPERIMENT` of a file.

    Raises:
      UserError: if there is no such file, or it defines none.
    """
    if not path.is_file():
        raise UserError(f"no experiment file {path}: give one such as experiments/demo.py")
    experiment = runpy.run_path(str(path)).get("EXPERIMENT")
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} doesn't define EXPERIMENT = Experiment(…)")
    return experiment
