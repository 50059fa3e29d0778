"""Experiment files: Python that defines EXPERIMENT or RUNS, or the experiment.json of a scan."""

import json
import runpy
from pathlib import Path
from typing import Any

from scaling_jax.config import from_dict
from scaling_jax.errors import UserError
from scaling_jax.scanning.experiment import Experiment
from scaling_jax.training import Run


def load_experiment(path: Path) -> Experiment:
    """The `EXPERIMENT` of a Python file, or what a scan's experiment.json describes.

    Raises:
      UserError: if there is no such file, or it defines none.
    """
    experiment = _definitions(path).get("EXPERIMENT")
    if not isinstance(experiment, Experiment):
        raise UserError(f"{path} doesn't define EXPERIMENT = Experiment(…)")
    return experiment


def load_plan(path: Path) -> Experiment | dict[str, Run]:
    """As `load_experiment`, or a Python file's `RUNS` by name.

    Raises:
      UserError: if there is no such file, or it defines neither.
    """
    defined = _definitions(path)
    plan = defined.get("EXPERIMENT", defined.get("RUNS"))
    if isinstance(plan, Experiment) or (isinstance(plan, dict) and all(isinstance(r, Run) for r in plan.values())):
        return plan
    raise UserError(f"{path} defines neither EXPERIMENT = Experiment(…) nor RUNS = {{name: Run(…)}}")


def _definitions(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no experiment file {path}: give one such as experiments/demo.py")
    if path.suffix != ".json":
        return runpy.run_path(str(path))
    try:
        return {"EXPERIMENT": from_dict(Experiment, json.loads(path.read_text(encoding="utf-8")))}
    except json.JSONDecodeError as error:
        raise UserError(f"{path} isn't JSON: {error}") from None
