"""Budget scans and their tables on the command line: scan, and fit of losses at fixed numbers of tokens."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING

from scaling_jax.io import UserError

if TYPE_CHECKING:
    from scaling_jax.scanning.budget_scan import BudgetScan


def scan_at_budgets(
    scan: "BudgetScan", results: Path | None, dry_run: bool, tensorboard: bool, wandb: str | None
) -> None:
    """Trains a budget scan and fits its table; a dry run shows what that takes."""
    from scaling_jax.console.budget_scan import budget_plan_table, budget_scan_on_console
    from scaling_jax.console.dashboards import asked_for
    from scaling_jax.console.terminal import Terminal
    from scaling_jax.io.stores import publish, working_copy
    from scaling_jax.report.units import in_unit
    from scaling_jax.scanning.budget_plan import plan_budget_scan

    folder = working_copy(results or Path("results") / scan.name)
    if dry_run:
        table = budget_plan_table(plan_budget_scan(scan, folder))
        Terminal(functools.partial(in_unit, unit=scan.unit)).print(table)
        return
    written = budget_scan_on_console(scan, folder, asked_for(tensorboard, wandb))
    fit_budgets(written)
    publish(folder)


def fit_budgets(table: Path, penalty: str = "0.01", json: bool = False) -> None:
    """Fits a table of losses at fixed tokens, and writes its fit and figures."""
    from scaling_jax.console.budgets import budget_tables
    from scaling_jax.console.terminal import Terminal, Working
    from scaling_jax.report import write_budget_figures
    from scaling_jax.report.units import in_unit
    from scaling_jax.results.budget_table import fit_budget_table, write_budget_fit
    from scaling_jax.scanning.budget_records import is_budget_scan, read_budget_scan

    with Working("fitting the table") as working:
        found = fit_budget_table(table, penalty)
        written = write_budget_fit(found)
        working.say("drawing figures")
        figures = write_budget_figures(found)
    if json:
        print(written.read_text(), end="")
        return
    unit = read_budget_scan(table.parent).unit if is_budget_scan(table.parent) else "tokens"
    Terminal(functools.partial(in_unit, unit=unit)).print(budget_tables(found, written, figures))


def table_of(results: Path) -> Path:
    """The table of a budget scan, if `results` is its folder; else `results`.

    Raises:
      UserError: if the scan isn't finished.
    """
    from scaling_jax.scanning.budget_records import TABLE, is_budget_scan

    if not is_budget_scan(results):
        return results
    if not (results / TABLE).exists():
        raise UserError(f"{results} isn't finished (no {TABLE}): run the same scan again to continue it")
    return results / TABLE


def refuse_budget_scan(results: Path, command: str) -> None:
    """Raises UserError if a folder holds a budget scan, for a command that takes scans of steps to a loss alone."""
    from scaling_jax.scanning.budget_records import is_budget_scan

    if is_budget_scan(results):
        raise UserError(
            f"{results} holds a budget scan, which {command} doesn't take: scaling-jax fit {results} draws its "
            "figures; with --to-steps it writes a table of steps to losses, which compare takes"
        )
