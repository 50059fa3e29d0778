"""From a table of steps to loss, anybody's CSV, to fit.json beside it and its laws in a line each."""

import dataclasses
from pathlib import Path

from scaling_jax.analysis.fit_json import fit_as_json
from scaling_jax.analysis.numbers import short
from scaling_jax.analysis.table import Table, read_table
from scaling_jax.errors import UserError
from scaling_jax.fitting import FormFit, JointFit, LossLaw, ScanFit, compare_forms, fit_joint, fit_scan
from scaling_jax.training.records import write_json


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


def law_lines(fit: ScanFit, joint: JointFit | None, forms: tuple[FormFit, ...]) -> list[str]:
    """The laws in sentences, or that there is none."""
    law = fit.law
    if law is None:
        return ["No law: batches should lie on both sides of B_crit at three losses or more."]
    lines = [
        f"{_law(law)}, for losses {law.loss_range[1]:.4g} to {law.loss_range[0]:.4g} (nats per token), "
        "outside of which it is untested"
    ]
    if joint is not None and joint.law is not None:
        lines.append(f"from all runs at once: {_law(joint.law)}")
    for form in forms:
        floor = f" - {form.floor:.3g}" if form.floor else ""
        low, high = form.valid_range
        lines.append(
            f"form {form.form}: {form.constant:.3g} tokens · (x{floor})^{form.exponent:.2f}, x = {form.variable}, "
            f"{short(low)}–{short(high)}; held-out error {form.held_out_error:.1%}, criterion {form.criterion:.1f}"
        )
    return lines


def _law(law: LossLaw) -> str:
    low, high = law.exponent_interval
    return (
        f"B_crit = {law.b_star:.3g} tokens · L^{law.exponent:.2f}, exponent's {law.confidence:.0%} interval "
        f"[{low:.2f}, {high:.2f}]"
    )
