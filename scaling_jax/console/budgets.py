"""The fit of budgets for the terminal: the best batch at each budget, what others cost, and the law."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Group as Rows

from scaling_jax.console.grid import Grid
from scaling_jax.console.tables import Line
from scaling_jax.fitting import Budget, BudgetLaw
from scaling_jax.report.words import short
from scaling_jax.results.budget_table import BudgetTableFit


def budget_tables(found: BudgetTableFit, written: Path, figures: Sequence[Path] = ()) -> Rows:
    """A row for each budget, the penalty of each batch, the laws and the notes."""
    fit = found.fit
    rates = any(math.isfinite(rate) for budget in fit.budgets for rate in budget.runs.learning_rate)
    columns = [
        "model",
        "tokens",
        "loss over\nbatch",
        "B_opt",
        "95 %\ninterval",
        "loss",
        "best\nlr",
        "largest\nbatch",
        "95 %\ninterval",
    ]
    kept = [k for k, name in enumerate(columns) if rates or name != "best\nlr"]
    rows = []
    for budget in fit.budgets:
        largest = budget.largest_within(found.allowed(budget))
        row = (
            budget.model,
            short(budget.tokens),
            budget.kind,
            short(budget.b_opt) if math.isfinite(budget.b_opt) else "–",
            interval(budget.b_opt_interval),
            _loss(budget.loss),
            "–" if math.isnan(budget.rate_at(budget.best_batch)) else f"{budget.rate_at(budget.best_batch):.2g}",
            _largest(largest[0], budget.batch_range[1]),
            interval((largest[1], largest[2])) if math.isfinite(largest[0]) else "–",
        )
        rows.append([row[k] for k in kept])
    allowed = found.penalty if found.penalty.endswith("%") else f"{found.penalty} nats"
    first = Grid(
        [columns[k] for k in kept],
        rows,
        f"Best batch at each budget, in tokens; largest batch within {allowed} of its loss",
        ("model", "loss over\nbatch"),
        heads=2,
    )
    lines = [*_law_lines(found), *(f"note: {note}" for note in fit.notes)]
    if figures:
        lines.append(f"figures in {figures[0].parent}: {', '.join(path.name for path in figures)}")
    penalties: list = []
    for model in fit.models:
        grid = _penalties([budget for budget in fit.budgets if budget.model == model])
        if grid.rows:
            of = f" of {model}" if len(fit.models) > 1 else ""
            penalties += [Line(f"Loss above the best at each budget{of}, in 1e-3 nats, with its 95 % interval"), grid]
    return Rows(first, *penalties, *map(Line, [*lines, f"fit: {written}"]))


def interval(ends: tuple[float, float]) -> str:
    """An interval of batches; a bound where one end is open."""
    low, high = ends
    if low > 0 and high < math.inf:
        return f"{short(low)}–{short(high)}"
    if low > 0:
        return f"≥ {short(low)}"
    return f"≤ {short(high)}" if high < math.inf else "any"


def law_in_words(law: BudgetLaw) -> str:
    """The law with its interval, its range and what it rests on."""
    low, high = law.exponent_interval
    first, last = law.valid_range
    bounds = f", {law.bounds} of them bounds" * bool(law.bounds)
    return (
        f"B_opt = {law.constant:.3g} tokens · D^{law.exponent:.2f} ({100 * law.confidence:.0f} % interval of the "
        f"exponent [{low:.2f}, {high:.2f}]), for D {short(first)}–{short(last)} tokens, {law.budgets} budgets{bounds}; "
        "untested at others"
    )


def _law_lines(found: BudgetTableFit) -> Iterator[str]:
    fit = found.fit
    if fit.law is not None:
        yield law_in_words(fit.law)
        for d in fit.law.valid_range:
            low, high = (float(end) for end in fit.law.band(d))
            yield f"  at {short(d)} tokens: {short(float(fit.law(d)))} [{short(low)}, {short(high)}] tokens"
    if len(fit.models) > 1:
        for model, law in fit.laws.items():
            low, high = law.exponent_interval
            yield f"  {model} alone: exponent {law.exponent:.2f} [{low:.2f}, {high:.2f}]"
    if math.isfinite(fit.noise):
        yield f"noise of a run's loss: {fit.noise:.2g} nats per token (standard deviation, of all budgets alike)"


def _penalties(budgets: Sequence[Budget]) -> Grid:
    """Loss above the best one at each batch size of a model."""
    rows = []
    for batch in sorted({float(b) for budget in budgets for b in budget.runs.batch_tokens}):
        cells = [budget.penalty_at(batch) for budget in budgets]
        if any(math.isfinite(value) for value, *_ in cells):
            said = (
                "–" if math.isnan(value) else f"{1e3 * value:.0f}±{1e3 * (high - value):.0f}"
                for value, _, high in cells
            )
            rows.append([short(batch), *said])
    return Grid(["batch", *(short(budget.tokens) for budget in budgets)], rows, bordered=False)


def _loss(value: float) -> str:
    return "–" if math.isnan(value) else f"{value:.4f}"


def _largest(batch: float, of: float) -> str:
    """The largest batch within a penalty; above all that were tried if even they are within."""
    if math.isnan(batch):
        return "–"
    return short(batch) if batch < math.inf else f"> {short(of)}"
