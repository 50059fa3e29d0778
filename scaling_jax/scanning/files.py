"""Experiment files: Python that defines EXPERIMENT or RUNS, or the experiment.json of a scan."""

import runpy
import traceback
from pathlib import Path
from typing import Any

from scaling_jax.errors import UserError
from scaling_jax.scanning.experiment import Experiment
from scaling_jax.scanning.records import parse_experiment
from scaling_jax.training import Run
from scaling_jax.training.records import read_run_config


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


def load_run(path: Path, name: str | None = None) -> Run:
    """The `RUN` of a Python file, one of its `RUNS`, or the run of a config.json.

    Raises:
      UserError: if there is no such file, or it defines none of that name.
    """
    if path.name == "config.json":
        return read_run_config(path.parent).run
    defined = _definitions(path)
    runs = defined.get("RUNS", {})
    if name is not None:
        if name not in runs:
            raise UserError(f"{path} defines no run {name!r}: choose from {', '.join(runs) or 'none'}")
        return runs[name]
    if isinstance(run := defined.get("RUN"), Run):
        return run
    hint = f"choose one of its RUNS with --name: {', '.join(runs)}" if runs else "write RUN = Run(…)"
    raise UserError(f"{path} defines no RUN: {hint}")


def _definitions(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no experiment file {path}: give one such as experiments/demo.py")
    if path.suffix != ".json":
        try:
            return runpy.run_path(str(path))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (Exception, SystemExit) as error:
            what = traceback.format_exception_only(error)[-1].strip()
            raise UserError(f"{path}{_line(path, error)} can't be run: {what}") from error
    return {"EXPERIMENT": parse_experiment(path, "give the experiment.json of a scan")}


def _line(path: Path, error: BaseException) -> str:
    """Where in the file, if in it at all."""
    if isinstance(error, SyntaxError):
        return f" line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f" line {lines[-1]}" if lines else ""
