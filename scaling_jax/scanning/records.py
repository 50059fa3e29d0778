"""The files of experiments: a user's Python file, and a scan's experiment.json and search records in cells/.

A file in cells/ records a search that has ended, and names its runs. So a finished scan stays finished, even if a later
version searches differently. All older schemas of experiment.json stay readable:

1: experiment.json has no schema, and there is no cells/.
2: the default warm-up of an experiment is that of a `Run`, 10 steps.
3: an experiment has no warm-up by default.
4: learning rates have `search`; up to schema 3, all searches were on the grid.
5: learning rates have 4 `places` by default, and 1 before.
"""

import dataclasses
import json
import runpy
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scaling_jax.io import UserError
from scaling_jax.io.config import from_dict, read_config, sealed, to_dict, unsealed
from scaling_jax.io.files import read_whole, write_json
from scaling_jax.scanning.budget_records import SCAN as BUDGET_SCAN
from scaling_jax.scanning.budget_records import parse_budget_scan
from scaling_jax.scanning.budget_scan import BudgetScan
from scaling_jax.scanning.experiment import Cell, Experiment, LearningRates
from scaling_jax.tasks import TaskModel
from scaling_jax.training import Recipe, Run
from scaling_jax.training.records import read_run_config

SCHEMA = 5
_PLACES_BEFORE = 1  # the default up to schema 4
_WARMUP_BEFORE = 10  # steps; the default up to schema 2
_REMEDY = "give the folder of a scan; or remove it, then the same scan command writes it again"


@dataclasses.dataclass(frozen=True)
class SearchRecord:
    """A search that has ended: its cell, its settings and its runs."""

    model: str
    batch_tokens: int
    seed: int
    target_losses: tuple[float, ...]
    learning_rates: LearningRates
    max_tokens: int
    runs: tuple[str, ...]  # run ids: the names of their folders
    schema: int = SCHEMA

    def __post_init__(self):
        for run in self.runs:
            if run in ("", ".", "..") or set(run) & set("/\\\0"):
                raise UserError(f"runs has {run!r}, which isn't the name of a run's folder")

    def answers(self, experiment: Experiment) -> bool:
        """True if an experiment asks no more of this cell than the search answered, whichever way it searched.

        A search with the places that were the default then answers an experiment with those that are it now.
        """
        subject = experiment.subject(self.model)
        asked = dataclasses.replace(self.learning_rates, search=subject.learning_rates.search)
        defaults = _PLACES_BEFORE, LearningRates.places
        if self.schema < 5 and (asked.places, subject.learning_rates.places) == defaults:
            asked = dataclasses.replace(asked, places=LearningRates.places)
        return (
            set(subject.target_losses) <= set(self.target_losses)
            and asked == subject.learning_rates
            and self.max_tokens >= experiment.max_tokens
        )


def write_search(workdir: Path, experiment: Experiment, cell: Cell, runs: Sequence[str]) -> None:
    subject = experiment.subject(cell.model)
    record = SearchRecord(*cell, subject.target_losses, subject.learning_rates, experiment.max_tokens, tuple(runs))
    write_json(workdir / "cells" / f"{cell.file_name}.json", sealed(to_dict(record)))


def read_search(workdir: Path, cell: Cell) -> SearchRecord | None:
    """The record of a cell's search; None if the search hasn't ended.

    Raises:
      UserError: if the file is damaged.
    """
    path = workdir / "cells" / f"{cell.file_name}.json"
    if not path.exists():
        return None
    remedy = "remove it, then the same scan command writes it again"
    record = read_config(SearchRecord, path, remedy)
    if (held := Cell(record.model, record.batch_tokens, record.seed)) != cell:
        raise UserError(f"{path} is damaged (it holds the search of {held.name}): {remedy}")
    if wrong := [run for run in record.runs if Path(run).name != run or "\0" in run]:
        raise UserError(f"{path} is damaged (runs: {wrong[0]!r} isn't the name of a run): {remedy}")
    return record


def write_experiment(workdir: Path, experiment: Experiment) -> None:
    """Writes experiment.json, unless it already holds this experiment."""
    path, values = workdir / "experiment.json", sealed({"schema": SCHEMA, **to_dict(experiment)})
    try:
        if json.loads(read_whole(path)) == values:
            return
    except (OSError, ValueError):
        pass
    write_json(path, values)


def read_experiment(workdir: Path) -> Experiment:
    """The experiment of the scan in a folder.

    Raises:
      UserError: if the folder holds no scan, or the file is damaged or from a later version.
    """
    path = workdir / "experiment.json"
    if not path.exists():
        raise UserError(f"{workdir} holds no scan (no experiment.json): give the folder that a scan wrote")
    return parse_experiment(path, _REMEDY)


def parse_experiment(path: Path, remedy: str) -> Experiment:
    """The experiment in an experiment.json. Raises UserError as `read_experiment` does."""
    try:
        values = unsealed(json.loads(read_whole(path)))
        schema = values.pop("schema", 1) if isinstance(values, dict) else 1
        if not isinstance(schema, int) or schema > SCHEMA:
            raise UserError(f"its schema {schema} is from a later version; this version reads up to {SCHEMA}")
        if schema < 3 and isinstance(values, dict):
            values.setdefault("warmup_steps", _WARMUP_BEFORE)
        if schema < 4 and isinstance(values, dict):
            _as_before_schema_4(values)
        return from_dict(Experiment, values)
    except UserError as error:
        raise UserError(f"{path} is from another version, or damaged ({error}): {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"can't read {path} ({error}): {remedy}") from None


def _as_before_schema_4(values: dict[str, Any]) -> None:
    """Adds what the learning rates of an older experiment.json leave unsaid."""
    subjects = values.get("subjects")
    for subject in subjects if isinstance(subjects, list) else ():
        rates = subject.get("learning_rates") if isinstance(subject, dict) else None
        if isinstance(rates, dict):
            rates.setdefault("search", "grid")
            rates.setdefault("places", _PLACES_BEFORE)


def is_without_searches(workdir: Path) -> bool:
    """True if the scan has schema 1, which has no files in cells/."""
    try:
        return "schema" not in json.loads(read_whole(workdir / "experiment.json"))
    except (OSError, ValueError, TypeError):
        return False


def check_same_recipe(workdir: Path, experiment: Experiment) -> None:
    """Raises UserError if a folder holds an experiment with another name, recipe or model.

    More batch sizes, seeds, subjects, learning rates and lower targets are fine: then the scan grows.
    """
    path = workdir / "experiment.json"
    if not path.exists():
        return
    before = read_experiment(workdir)
    changes = [
        f"{field.name} = {getattr(before, field.name)!r}, not {getattr(experiment, field.name)!r}"
        for field in dataclasses.fields(Recipe)
        if getattr(before, field.name) != getattr(experiment, field.name)
    ]
    models = {subject.model.name: subject.model for subject in before.subjects}
    changes += [
        f"model {subject.model.name} = {models[subject.model.name]}, not {subject.model}"
        for subject in experiment.subjects
        if models.get(subject.model.name, subject.model) != subject.model
    ]
    if before.name != experiment.name:
        changes.append(f"name = {before.name!r}, not {experiment.name!r}")
    if changes:
        remedy = "choose another folder with --results"
        if len(changes) == 1 and (before.warmup_steps, experiment.warmup_steps) == (_WARMUP_BEFORE, 0):
            remedy += f", or set warmup_steps = {_WARMUP_BEFORE}, the former default, to add to this one"
        raise UserError(f"{workdir} holds another experiment ({changes[0]}): {remedy}")


def load_experiment(path: Path) -> Experiment:
    """The `EXPERIMENT` in a Python file, or the experiment in a scan's experiment.json.

    Raises:
      UserError: if there is no such file, it can't be run, or it defines no experiment.
    """
    experiment = load_scan(path)
    if isinstance(experiment, BudgetScan):
        raise UserError(f"{path} defines a budget scan, and this needs a scan of steps to a loss: Experiment(…)")
    return experiment


def load_scan(path: Path) -> Experiment | BudgetScan:
    """Like `load_experiment`, or the budget scan in a Python file or in a budget_scan.json."""
    experiment = _definitions(path).get("EXPERIMENT")
    if not isinstance(experiment, (Experiment, BudgetScan)):
        raise UserError(
            f"{path} defines no EXPERIMENT: write EXPERIMENT = Experiment(…), or BudgetScan(…) for losses at budgets"
        )
    return experiment


def source_of(experiment: Experiment | BudgetScan) -> tuple[Path | None, bool]:
    """(the Python file that defines the experiment's tasks, or None; True if other processes can get the tasks)."""
    files = {s.model.trainable.source for s in experiment.subjects if isinstance(s.model, TaskModel)}
    return next(iter(files), None), None not in files and len(files) < 2


def load_plan(path: Path) -> Experiment | dict[str, Run]:
    """Like `load_experiment`; if a Python file has no `EXPERIMENT`, its `RUNS` by name. Of a budget scan its trunks.

    Raises:
      UserError: if there is no such file, it can't be run, or it defines neither.
    """
    defined = _definitions(path)
    plan = defined.get("EXPERIMENT", defined.get("RUNS"))
    if isinstance(plan, BudgetScan):
        return {cell.name: plan.plan(cell, 0).trunk for cell in plan.cells}
    if isinstance(plan, Experiment) or (isinstance(plan, dict) and all(isinstance(r, Run) for r in plan.values())):
        return plan
    raise UserError(
        f"{path} defines neither EXPERIMENT nor RUNS: write EXPERIMENT = Experiment(…) or RUNS = {{name: Run(…)}}"
    )


def load_run(path: Path, name: str | None = None) -> Run:
    """The `RUN` in a Python file, the one of its `RUNS` called `name`, or the run in a config.json.

    Raises:
      UserError: if there is no such file, it can't be run, or it defines no such run.
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
        raise UserError(f"there is no file {path}: give an experiment or run file, such as experiments/demo.py")
    if path.suffix != ".json":
        try:
            if (beside := str(path.parent.resolve())) not in sys.path:
                sys.path.append(beside)  # the file may import what lies beside it
            defined = runpy.run_path(str(path))
            _note_source(defined, path.resolve())
            return defined
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except (Exception, SystemExit) as error:
            what = traceback.format_exception_only(error)[-1].strip()
            raise UserError(f"{path}{_line(path, error)} can't be run: {what}") from error
    parse = parse_budget_scan if path.name == BUDGET_SCAN else parse_experiment
    return {"EXPERIMENT": parse(path, f"give a scan's {path.name}, without sha256 if you changed it")}


def _note_source(defined: dict[str, Any], path: Path) -> None:
    """Lets tasks know the file that defines them, so that other processes can run it too."""
    experiment, runs = defined.get("EXPERIMENT"), defined.get("RUNS")
    models = [s.model for s in experiment.subjects] if isinstance(experiment, (Experiment, BudgetScan)) else []
    models += [
        run.model
        for run in (defined.get("RUN"), *(runs if isinstance(runs, dict) else {}).values())
        if isinstance(run, Run)
    ]
    for model in models:
        if isinstance(model, TaskModel):
            model.trainable.source = path


def _line(path: Path, error: BaseException) -> str:
    """The line of the error as text; empty if it isn't in this file."""
    if isinstance(error, SyntaxError):
        return f" line {error.lineno}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    return f" line {lines[-1]}" if lines else ""
