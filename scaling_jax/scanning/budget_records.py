"""The files of a budget scan: budget_scan.json, the finished losses among its runs, and annealed.csv."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

from scaling_jax.io import UserError
from scaling_jax.io.config import from_dict, sealed, to_dict, unsealed
from scaling_jax.io.files import read_whole, write_json, write_rows
from scaling_jax.scanning.annealing import AnnealedLoss, AnnealingPlan, finished_losses
from scaling_jax.scanning.budget_scan import BudgetScan
from scaling_jax.scanning.budget_search import CellSearch, Find, Losses
from scaling_jax.scanning.experiment import Cell
from scaling_jax.training import Recipe

SCHEMA = 1
SCAN, TABLE = "budget_scan.json", "annealed.csv"
_REMEDY = "give the folder of a budget scan; or remove it, then the same scan command writes it again"


def is_budget_scan(workdir: Path) -> bool:
    """True if a folder holds a budget scan."""
    return (workdir / SCAN).exists()


def write_budget_scan(workdir: Path, scan: BudgetScan) -> None:
    write_json(workdir / SCAN, sealed({"schema": SCHEMA, **to_dict(scan)}))


def read_budget_scan(workdir: Path) -> BudgetScan:
    """The budget scan in a folder.

    Raises:
      UserError: if the folder holds none, or the file is damaged or from a later version.
    """
    if not is_budget_scan(workdir):
        raise UserError(f"{workdir} holds no budget scan (no {SCAN}): give the folder that `scaling-jax scan` wrote")
    return parse_budget_scan(workdir / SCAN, _REMEDY)


def parse_budget_scan(path: Path, remedy: str) -> BudgetScan:
    """The budget scan in a budget_scan.json. Raises UserError as `read_budget_scan` does."""
    try:
        values = unsealed(json.loads(read_whole(path)))
        schema = values.pop("schema", None) if isinstance(values, dict) else None
        if not isinstance(schema, int) or schema > SCHEMA:
            raise UserError(f"its schema {schema} is none that this version reads, up to {SCHEMA}")
        return from_dict(BudgetScan, values)
    except UserError as error:
        raise UserError(f"{path} is from another version, or damaged ({error}): {remedy}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"can't read {path} ({error}): {remedy}") from None


def check_same_scan(workdir: Path, scan: BudgetScan) -> None:
    """Raises UserError if a folder holds another kind of scan, or one with another name, recipe, model or decay.

    More batch sizes, seeds and subjects are fine: then the scan grows, and its runs are used again.
    """
    if (workdir / "experiment.json").exists():
        raise UserError(f"{workdir} holds a scan of steps to a loss: choose another folder with --results")
    if not is_budget_scan(workdir):
        return
    before = read_budget_scan(workdir)
    fields = [field.name for field in dataclasses.fields(Recipe)] + ["name", "decay_share", "decay_form"]
    changes = [
        f"{name} = {getattr(before, name)!r}, not {getattr(scan, name)!r}"
        for name in fields
        if getattr(before, name) != getattr(scan, name)
    ]
    models = {subject.model.name: subject.model for subject in before.subjects}
    changes += [
        f"model {subject.model.name} = {models[subject.model.name]}, not {subject.model}"
        for subject in scan.subjects
        if models.get(subject.model.name, subject.model) != subject.model
    ]
    if changes:
        raise UserError(f"{workdir} holds another budget scan ({changes[0]}): choose another folder with --results")


def losses_at(plan: AnnealingPlan, found: list[AnnealedLoss]) -> Losses:
    """The loss at each horizon of a plan; infinite where the run diverged."""
    at = {row.tokens: row.loss for row in found}
    return [at.get(tokens, math.inf) for tokens in plan.horizons]


def finder(scan: BudgetScan, workdir: Path) -> Find:
    """Finds losses among the finished runs in a folder; reads each of them once."""
    known: dict[tuple[Cell, int], Losses] = {}

    def find(cell: Cell, rate_index: int) -> Losses | None:
        key = cell, rate_index
        if key not in known:
            plan = scan.plan(cell, rate_index)
            if (found := finished_losses(plan, workdir)) is None:
                return None
            known[key] = losses_at(plan, found)
        return known[key]

    return find


def write_table(workdir: Path, scan: BudgetScan, searches: Mapping[Cell, CellSearch]) -> Path:
    """Writes annealed.csv: a row for each model, batch size, seed, learning rate and horizon. Returns its path."""
    rows = []
    for cell in scan.cells:
        by_rate = {scan.rate(cell, index): losses for index, losses in searches[cell].tried.items()}
        for rate, losses in sorted(by_rate.items()):
            for tokens, loss in zip(scan.horizons(cell), losses, strict=True):
                loss = loss if math.isfinite(loss) else math.nan  # an empty cell: diverged
                rows.append(AnnealedLoss(cell.model, cell.batch_tokens, tokens, loss, rate, cell.seed))
    write_rows(workdir / TABLE, AnnealedLoss, rows)
    return workdir / TABLE
