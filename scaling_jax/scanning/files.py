"""Experiment files: Python that defines EXPERIMENT, or the experiment.json of a scan."""

import json
import runpy
from pathlib import Path

from scaling_jax.config import from_dict
from scaling_jax.errors import UserError
from scaling_jax.scanning.experiment import Experiment


def load_experiment(path: Path) -> Experiment:
    """The `EXPERIMENT` of a Python file, or what a scan's experiment.json describes.

    Raises:
      UserError: if there is no such file, or it defines none.
    """
    if not path.is_file():
        raise UserError(f"no experiment file {path}: give one such as experiments/demo.py")
    if path.suffix == ".json":
        try:
            return from_dict(Experiment, json.loads(path.read_text(encoding="utf-8")))
        except json.JSONDecodeError as error:
            raise UserError(f"{path} isn't JSON: {error}") from None
    experiment = runpy.run_path(str(path)).get("EXPERIMENT")
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} doesn't define EXPERIMENT = Experiment(…)")
    return experiment
