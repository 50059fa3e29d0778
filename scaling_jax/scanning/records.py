"""What a scan writes beside its runs: experiment.json, and a file in cells/ for each cell whose search has ended.

A cell's file names its runs, so that a finished scan stays finished whatever later versions search.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from scaling_jax.errors import UserError
from scaling_jax.io.config import from_dict, read_config, to_dict
from scaling_jax.io.files import write_json
from scaling_jax.scanning.experiment import Cell, Experiment, LearningRates
from scaling_jax.training import Recipe

SCHEMA = 2  # 1: experiment.json held no schema, and there were no cells
_REMEDY = "give the folder of a scan, or scan again in another one"


@dataclasses.dataclass(frozen=True)
class SearchRecord:
    """A search that has ended: what was asked, and the runs that answered."""

    model: str
    batch_tokens: int
    seed: int
    target_losses: tuple[float, ...]
    learning_rates: LearningRates
    max_tokens: int
    runs: tuple[str, ...]  # run ids, which are their folders' names
    schema: int = SCHEMA

    def answers(self, experiment: Experiment) -> bool:
        """Whether an experiment asks of this cell what the search was for, or less."""
        subject = experiment.subject(self.model)
        return (
            set(subject.target_losses) <= set(self.target_losses)
            and self.learning_rates == subject.learning_rates
            and self.max_tokens >= experiment.max_tokens
        )


def write_search(workdir: Path, experiment: Experiment, cell: Cell, runs: Sequence[str]) -> None:
    subject = experiment.subject(cell.model)
    record = SearchRecord(*cell, subject.target_losses, subject.learning_rates, experiment.max_tokens, tuple(runs))
    write_json(workdir / "cells" / f"{cell.file_name}.json", to_dict(record))


def read_search(workdir: Path, cell: Cell) -> SearchRecord | None:
    """None while the cell's search hasn't ended.

    Raises:
      UserError: if it is damaged.
    """
    path = workdir / "cells" / f"{cell.file_name}.json"
    if not path.exists():
        return None
    return read_config(SearchRecord, path, "remove it, and the same scan writes it again")


def write_experiment(workdir: Path, experiment: Experiment) -> None:
    """Writes experiment.json, unless it says the same already."""
    path, values = workdir / "experiment.json", {"schema": SCHEMA, **to_dict(experiment)}
    try:
        if json.loads(path.read_bytes()) == values:
            return
    except (OSError, ValueError):
        pass
    write_json(path, values)


def read_experiment(workdir: Path) -> Experiment:
    """The experiment whose scan a folder holds.

    Raises:
      UserError: if it holds none, a damaged one or one of a later version.
    """
    path = workdir / "experiment.json"
    if not path.exists():
        raise UserError(f"{workdir} holds no scan (no experiment.json): give the folder that a scan wrote")
    return parse_experiment(path, _REMEDY)


def parse_experiment(path: Path, remedy: str) -> Experiment:
    """An experiment.json; raises UserError as `read_experiment`."""
    try:
        values = json.loads(path.read_bytes())
        schema = values.pop("schema", 1)
        if not isinstance(schema, int) or schema > SCHEMA:
            raise UserError(f"its schema, {schema}, is of a later version")
        return from_dict(Experiment, values)
    except UserError as error:
        raise UserError(f"{path} is of another version or damaged ({error}): {remedy}") from None
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"can't read {path} ({error}): {remedy}") from None


def is_without_searches(workdir: Path) -> bool:
    """Whether a scan is of schema 1, which kept no files in cells/."""
    try:
        return "schema" not in json.loads((workdir / "experiment.json").read_bytes())
    except (OSError, ValueError, TypeError):
        return False


def check_same_recipe(workdir: Path, experiment: Experiment) -> None:
    """Raises UserError if a folder's runs were trained in another way than an experiment asks for; it may grow."""
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
        raise UserError(f"{workdir} holds another experiment ({changes[0]}): choose another folder with --results")
