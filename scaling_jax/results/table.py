"""A table of steps to loss from anybody's CSV, checked: mistakes are named by line and column."""

import csv
import dataclasses
import difflib
import itertools
import math
from pathlib import Path
from typing import Any, NamedTuple

from scaling_jax.fitting import FormFit, JointFit, ScanFit, compare_forms, fit_joint, fit_scan
from scaling_jax.io import UserError
from scaling_jax.results.results import fit_as_json
from scaling_jax.training.records import write_json

NAMES = {
    "model": ("model",),
    "batch_tokens": ("batch_tokens",),
    "target_loss": ("target_loss", "loss"),
    "steps": ("steps",),
}
OPTIONAL = {name: (name,) for name in ("steps_tried", "params", "passed_early")} | {"run": ("seed", "run")}
IN_SEQUENCES = {"batch_sequences", "batch_seqs", "sequences", "batch_size", "batch_examples", "examples"}
FEWEST_TOKENS = 64  # a scan whose batches are all smaller counts sequences
LARGEST_GAP = 64  # between neighbouring batches; a wider one is a change of unit
LARGEST_LOSS = 15.0  # nats per token; guessing among three million tokens costs as much


class Table(NamedTuple):
    """Columns of one length, a row for each run and target loss."""

    path: Path
    lines: list[int]  # where each row stands in the file
    model: list[str]
    batch_tokens: list[float]
    target_loss: list[float]  # nats per token
    steps: list[float]  # NaN: not reached
    run: list[str]
    steps_tried: list[float]  # where a run that didn't reach its target ended; NaN if unknown
    params: list[float]  # of the model, NaN if unknown
    notes: tuple[str, ...]

    @property
    def columns(self) -> dict[str, Any]:
        """Keyword arguments of `fitting.fit_scan` and its like."""
        names = ("model", "batch_tokens", "target_loss", "steps", "run", "steps_tried")
        return {name: getattr(self, name) for name in names}

    @property
    def num_params(self) -> dict[str, float] | None:
        """Parameters by model; None unless all are known."""
        known = {m: n for m, n in zip(self.model, self.params, strict=True) if math.isfinite(n)}
        return known if set(known) == set(self.model) else None


def read_table(path: Path) -> Table:
    """Reads columns model, batch_tokens, target_loss (or loss), steps; and seed or run, steps_tried, params if there.

    Batches are in tokens per step, losses in nats per token; empty `steps` mean that the target wasn't reached, and
    `steps_tried` says within how many steps. A loss that some run had `passed_early`, as a scan's measurements.csv
    says, is left out: steps to it are unknown.

    Raises:
      UserError: naming file, line and column of the first mistake, and the way out.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"can't read {path}: {error}; a table is CSV text in UTF-8") from error
    rows = csv.reader(text.splitlines())
    try:
        return _checked_table(path, rows)
    except csv.Error as error:
        raise UserError(f"{path} line {rows.line_num} isn't CSV: {error}") from None


def _checked_table(path: Path, rows: Any) -> Table:
    header = [name.strip().lower() for name in next(rows, [])]
    places = _find_columns(path, header)
    columns: dict[str, list] = {name: [] for name in (*NAMES, *OPTIONAL)}
    lines = []
    for row in rows:
        if not any(cell.strip() for cell in row):
            continue
        if len(row) != len(header):
            raise UserError(f"{path} line {rows.line_num}: {len(row)} cells under {len(header)} columns")
        lines.append(rows.line_num)
        cells = {name: row[place].strip() for name, place in places.items()}
        for name in columns:
            where = f"{path} line {rows.line_num}, column {header[places[name]] if name in places else name}"
            columns[name].append(_value(where, name, cells.get(name, "")))
    if not lines:
        raise UserError(f"{path} has no rows under its header")
    lines, columns, notes = _without_early(lines, columns)
    if not lines:
        raise UserError(f"{path}, column passed_early: every loss was passed early, give lower target losses")
    table = Table(path, lines, **columns, notes=notes)
    _check_duplicates(table)
    _check_batches(table)
    return table._replace(notes=notes + _never_reached(table))


def _without_early(lines: list[int], columns: dict[str, list]) -> tuple[list[int], dict[str, list], tuple[str, ...]]:
    """Rows without the losses that some run of the model was below when it was first evaluated."""
    keys = list(zip(columns["model"], columns["target_loss"], strict=True))
    passed_early = columns.pop("passed_early")
    early = {key: line for line, key, passed in zip(lines, keys, passed_early, strict=True) if passed}
    kept = [i for i, key in enumerate(keys) if key not in early]
    notes = tuple(
        f"line {line}, column passed_early: loss {loss:g} of model {model} is left out, some run was below it when it "
        "was first evaluated"
        for (model, loss), line in early.items()
    )
    return [lines[i] for i in kept], {name: [column[i] for i in kept] for name, column in columns.items()}, notes


def _find_columns(path: Path, header: list[str]) -> dict[str, int]:
    if not header:
        raise UserError(f"{path} is empty: the first line should name the columns {', '.join(NAMES)}")
    for name in header:
        if header.count(name) > 1 and name:
            raise UserError(f"{path} line 1: column {name} is there twice")
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
        return f"; {sequences[0]} may count sequences: give batch_tokens = sequences × tokens in a sequence"
    for separator, called in ((";", "semicolons"), ("\t", "tabs")):
        if separator in "".join(header):
            return f": columns are separated by {called}, save the table with commas"
    others = [name for name in header if name not in NAMES]
    names = NAMES[column]
    close = [name for name in others if any(name in n or n in name for n in names if name)]
    close += [match for n in names for match in difflib.get_close_matches(n, others, n=1, cutoff=0.5)]
    if close:
        return f"; did you mean {close[0]!r}? Rename it to {column}"
    return f" among {', '.join(header)}: the table takes {', '.join(NAMES)}"


def _value(where: str, name: str, cell: str):
    if name == "model" and not cell:
        raise UserError(f"{where} is empty: name the model, any name will do")
    if name in ("model", "run"):
        return cell
    if name == "passed_early":
        if cell.lower() not in ("", "true", "false"):
            raise UserError(f"{where} is {cell!r}: it should be True or False")
        return cell.lower() == "true"
    if not cell or cell.lower() == "nan":
        if name in ("steps", "steps_tried", "params"):
            return math.nan
        raise UserError(f"{where} is {cell or 'empty'}: it should be a number")
    try:
        value = float(cell.replace("_", ""))
    except ValueError:
        raise UserError(f"{where} is {cell!r}: it should be a number") from None
    if not (math.isfinite(value) and value > 0):
        hint = "; leave it empty where the target was not reached" if name == "steps" else ""
        raise UserError(f"{where} is {cell}: it should be positive and finite{hint}")
    if name == "target_loss" and value > LARGEST_LOSS:
        raise UserError(f"{where} is {cell}, too much for nats per token: is it a perplexity? Give its natural log")
    return value


def _check_duplicates(table: Table) -> None:
    seen: dict[tuple, int] = {}
    for line, *key in zip(table.lines, table.model, table.batch_tokens, table.target_loss, table.run, strict=True):
        first = seen.setdefault(tuple(key), line)
        if first != line:
            raise UserError(
                f"{table.path} line {line}, column batch_tokens: model {key[0]}, {key[1]:g} tokens and loss {key[2]:g} "
                f"came before, on line {first}; tell runs apart by a column seed, or remove one"
            )


def _check_batches(table: Table) -> None:
    for model in dict.fromkeys(table.model):
        rows = [i for i, name in enumerate(table.model) if name == model]
        batches = sorted({table.batch_tokens[i] for i in rows})
        largest = max(rows, key=lambda i: table.batch_tokens[i])
        if batches[-1] < FEWEST_TOKENS:
            raise UserError(
                f"{table.path} line {table.lines[largest]}, column batch_tokens: the largest batch of model {model} is "
                f"{batches[-1]:g} tokens; if these are sequences, multiply by the tokens in one"
            )
        for smaller, larger in itertools.pairwise(batches):
            if larger >= LARGEST_GAP * smaller:
                row = next(i for i in rows if table.batch_tokens[i] == smaller)
                raise UserError(
                    f"{table.path} line {table.lines[row]}, column batch_tokens: model {model} has batches of "
                    f"{smaller:g} and next of {larger:g} tokens; if the smaller are sequences, multiply by the tokens "
                    "in one"
                )
        if len(batches) < 3:
            listed = ", ".join(f"{b:g}" for b in batches)
            raise UserError(
                f"{table.path} line {table.lines[rows[0]]}, column batch_tokens: model {model} has {len(batches)} "
                f"distinct batch size{'s' * (len(batches) > 1)} ({listed}); a trade-off takes 3, better 7"
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
    return tuple(
        f"line {table.lines[members[0]]}, column steps: no batch size of model {model} reached loss {loss:g}"
        for (model, loss), members in rows.items()
        if all(math.isnan(table.steps[i]) for i in members)
    )


@dataclasses.dataclass(frozen=True, eq=False)
class TableFit:
    """A fitted CSV."""

    table: Table
    fit: ScanFit
    joint: JointFit | None
    forms: tuple[FormFit, ...]
    notes: tuple[str, ...]


def fit_table(path: Path, *, laws: bool = True) -> TableFit:
    """Fits a CSV; `read_table` says what it holds. Without `laws` the joint fit and other forms are left out.

    Raises:
      UserError: naming line and column of what is wrong with it.
    """
    table = read_table(path)
    try:
        fit = fit_scan(**table.columns)
        joint = fit_joint(**table.columns) if laws else None
        forms = compare_forms(**table.columns, num_params=table.num_params) if laws else ()
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return TableFit(table, fit, joint, forms, table.notes + fit.notes)


def write_fit(found: TableFit) -> Path:
    """Writes fit.json beside the CSV; <name>.fit.json in a scan's own folder, whose fit.json knows more.

    Raises:
      UserError: if it can't be written.
    """
    folder = found.table.path.parent
    own = (folder / "experiment.json").exists()
    path = folder / (f"{found.table.path.stem}.fit.json" if own else "fit.json")
    try:
        write_json(
            path,
            fit_as_json(found.fit, found.joint, found.forms, found.notes) | {"measurements": found.table.path.name},
        )
    except OSError as error:
        raise UserError(f"can't write {path}: {error.strerror}") from error
    return path
