"""Reads, checks and fits a CSV table of losses at fixed numbers of tokens. Errors name the line and the column."""

import csv
import dataclasses
import math
from pathlib import Path
from typing import Any, NamedTuple

from scaling_jax.fitting import Budget, BudgetFit, BudgetLaw, fit_budget, steps_from_budgets
from scaling_jax.io import UserError
from scaling_jax.io.files import cell_text, write_rows
from scaling_jax.results.results import finite
from scaling_jax.results.table_rows import (
    check_batches_in_tokens,
    check_loss,
    check_positive,
    filled_rows,
    lines_of,
    number,
    write_beside,
)

NAMES = ("model", "batch_tokens", "tokens", "loss")
OPTIONAL = ("learning_rate", "seed")
PENALTY = 0.01  # nats per token; the largest batch within this of the best one is told


class BudgetTable(NamedTuple):
    """The columns of a table, with one row for each run."""

    path: Path
    lines: list[int]  # line of each row in the file
    model: list[str]
    batch_tokens: list[float]
    tokens: list[float]  # of the whole run
    loss: list[float]  # nats per token at its end; NaN if it diverged
    learning_rate: list[float]  # NaN if unknown
    seed: list[str]

    @property
    def columns(self) -> dict[str, Any]:
        """Keyword arguments of `fitting.fit_budget` and `fitting.steps_from_budgets`."""
        return {name: getattr(self, name) for name in (*NAMES, "learning_rate")} | {"run": self.seed}


class Steps(NamedTuple):
    """A row of the table of steps that comes from budgets."""

    model: str
    batch_tokens: float
    target_loss: float  # nats per token
    steps: float  # NaN if no budget reached the loss
    steps_tried: float


@dataclasses.dataclass(frozen=True, eq=False)
class BudgetTableFit:
    """The fit of a table."""

    table: BudgetTable
    fit: BudgetFit
    penalty: str  # as given: nats per token, or a share of the loss as in 1%

    def allowed(self, budget: Budget) -> float:
        """The penalty at a budget, in nats per token."""
        return nats_of(self.penalty, budget.loss)


def is_budget_table(path: Path) -> bool:
    """True if the table's header has tokens and a loss but no steps."""
    try:
        header = _header(lines_of(path))
    except (UserError, csv.Error):
        return False  # the reader of tables says why
    return {"tokens", "loss"} <= set(header) and not {"steps", "target_loss"} & set(header)


def read_budget_table(path: Path) -> BudgetTable:
    """Reads and checks a CSV table.

    Columns: model, batch_tokens (tokens per step), tokens (of the whole run), and loss (nats per token at its end;
    empty if the run diverged). Optional: learning_rate, and seed, which tells runs with the same settings apart.

    Raises:
      UserError: at the first mistake. Names the file, the line, the column and what to do.
    """
    lines = lines_of(path)
    try:
        header = _header(lines)
        missing = [name for name in NAMES if name not in header]
        if missing:
            raise UserError(f"{path} line 1: no column {missing[0]}: a table of budgets needs {', '.join(NAMES)}")
        twice = [name for name in (*NAMES, *OPTIONAL) if header.count(name) > 1]
        if twice:
            raise UserError(f"{path} line 1: column {twice[0]} is there twice; remove or rename one")
        table = _read(path, header, csv.reader(lines))
    except csv.Error as error:
        raise UserError(f"{path} isn't CSV ({error}): correct it") from None
    _check(table)
    return table


def fit_budget_table(path: Path, penalty: str = f"{PENALTY:g}") -> BudgetTableFit:
    """Reads and fits a CSV table (see `read_budget_table`).

    Args:
      path: of the table.
      penalty: above the loss of the best batch, in nats per token or as a share of the loss, such as 1%.

    Raises:
      UserError: if the table has a mistake, or the penalty is none.
    """
    nats_of(penalty, 1.0)
    table = read_budget_table(path)
    return BudgetTableFit(table, fit_budget(**table.columns), penalty)


def nats_of(penalty: str, loss: float) -> float:
    """A penalty such as 0.01 or 1% in nats per token, at a loss.

    Raises:
      UserError: if it is no positive number.
    """
    share = penalty.endswith("%")
    try:
        value = float(penalty.removesuffix("%"))
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UserError(f"--penalty {penalty} must be positive: nats per token such as 0.01, or a share such as 1%")
    return value / 100 * loss if share else value


def write_budget_fit(found: BudgetTableFit) -> Path:
    """Writes <table>.fit.json next to the CSV, and returns its path.

    Raises:
      UserError: if the file can't be written.
    """
    return write_beside(found.table.path, budget_fit_as_json(found))


def write_steps(path: Path) -> Path:
    """Writes steps to losses, interpolated between the budgets of a table, to <table>.steps.csv. Returns its path.

    Raises:
      UserError: if the table has a mistake, or its budgets don't overlap in loss.
    """
    table = read_budget_table(path)
    try:
        columns = steps_from_budgets(**table.columns)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    written = path.with_suffix(".steps.csv")
    write_rows(written, Steps, [Steps(*row) for row in zip(*columns.values(), strict=True)])
    return written


def interpolated_note(written: Path) -> str:
    """What a fit to steps of `write_steps` must say."""
    return (
        f"steps to a loss aren't measured: they are interpolated between the losses of whole runs on several budgets "
        f"({written.name})"
    )


def budget_fit_as_json(found: BudgetTableFit) -> dict[str, Any]:
    """A fit as JSON values. Batches and budgets in tokens, losses in nats per token."""
    fit = found.fit
    return {
        "budget_law": fit.law and _law_as_json(fit.law),
        "budget_laws": {model: _law_as_json(law) for model, law in fit.laws.items()},
        "confidence": fit.confidence,
        "noise": finite(fit.noise),
        "budgets": [_budget_as_json(budget, found.allowed(budget)) for budget in fit.budgets],
        "notes": list(fit.notes),
    }


def _law_as_json(law: BudgetLaw) -> dict[str, Any]:
    return {
        "formula": "b_opt_tokens = constant * tokens**exponent",
        "constant": law.constant,
        "exponent": law.exponent,
        "exponent_interval": law.exponent_interval,
        "valid_range": law.valid_range,
        "confidence": law.confidence,
        "misfit_p": finite(law.misfit_p),
        "budgets": law.budgets,
        "bounds": law.bounds,
    }


def _budget_as_json(budget: Budget, allowed: float) -> dict[str, Any]:
    runs = budget.runs
    return {
        "model": budget.model,
        "tokens": budget.tokens,
        "kind": budget.kind,
        "b_opt": finite(budget.b_opt),
        "b_opt_interval": [finite(x) for x in budget.b_opt_interval],
        "loss": finite(budget.loss),
        "learning_rate": finite(budget.rate_at(budget.best_batch)),
        "penalty": finite(allowed),
        "largest_batch_within_penalty": [finite(x) for x in budget.largest_within(allowed)],
        "batches": [
            {
                "batch_tokens": float(batch),
                "loss": float(runs.loss[k]),
                "learning_rate": finite(runs.learning_rate[k]),
                "at_edge": bool(runs.at_edge[k]),
                "penalty": [finite(x) for x in budget.penalty_at(float(batch))],
            }
            for k, batch in enumerate(runs.batch_tokens)
        ],
    }


def _header(lines: list[str]) -> list[str]:
    return [name.strip().lower() for name in next(csv.reader(lines[:1]), [])]


def _read(path: Path, header: list[str], rows: Any) -> BudgetTable:
    next(rows, None)
    columns: dict[str, list] = {name: [] for name in (*NAMES, *OPTIONAL)}
    numbers = []
    for line, row in filled_rows(path, header, rows):
        numbers.append(line)
        cells = dict(zip(header, row, strict=True))
        for name, column in columns.items():
            column.append(_value(f"{path} line {line}, column {name}", name, cells.get(name, "")))
    return BudgetTable(path, numbers, **columns)


def _value(where: str, name: str, cell: str):
    if name == "model" and not cell:
        raise UserError(f"{where} is empty: give the model a name, such as a")
    if name in ("model", "seed"):
        return cell_text(cell)
    if not cell or cell.lower() == "nan":
        if name in ("loss", "learning_rate"):
            return math.nan
        raise UserError(f"{where} is {cell or 'empty'}: it must be a number")
    value = number(where, cell)
    check_positive(where, cell, value, "; leave it empty if the run diverged" if name == "loss" else "")
    if name == "loss":
        check_loss(where, cell, value, "; if the run diverged, leave it empty")
    return value


def _check(table: BudgetTable) -> None:
    seen: dict[tuple, int] = {}
    known: dict[tuple, tuple[bool, int]] = {}
    rows = zip(table.model, table.batch_tokens, table.tokens, table.learning_rate, table.seed, strict=True)
    for line, (model, batch, tokens, rate, seed) in zip(table.lines, rows, strict=True):
        if tokens < batch:
            raise UserError(
                f"{table.path} line {line}, column tokens: {tokens:g} tokens are fewer than the batch of {batch:g}; "
                "tokens counts those of the whole run"
            )
        has_rate, other = known.setdefault((model, batch, tokens), (not math.isnan(rate), line))
        if has_rate == math.isnan(rate):
            raise UserError(
                f"{table.path} line {line}, column learning_rate: this batch has a rate on line "
                f"{other if has_rate else line} and none on line {line if has_rate else other}; give all or none"
            )
        key = (model, batch, tokens, None if math.isnan(rate) else rate, seed)
        first = seen.setdefault(key, line)
        if first != line:
            raise UserError(
                f"{table.path} line {line}: model {model}, {batch:g} tokens a batch, {tokens:g} tokens and this "
                f"learning rate are also on line {first}; if these are two runs, add a column seed, else remove one"
            )
    if all(math.isnan(loss) for loss in table.loss):
        raise UserError(f"{table.path}, column loss: every run diverged; add runs with lower learning rates")
    for model in dict.fromkeys(table.model):
        of_model = [row for row in zip(table.batch_tokens, table.lines, table.model, strict=True) if row[2] == model]
        check_batches_in_tokens(table.path, model, {batch: line for batch, line, _ in reversed(of_model)})
