"""Reads, checks and fits a CSV table of steps to loss from any training code. Errors name the line and the column."""

import csv
import dataclasses
import difflib
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scaling_jax.fitting import FormFit, JointFit, ScanFit, fit_scan, further_fits
from scaling_jax.io import UserError
from scaling_jax.io.files import cell_text
from scaling_jax.results.measurements import few_steps_notes
from scaling_jax.results.results import fit_as_json
from scaling_jax.results.table_rows import (
    check_batches_in_tokens,
    check_loss,
    check_positive,
    filled_rows,
    lines_of,
    number,
    write_beside,
)

NAMES = {
    "model": ("model",),
    "batch_tokens": ("batch_tokens",),
    "target_loss": ("target_loss", "loss"),
    "steps": ("steps",),
}
OPTIONAL = {
    name: (name,) for name in ("steps_tried", "params", "passed_early", "offset_steps", "learning_rate", "tuned")
} | {"run": ("seed", "run")}
IN_SEQUENCES = {"batch_sequences", "batch_seqs", "sequences", "batch_size", "batch_examples", "examples"}

_FROM_CURVES = (
    "the table is another one: give a column tokens (of the whole run) in place of steps, for the best batch at each "
    "number of tokens; or rows of steps to the same few losses, from each run's curve (fitting.steps_to_loss)"
)


class Table(NamedTuple):
    """The columns of a table, with one row for each run and target loss."""

    path: Path
    lines: list[int]  # line of each row in the file
    model: list[str]
    batch_tokens: list[float]
    target_loss: list[float]  # nats per token
    steps: list[float]  # NaN if not reached
    run: list[str]
    steps_tried: list[float]  # total steps of a run that didn't reach its target; NaN if unknown
    params: list[float]  # of the model; NaN if unknown
    offset_steps: list[float]  # steps of a run that come before the trade-off, such as a warm-up's
    learning_rate: list[float]  # of the run; NaN if unknown
    tuned: list[bool]  # False if a better learning rate may lie beyond those tried
    notes: tuple[str, ...]

    @property
    def columns(self) -> dict[str, Any]:
        """Keyword arguments of `fitting.fit_scan`, `fit_joint` and `compare_forms`."""
        names = ("model", "batch_tokens", "target_loss", "steps", "run", "steps_tried")
        return {name: getattr(self, name) for name in names}

    @property
    def num_params(self) -> dict[str, float] | None:
        """{model: parameters}; None unless known for all models."""
        known = {m: n for m, n in zip(self.model, self.params, strict=True) if math.isfinite(n)}
        return known if set(known) == set(self.model) else None


@dataclasses.dataclass(frozen=True, eq=False)
class TableFit:
    """The fits of a table."""

    table: Table
    fit: ScanFit
    joint: JointFit | None
    forms: tuple[FormFit, ...]
    notes: tuple[str, ...]


def read_table(path: Path) -> Table:
    """Reads and checks a CSV table.

    Columns: model, batch_tokens (tokens per step), target_loss or loss (nats per token), and steps (empty if the run
    didn't reach the target). Optional columns: seed or run, steps_tried (total steps of a run that didn't reach the
    target), params, passed_early, offset_steps (steps that come before the trade-off; empty if none), learning_rate,
    and tuned (False if a better rate may lie beyond those tried). If any run of a model passed a loss early, the table
    leaves out this loss, because the steps to it are unknown.

    Raises:
      UserError: at the first mistake. Names the file, the line, the column and what to do.
    """
    rows = csv.reader(lines_of(path))
    try:
        return _checked_table(path, rows)
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num} isn't CSV ({error}): correct this line") from None


def fit_table(path: Path, *, laws: bool = True, above_minimum: bool = False, resamples: int | None = None) -> TableFit:
    """Reads and fits a CSV table (see `read_table`). Without `laws`, leaves out the joint fit and the other forms.

    `above_minimum` and `resamples` are those of `fit_scan`.

    Raises:
      UserError: if the table has a mistake. Names the line and the column.
    """
    table = read_table(path)
    try:
        offset = table.offset_steps if any(table.offset_steps) else None
        fit = fit_scan(**table.columns, offset_steps=offset, above_minimum=above_minimum, resamples=resamples)
        joint, forms = further_fits(fit, table.num_params) if laws else (None, ())
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return TableFit(table, fit, joint, forms, table.notes + fit.notes + few_steps_notes(fit.points))


def write_fit(found: TableFit) -> Path:
    """Writes <table>.fit.json next to the CSV, and returns its path. A folder's fit.json is that of its scan.

    Raises:
      UserError: if the file can't be written.
    """
    return write_beside(found.table.path, fit_as_json(found.fit, found.joint, found.forms, found.notes))


def _checked_table(path: Path, rows: Any) -> Table:
    header = [name.strip().lower() for name in next(rows, [])]
    places = _find_columns(path, header)
    columns: dict[str, list] = {name: [] for name in (*NAMES, *OPTIONAL)}
    lines = []
    for line, row in filled_rows(path, header, rows):
        lines.append(line)
        cells = {name: row[place] for name, place in places.items()}
        for name in columns:
            where = f"{path} line {line}, column {header[places[name]] if name in places else name}"
            columns[name].append(_value(where, name, cells.get(name, "")))
    lines, columns, notes = _without_early(lines, columns)
    if not lines:
        raise UserError(f"{path}, column passed_early: every loss was passed early; give lower target losses")
    table = Table(path, lines, **columns, notes=notes)
    _check_offsets(table)
    _check_duplicates(table)
    _check_batches(table)
    return table._replace(notes=notes + _never_reached(table))


def _without_early(lines: list[int], columns: dict[str, list]) -> tuple[list[int], dict[str, list], tuple[str, ...]]:
    """The rows without the losses that some run of the model passed before its first evaluation; and notes on them."""
    keys = list(zip(columns["model"], columns["target_loss"], strict=True))
    passed_early = columns.pop("passed_early")
    early = {key: line for line, key, passed in zip(lines, keys, passed_early, strict=True) if passed}
    kept = [i for i, key in enumerate(keys) if key not in early]
    notes = tuple(
        f"{where}, column passed_early: {losses} of model {model} {'is' if single else 'are'} left out, some run was "
        "below when it was first evaluated"
        for model, where, losses, single in _of_models([(model, loss, line) for (model, loss), line in early.items()])
    )
    return [lines[i] for i in kept], {name: [column[i] for i in kept] for name, column in columns.items()}, notes


def _find_columns(path: Path, header: list[str]) -> dict[str, int]:
    if not header:
        raise UserError(f"{path} is empty: the first line must name the columns {', '.join(NAMES)}")
    for name in header:
        if header.count(name) > 1 and name:
            raise UserError(f"{path} line 1: column {name} is there twice; remove or rename one")
    places = {}
    for column, names in (NAMES | OPTIONAL).items():
        there = [name for name in names if name in header]
        if there:
            places[column] = header.index(there[0])
        elif column in NAMES:
            raise UserError(f"{path} line 1: no column {column}{_hint(column, header)}")
    return places


def _hint(column: str, header: list[str]) -> str:
    sequences = [name for name in header if name in IN_SEQUENCES]
    if column == "batch_tokens" and sequences:
        return f"; if {sequences[0]} counts sequences, give batch_tokens = sequences × tokens per sequence"
    for separator, called in ((";", "semicolons"), ("\t", "tabs")):
        if separator in "".join(header):
            return f"; the columns are separated by {called}: save the table with commas"
    others = [name for name in header if name not in NAMES]
    names = NAMES[column]
    close = [name for name in others if any(name in n or n in name for n in names if name)]
    close += [match for n in names for match in difflib.get_close_matches(n, others, n=1, cutoff=0.5)]
    if close and column == "target_loss":
        return (
            f"; did you mean {close[0]!r}? Rename it to {column} only if steps counts the steps to this loss. If it is "
            f"the loss at the end of a run, {_FROM_CURVES}"
        )
    if close:
        return f"; did you mean {close[0]!r}? Rename it to {column}"
    return f" among {', '.join(header)}: a table needs {', '.join(NAMES)}"


def _value(where: str, name: str, cell: str):
    if name == "model" and not cell:
        raise UserError(f"{where} is empty: give the model a name, such as a")
    if name in ("model", "run"):
        return cell_text(cell)
    if name in ("passed_early", "tuned"):
        if cell.lower() not in ("", "true", "false"):
            raise UserError(f"{where} is {cell!r}: it must be True or False")
        return cell.lower() == "true" if cell else name == "tuned"
    if not cell or cell.lower() == "nan":
        if name in ("steps", "steps_tried", "params", "learning_rate"):
            return math.nan
        if name == "offset_steps":
            return 0.0
        raise UserError(f"{where} is {cell or 'empty'}: it must be a number")
    value = number(where, cell)
    if name == "offset_steps" and value == 0:
        return value
    check_positive(where, cell, value, "; leave it empty if the run didn't reach the target" if name == "steps" else "")
    if name == "target_loss":
        check_loss(where, cell, value)
    return value


def _check_offsets(table: Table) -> None:
    rows = zip(table.lines, table.offset_steps, table.steps, table.steps_tried, strict=True)
    for line, offset, reached, tried in rows:
        steps = tried if math.isnan(reached) else reached
        if offset >= steps:
            raise UserError(
                f"{table.path} line {line}, column offset_steps is {offset:g}, but this row has only {steps:g} steps: "
                "give the steps before the trade-off only, or remove the row"
            )


def _check_duplicates(table: Table) -> None:
    seen: dict[tuple, int] = {}
    for line, *key in zip(table.lines, table.model, table.batch_tokens, table.target_loss, table.run, strict=True):
        first = seen.setdefault(tuple(key), line)
        if first != line:
            raise UserError(
                f"{table.path} line {line}, column batch_tokens: model {key[0]}, {key[1]:g} tokens and loss {key[2]:g} "
                f"are also on line {first}; if these are two runs, add a column seed, else remove one"
            )


def _check_batches(table: Table) -> None:
    for model in dict.fromkeys(table.model):
        rows = [i for i, name in enumerate(table.model) if name == model]
        batches = sorted({table.batch_tokens[i] for i in rows})
        check_batches_in_tokens(table.path, model, {table.batch_tokens[i]: table.lines[i] for i in reversed(rows)})
        if len(batches) < 3:
            listed = ", ".join(f"{b:g}" for b in batches)
            raise UserError(
                f"{table.path} line {table.lines[rows[0]]}, column batch_tokens: model {model} has {len(batches)} "
                f"distinct batch size{'s' * (len(batches) > 1)} ({listed}); a fit needs at least 3, and 7 are better"
            )
        by_loss: dict[float, set[float]] = {}
        for i in rows:
            by_loss.setdefault(table.target_loss[i], set()).add(table.batch_tokens[i])
        if all(len(at) == 1 for at in by_loss.values()):
            raise UserError(
                f"{table.path} line {table.lines[rows[0]]}, column target_loss: model {model} has no loss at two batch "
                f"sizes. If these are the losses at the end of runs, {_FROM_CURVES}"
            )
        if all(math.isnan(table.steps[i]) for i in rows):
            raise UserError(
                f"{table.path} line {table.lines[rows[0]]}, column steps: model {model} reached none of its targets; "
                "give higher target losses or train longer"
            )


def _never_reached(table: Table) -> tuple[str, ...]:
    rows: dict[tuple[str, float], list[int]] = {}
    for i, key in enumerate(zip(table.model, table.target_loss, strict=True)):
        rows.setdefault(key, []).append(i)
    never = [
        (*key, table.lines[members[0]])
        for key, members in rows.items()
        if all(math.isnan(table.steps[i]) for i in members)
    ]
    return tuple(
        f"{where}, column steps: no batch size of model {model} reached {losses}"
        for model, where, losses, _ in _of_models(never)
    )


def _of_models(found: Sequence[tuple[str, float, int]]) -> Iterator[tuple[str, str, str, bool]]:
    """(model, its lines, its losses, whether there is one) from (model, loss, line), for one note of each model."""
    for model in dict.fromkeys(name for name, _, _ in found):
        losses = sorted((loss for name, loss, _ in found if name == model), reverse=True)
        lines = sorted(line for name, _, line in found if name == model)
        if len(losses) == 1:
            yield model, f"line {lines[0]}", f"loss {losses[0]:g}", True
        else:
            said = f"{len(losses)} losses, {losses[0]:g} to {losses[-1]:g}"
            yield model, f"lines {lines[0]} to {lines[-1]}", said, False
