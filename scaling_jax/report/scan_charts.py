"""Charts of a scan: its runs and fits, what each batch size costs, and the learning-rate search."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from scaling_jax.fitting import Tradeoff
from scaling_jax.report.chart import (
    COLOURS,
    LAW_COLOUR,
    MODEL_COLOURS,
    Chart,
    Into,
    batch_axis,
    batch_bar,
    count_axis,
    legend_below,
    loss_bar,
    new_figure,
    plain,
    say_if_empty,
)
from scaling_jax.report.words import ending
from scaling_jax.report.words import short as tokens
from scaling_jax.results import Analysis, CellRuns
from scaling_jax.results.runs import few_enough

_FLAG = MODEL_COLOURS[1]
_MARKERS = "os^Dv"


_RUN_LABEL = "a run; number: batch size, tokens"


class Best(NamedTuple):
    """The learning rate with the fewest steps to a target loss."""

    learning_rate: float
    steps: float
    at_edge: bool  # True if it is the smallest or largest rate tried, so a better one may lie beyond


def best_rate(cell: CellRuns, target: int) -> Best | None:
    """The best learning rate for target loss number `target`; None if no run reached the target."""
    reached = [t for t in cell.tried if math.isfinite(t.steps_to_target[target])]
    if not reached:
        return None
    best = min(reached, key=lambda t: t.steps_to_target[target])
    at_edge = best is cell.tried[0] or best is cell.tried[-1]
    return Best(best.run.learning_rate, float(best.steps_to_target[target]), at_edge)


def batch_scan_chart(analysis: Analysis, models: list[str], into: Into = None) -> Chart:
    """The best run of every batch size, coloured by loss. A panel per model; log-log; x = steps; y = tokens.

    The lines of constant loss are the fits (S/S_min − 1)(E/E_min − 1) = 1 (McCandlish et al. 2018, eq. 2.11).
    """
    subjects = [s for s in analysis.experiment.subjects if s.model.name in models]
    figure, axes = new_figure(len(subjects), height=4.6, into=into)
    chart = Chart(
        "batch_size_scan",
        "Tokens processed against optimizer steps along the best run of every batch size, coloured by test loss.",
        figure,
    )
    norm = loss_bar(figure, axes, [loss for s in analysis.experiment.subjects for loss in s.target_losses])
    for axis, subject in zip(axes, subjects, strict=True):
        for run in (r for r in few_enough(analysis.results.cells) if r.subject == subject):
            shown = run.best.losses <= max(subject.target_losses) * 1.1
            steps, losses = run.best.steps[shown], run.best.losses[shown]
            processed = steps * run.batch_tokens
            axis.plot(steps, processed, "--", color="0.8", lw=0.8, zorder=1)
            axis.scatter(steps, processed, c=losses, cmap=COLOURS, norm=norm, s=11, zorder=2, linewidths=0)
            texts = [
                f"{subject.model.name}, batch of {run.batch_tokens:,} tokens\n"
                f"step {step:,.0f}, {tokens(e)} tokens: loss {loss:.3f}"
                for step, e, loss in zip(steps, processed, losses, strict=True)
            ]
            chart.mark(axis, steps, processed, texts)
            if len(steps):
                axis.annotate(
                    f"{run.batch_tokens:,}",
                    (steps[0], processed[0]),
                    xytext=(-4, -1),
                    textcoords="offset points",
                    ha="right",
                    va="top",
                    fontsize=8,
                    color="0.3",
                )
        axis.margins(x=0.12)  # room for the batch sizes
        for point in (p for p in analysis.fit.points if p.model == subject.model.name and p.shown):
            _draw_tradeoff(axis, point.tradeoff, COLOURS(norm(point.loss)))
        count_axis(axis.xaxis)
        axis.set_xlabel("optimizer steps")
        axis.set_title(plain(f"{subject.model.name}, {subject.model.num_params:,} parameters"), loc="left")
    count_axis(axes[0].yaxis)
    axes[0].set_ylabel("tokens processed")
    handles = [
        Line2D([], [], ls="--", marker="o", color="0.8", mfc="0.4", mec="none", ms=3.5, label=_RUN_LABEL),
        Line2D([], [], color="0.3", lw=1, label="fit at constant loss"),
    ]
    legend_below(figure, axes, handles, [str(handle.get_label()) for handle in handles], 2)
    return chart


def rate_search_chart(runs: Sequence[CellRuns], models: list[str], into: Into = None) -> Chart:
    """The learning-rate search. A panel per model; log-log; x = learning rate; y = steps to its middle target loss.

    Not the lowest target loss: runs end earlier when their rate can no longer be the best.
    """
    figure, axes = new_figure(len(models), into=into)
    chart = Chart(
        "learning_rate_search",
        "Optimizer steps to a loss against learning rate, one line per batch size, with the best rate marked.",
        figure,
    )
    norm = batch_bar(figure, axes, [r.batch_tokens for r in runs])
    for axis, model in zip(axes, models, strict=False):
        cells = [r for r in runs if r.model == model]
        targets = cells[0].subject.target_losses
        target = len(targets) // 2
        for cell in cells:
            _draw_cell(chart, axis, cell, target, COLOURS(norm(cell.batch_tokens)))
        count_axis(axis.xaxis)
        axis.set_xlabel("learning rate")
        axis.set_title(plain(f"{model}, to a loss of {targets[target]:.3g} nats per token"), loc="left", fontsize=10)
    count_axis(axes[0].yaxis)
    axes[0].set_ylabel("optimizer steps to the loss")
    handles = [
        Line2D([], [], ls="none", marker="o", color="0.4", ms=9, mfc="none", label="best of the rates tried"),
        Line2D([], [], ls="none", marker="s", color=_FLAG, ms=10, mfc="none", label="best, but at an edge: not tuned"),
        Line2D([], [], ls="none", marker="^", color="0.4", ms=5, mfc="none", label="ended before it reached the loss"),
    ]
    legend_below(figure, axes, handles, [str(handle.get_label()) for handle in handles], 2)
    return chart


def pareto_chart(analysis: Analysis, into: Into = None) -> Chart:
    """What batch sizes cost, for all models and losses. Log-log; x = steps/S_min (time); y = tokens/E_min (compute)."""
    figure, (axis,) = new_figure(width=6.0, height=4.8, into=into)
    chart = Chart(
        "time_and_compute",
        "Steps divided by the minimum against tokens divided by the minimum, for every run and loss.",
        figure,
    )
    points = [p for p in analysis.fit.points if p.shown]
    norm = loss_bar(figure, [axis], [p.loss for p in points])
    ratio = np.geomspace(1 / 64, 64, 120)  # of B to B_crit
    axis.plot(1 + 1 / ratio, 1 + ratio, color=LAW_COLOUR, lw=1.2, label="$(S/S_{min} - 1)(E/E_{min} - 1) = 1$")
    for k, model in enumerate(dict.fromkeys(p.model for p in points)):
        marker = _MARKERS[k % len(_MARKERS)]
        axis.plot([], [], marker, color="0.4", ms=4, label=plain(f"{model}: steps and tokens to a loss"))
        for point in (p for p in points if p.model == model):
            fit = point.tradeoff
            steps, tokens = fit.steps / fit.s_min, fit.steps * fit.batch_tokens / fit.e_min
            axis.plot(steps, tokens, marker, color=COLOURS(norm(point.loss)), ms=3.5, alpha=0.7, mec="none")
            texts = [
                f"{model}, loss {point.loss:.3f}, batch of {b:,.0f} tokens\n"
                f"{s:.2f} × minimum steps, {e:.2f} × minimum tokens"
                for b, s, e in zip(fit.batch_tokens, steps, tokens, strict=True)
            ]
            chart.mark(axis, steps, tokens, texts)
    multiples = (8, 4, 2, 1, 1 / 2, 1 / 4, 1 / 8)
    for multiple, right, up in zip(multiples, np.linspace(42, 28, 7), np.linspace(10, 29, 7), strict=True):
        name = f"{multiple:g}" if multiple >= 1 else f"1/{1 / multiple:g}"
        at = (1 + 1 / multiple, 1 + multiple)
        axis.plot(*at, "+", color=MODEL_COLOURS[1], ms=9)
        label = "$B_{crit}$" if multiple == 1 else f"{name} $B_{{crit}}$"
        axis.annotate(
            label,
            at,
            xytext=(right, up),  # beyond the points around the curve, and apart from each other
            textcoords="offset points",
            fontsize=8,
            ha="left" if multiple >= 1 else "center",
            va="bottom" if multiple <= 1 else "center",
            arrowprops={"arrowstyle": "-", "color": "0.6", "lw": 0.6, "shrinkA": 1, "shrinkB": 5},
        )
        text = f"{name} × B_crit\n{at[0]:.3g} × minimum steps, {at[1]:.3g} × minimum tokens"
        chart.mark(axis, at[:1], at[1:], [text])
    axis.set_xlim(0.75, 80)
    axis.set_ylim(0.75, 80)
    count_axis(axis.xaxis)
    count_axis(axis.yaxis)
    axis.set_xlabel("time: steps / minimum steps")
    axis.set_ylabel("compute: tokens / minimum tokens")
    axis.set_title("Cost of a batch size", loc="left")
    axis.legend(loc="upper right", fontsize=8.5)
    return chart


def tradeoffs_chart(analysis: Analysis, models: list[str], into: Into = None) -> Chart:
    """The fitted trade-offs S_min·(1 + B_crit/B). A panel per model; log-log; x = batch size; y = steps to a loss."""
    figure, axes = new_figure(len(models), into=into)
    chart = Chart(
        "tradeoff_fits",
        "Optimizer steps to each loss against batch size, with the fitted trade-off and its critical batch size.",
        figure,
    )
    norm = loss_bar(figure, axes, [p.loss for p in analysis.fit.points])
    for axis, model in zip(axes, models, strict=False):
        for point in (p for p in analysis.fit.points if p.model == model):
            fit, colour = point.tradeoff, COLOURS(norm(point.loss))
            axis.plot(fit.batch_tokens, fit.steps, "o", color=colour, ms=3.5, mec="none")
            axis.plot(fit.bound_batch_tokens, fit.bound_steps, "^", color="none", ms=4.5, mec=colour)
            place = f"{model}, loss {point.loss:.3f}, batch of"
            measured = zip(fit.batch_tokens, fit.steps, point.steps_at(fit.batch_tokens), strict=True)
            texts = [f"{place} {b:,.0f} tokens\n{s:,.0f} steps, fitted {f:,.0f}" for b, s, f in measured]
            chart.mark(axis, fit.batch_tokens, fit.steps, texts)
            bounds = zip(fit.bound_batch_tokens, fit.bound_steps, strict=True)
            texts = [f"{place} {b:,.0f} tokens\nmore than {s:,.0f} steps: not reached" for b, s in bounds]
            chart.mark(axis, fit.bound_batch_tokens, fit.bound_steps, texts)
            if point.shown:
                batch = np.geomspace(min(fit.batch_tokens), max(fit.batch_tokens), 40)
                axis.plot(batch, point.steps_at(batch), color=colour, lw=0.9)
                axis.plot([point.b_crit], [2 * point.s_min], "x", color="0.2", ms=4.5, mew=0.9, zorder=3)
                text = f"{model}, loss {point.loss:.3f}\nB_crit {tokens(point.b_crit)} tokens: twice the minimum steps"
                chart.mark(axis, [point.b_crit], [2 * point.s_min], [text])
        say_if_empty(axis, any(p.model == model for p in analysis.fit.points))
        batch_axis(axis)
        axis.set_title(plain(model), loc="left")
    axes[0].plot([], [], "x", color="0.2", ms=4.5, mew=0.9, label="$B_{crit}$")
    if any(p.bounds for p in analysis.fit.points if p.model in models):
        axes[0].plot([], [], "^", color="none", mec="0.4", ms=4.5, label="not reached: at least")
    axes[0].legend(loc="upper right", fontsize=8.5)
    count_axis(axes[0].yaxis)
    axes[0].set_ylabel("optimizer steps to a loss")
    return chart


def residuals_chart(analysis: Analysis, models: list[str], into: Into = None) -> Chart:
    """Residuals of the trade-offs. A panel per model; x = batch size; y = steps measured/fitted; colour = loss."""
    figure, axes = new_figure(len(models), height=3.6, into=into)
    chart = Chart(
        "residuals",
        "Measured steps divided by fitted steps, against batch size. A trend would show a misfit.",
        figure,
    )
    norm = loss_bar(figure, axes, [p.loss for p in analysis.fit.points])
    for axis, model in zip(axes, models, strict=False):
        for point in (p for p in analysis.fit.points if p.model == model):
            order = np.argsort(point.tradeoff.batch_tokens)
            batch, percent = point.tradeoff.batch_tokens[order], 100 * np.expm1(point.residuals[order])
            axis.plot(batch, percent, "o-", ms=3, lw=0.6, color=COLOURS(norm(point.loss)), alpha=0.8)
            place = f"{model}, loss {point.loss:.3f}, batch of"
            texts = [f"{place} {b:,.0f} tokens\n{p:+.1f} %" for b, p in zip(batch, percent, strict=True)]
            chart.mark(axis, batch, percent, texts)
        say_if_empty(axis, any(p.model == model for p in analysis.fit.points))
        axis.axhline(0, color="0.4", lw=0.8)
        batch_axis(axis)
        axis.set_title(plain(model), loc="left")
    axes[0].set_ylabel("steps measured / fitted − 1, %")
    return chart


def _draw_tradeoff(axis: Axes, fit: Tradeoff, colour) -> None:
    batch = np.geomspace(min(fit.batch_tokens) / 1.5, max(fit.batch_tokens) * 1.5, 40)
    steps = fit.steps_at(batch)
    axis.plot(steps, steps * batch, color=colour, lw=1, zorder=3)


def _draw_cell(chart: Chart, axis: Axes, cell: CellRuns, target: int, colour) -> None:
    loss = cell.subject.target_losses[target]
    line: tuple[list, list] = ([], [])
    for tried in cell.tried:
        rate, steps = tried.run.learning_rate, tried.steps_to_target[target]
        outcome = f"{steps:,.0f} steps"
        if math.isfinite(steps):
            line[0].append(rate)
            line[1].append(steps)
        else:
            steps = tried.result.steps
            outcome = f"not reached in {steps:,} steps ({ending(tried.run, tried.result)})"
            axis.plot([rate], [steps], "^", color=colour, mfc="none", ms=5)
        text = f"{cell.name}, learning rate {rate:g}\nto loss {loss:.3g}: {outcome}"
        chart.mark(axis, [rate], [steps], [text])
    axis.plot(*line, "o-", color=colour, ms=4, lw=0.8)
    best = best_rate(cell, target)
    if best is not None:
        ring = {"marker": "s", "color": _FLAG, "ms": 10} if best.at_edge else {"marker": "o", "color": "0.4", "ms": 9}
        axis.plot([best.learning_rate], [best.steps], mfc="none", mew=1.2, ls="none", **ring)  # type: ignore[arg-type]
