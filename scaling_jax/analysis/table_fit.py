"""From a table of steps to loss, anybody's CSV, to fit.json beside it and a table to print."""

import dataclasses
import math
from pathlib import Path

from rich.console import Group as Rows
from rich.table import Table as Printed
from rich.text import Text

from scaling_jax.analysis.fit_json import fit_as_json
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
        fit = fit_scan(**table.columns, steps_tried=table.steps_tried)
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


def print_fit(found: TableFit, written: Path) -> Rows:
    """Every trade-off, the law through them, what was left out."""
    shown = Printed(title="S_min in steps; E_min, B_crit, CBS20 in tokens", title_justify="left", title_style="bold")
    for column in ("model", "loss", "S_min", "E_min", "B_crit", "95 % interval", "CBS20", "flags"):
        shown.add_column(column, justify="left" if column in ("model", "flags") else "right", no_wrap=column != "model")
    for point in found.fit.points:
        t = point.tradeoff
        s_min, e_min, b_crit, cbs20 = (
            "–" if t.one_sided else short(value) for value in (t.s_min, t.e_min, t.b_crit, t.cbs20)
        )
        flags = ["one-sided"] * t.one_sided + [f"{point.not_reached} missed"] * bool(point.not_reached)
        interval = "–".join(short(end) for end in t.b_crit_interval)
        shown.add_row(point.model, f"{point.loss:.4g}", s_min, e_min, b_crit, interval, cbs20, ", ".join(flags))
    lines = [
        *law_lines(found.fit, found.joint, found.forms),
        *(f"note: {note}" for note in found.notes),
        f"fit: {written}",
    ]
    return Rows(shown, *(Text(line) for line in lines))


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


def short(value: float) -> str:
    """Three significant digits, with k, M, G."""
    if value in (0.0, math.inf):
        return "0" if value == 0 else "∞"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"
