"""Charts of budgets: loss against batch size at each budget, and the best batch against the budget."""

import math

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.ticker import FixedLocator, NullLocator

from scaling_jax.fitting import Budget, BudgetFit
from scaling_jax.report.chart import (
    COLOURS,
    LAW_COLOUR,
    MODEL_COLOURS,
    Chart,
    batch_axis,
    count_axis,
    new_figure,
    plain,
    say_if_empty,
)
from scaling_jax.report.words import short


def budget_charts(fit: BudgetFit) -> list[Chart]:
    """Both charts."""
    return [loss_chart(fit), best_batch_chart(fit)]


def loss_chart(fit: BudgetFit) -> Chart:
    """Loss above the lowest one of its budget, with the curve and B_opt. A panel per model; colour = budget."""
    figure, axes = new_figure(len(fit.models), height=4.8)
    chart = Chart(
        "budget_losses", "Loss above the best of each budget, against batch size, with the best batch.", figure
    )
    tokens = sorted({budget.tokens for budget in fit.budgets})
    norm = LogNorm(tokens[0], tokens[-1] * (1.0 if tokens[1:] else 2.0))
    rise = 0.0
    for axis, model in zip(axes, fit.models, strict=True):
        budgets = [budget for budget in fit.budgets if budget.model == model]
        for budget in budgets:
            rise = max(rise, _draw_losses(chart, axis, budget, COLOURS(norm(budget.tokens))))
        say_if_empty(axis, any(b.curve is not None for b in budgets), "no budget has four batch sizes")
        batch_axis(axis)
        axis.tick_params(axis="x", labelrotation=30)
        axis.set_title(plain(model), loc="left")
    axes[0].set_ylim(-0.06 * (rise or 1.0), 1.06 * (rise or 1.0))
    axes[0].set_ylabel("loss above the best, nats per token")
    if any(budget.kind == "U-shaped" for budget in fit.budgets):
        axes[0].plot([], [], "D", color="0.3", ms=5, label="$B_{opt}$, 95 % interval")
    if any(budget.runs.at_edge.any() for budget in fit.budgets):
        axes[0].plot([], [], "o", color="0.3", mfc="none", ms=4, label="best rate at an edge: too high")
    if axes[0].get_legend_handles_labels()[0]:
        axes[0].legend(loc="upper center", fontsize=8.5)
    bar = figure.colorbar(ScalarMappable(norm, COLOURS), ax=axes, pad=0.02)
    bar.outline.set_visible(False)  # type: ignore[operator]
    bar.set_label("budget D, tokens")
    bar.ax.yaxis.set_major_locator(FixedLocator(tokens))
    bar.ax.yaxis.set_major_formatter(lambda x, _: short(x))
    bar.ax.yaxis.set_minor_locator(NullLocator())
    return chart


def best_batch_chart(fit: BudgetFit) -> Chart:
    """B_opt of each budget with its interval, bounds as arrows, and the law. Log-log; x = budget."""
    figure, (axis,) = new_figure(width=6.4, height=4.8)
    chart = Chart("best_batch", "Best batch size against the budget, with the fitted law.", figure)
    if fit.law is not None:
        low, high = fit.law.valid_range
        at = np.geomspace(low, high, 60)
        below, above = fit.law.band(at)
        axis.fill_between(at, below, above, color=LAW_COLOUR, alpha=0.15, lw=0)
        axis.plot(at, fit.law(at), color=LAW_COLOUR, lw=1.4, label=f"$B_{{opt}} \\propto D^{{{fit.law.exponent:.2f}}}$")
    values = []
    for k, model in enumerate(fit.models):
        colour = MODEL_COLOURS[k % len(MODEL_COLOURS)]
        budgets = [b for b in fit.budgets if b.model == model and b.curve is not None]
        axis.plot([], [], "o", color=colour, label=plain(model))
        for budget in budgets:
            values += _draw_best(chart, axis, budget, colour)
    for kind, marker, said in (("rising", "v", "at most"), ("falling", "^", "at least")):
        if any(budget.kind == kind for budget in fit.budgets):
            axis.plot([], [], marker, color="0.3", mfc="none", ms=7, ls="none", label=f"$B_{{opt}}$ {said}")
    say_if_empty(axis, bool(values), "no budget has a best batch or a bound")
    count_axis(axis.xaxis)
    if values:
        axis.set_ylim(min(values) / 2, max(values) * 2)
    count_axis(axis.yaxis)
    axis.set_xlabel("budget D, tokens")
    axis.set_ylabel("best batch size, tokens")
    axis.legend(loc="upper left", fontsize=8.5)
    return chart


def _draw_losses(chart: Chart, axis: Axes, budget: Budget, colour) -> float:
    """Draws a budget, and returns how far its curve rises."""
    runs = budget.runs
    base = budget.loss if budget.curve is not None else float(runs.loss.min())
    above = runs.loss - base
    for mask, face in ((~runs.at_edge, colour), (runs.at_edge, "none")):
        axis.plot(runs.batch_tokens[mask], above[mask], "o", ms=4, color=colour, mfc=face)
    place = f"{budget.model}, {short(budget.tokens)} tokens, batch of"
    texts = [f"{place} {b:,.0f}\nloss {loss:.4f}" for b, loss in zip(runs.batch_tokens, runs.loss, strict=True)]
    chart.mark(axis, runs.batch_tokens, above, texts)
    if budget.curve is None:
        return float(above.max())
    axis.plot(np.exp(budget.curve.grid), budget.curve.values - base, color=colour, lw=1)
    if budget.kind == "U-shaped":
        low, high = budget.b_opt_interval
        axis.plot([low, high], [0, 0], color=colour, lw=2.5, solid_capstyle="butt", alpha=0.6, zorder=3)
        axis.plot([budget.b_opt], [0], "D", color=colour, ms=5, mec="white", mew=0.6, zorder=4)
    return float((budget.curve.values - base).max())


def _draw_best(chart: Chart, axis: Axes, budget: Budget, colour) -> list[float]:
    """Draws the best batch of a budget or its bound, and returns what the axis must hold."""
    low, high = budget.b_opt_interval
    place = f"{budget.model}, {short(budget.tokens)} tokens"
    if budget.kind == "U-shaped":
        axis.errorbar(
            [budget.tokens], [budget.b_opt], [[budget.b_opt - low], [high - budget.b_opt]], fmt="o", color=colour, ms=5
        )
        text = f"{place}\nB_opt {short(budget.b_opt)} [{short(low)}, {short(high)}] tokens"
        chart.mark(axis, [budget.tokens], [budget.b_opt], [text], [(low, high)])
        return [low, high]
    if budget.kind == "flat":
        return []
    bound, marker = (high, "v") if budget.kind == "rising" else (low, "^")
    axis.plot([budget.tokens], [bound], marker, color=colour, mfc="none", ms=7)
    said = "at most" if budget.kind == "rising" else "at least"
    chart.mark(axis, [budget.tokens], [bound], [f"{place}\nB_opt {said} {short(bound)} tokens"])
    return [bound] if math.isfinite(bound) and bound > 0 else []
