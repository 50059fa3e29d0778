"""Charts of the critical batch size against loss: with the law and noise scales, and with branches beside them.

The first is like Kaplan et al. 2020, figure 10.
"""

import math

import numpy as np
from matplotlib.axes import Axes

from scaling_jax.fitting import CriticalBatch
from scaling_jax.report.chart import (
    LAW_COLOUR,
    MODEL_COLOURS,
    NOISE_COLOUR,
    Chart,
    Into,
    count_axis,
    legend_below,
    loss_axis,
    new_figure,
    plain,
    say_if_empty,
)
from scaling_jax.report.words import short as tokens
from scaling_jax.results import Analysis
from scaling_jax.results.branches import BranchMeasurement


def critical_batch_chart(analysis: Analysis, into: Into = None) -> Chart:
    """B_crit of all models, the law and the noise scales. Log-log; x = test loss, falling to the right; y = tokens."""
    figure, (axis,) = new_figure(width=6.4, height=4.8, into=into)
    chart = Chart(
        "critical_batch_size",
        "Critical batch size against test loss for each model, with the fitted law and all measured noise scales.",
        figure,
    )
    fitted = [p for p in analysis.fit.points if p.shown]
    low, high = loss_axis(axis, [p.loss for p in fitted] or [p.loss for p in analysis.fit.points])
    noise = [n for n in analysis.noise if low <= n.loss <= high]

    draw_noise(chart, axis, noise)
    draw_law(chart, axis, analysis, low, high)
    for k, model in enumerate(dict.fromkeys(p.model for p in fitted)):
        points = [p for p in fitted if p.model == model]
        label = f"{model}, N = {_num_params(analysis, model)}"
        draw_critical_batches(chart, axis, points, MODEL_COLOURS[k % len(MODEL_COLOURS)], label)

    values = [p.b_crit for p in fitted] + [n.b_simple for n in noise if n.resolved and n.b_simple > 0]
    say_if_empty(axis, bool(values), "no critical batch size was measured")
    if values:
        axis.set_ylim(np.percentile(values, 1) / 6, np.percentile(values, 99) * 3)
    count_axis(axis.yaxis)
    axis.set_ylabel("critical batch size, tokens")
    axis.set_title("Critical batch size vs. performance", loc="left")
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="lower right", fontsize=8.5)
    return chart


def three_measurements_chart(analysis: Analysis, models: list[str], into: Into = None) -> Chart:
    """The local B_crit of the scan, noise scales, B_crit of branches; and the scan's B_crit from the start, pale.

    A panel per model; x = test loss, falling; y = tokens.
    """
    figure, axes = new_figure(len(models), height=4.8, into=into)
    chart = Chart(
        "three_measurements",
        "Noise scale, local critical batch size of the scan, and that of branches of one run, against test loss.",
        figure,
    )
    for axis, model in zip(axes, models, strict=False):
        points = [p for p in analysis.fit.points if p.model == model and p.shown]
        local = [p for p in _local_points(analysis) if p.model == model]
        own = [b for b in analysis.branches if b.model == model]
        low, high = loss_axis(axis, [p.loss for p in points + local] + [b.loss for b in own])
        draw_noise(
            chart, axis, [n for n in analysis.noise if n.model == model and low <= n.loss <= high], intervals=True
        )
        axis.plot(
            [p.loss for p in points],
            [p.b_crit for p in points],
            "-",
            color=LAW_COLOUR,
            lw=1.2,
            label="$B_{crit}$ from the start to this loss",
        )
        draw_critical_batches(chart, axis, local, MODEL_COLOURS[0], "local $B_{crit}$, from the scan")
        _draw_branches(chart, axis, own)
        say_if_empty(axis, bool(points or local or own or [n for n in analysis.noise if n.model == model]))
        axis.set_title(plain(model), loc="left")
    fitted = [p.b_crit for p in (*analysis.fit.points, *_local_points(analysis)) if p.shown and p.model in models]
    noise = [n.b_simple for n in analysis.noise if n.resolved and n.b_simple > 0 and n.model in models]
    values = fitted + noise + [b.b_crit for b in analysis.branches if b.model in models and np.isfinite(b.b_crit)]
    if values:
        axes[0].set_ylim(np.percentile(values, 1) / 4, np.percentile(values, 99) * 3)
    count_axis(axes[0].yaxis)
    axes[0].set_ylabel("tokens per batch")
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    legend_below(figure, axes, list(entries.values()), list(entries), min(2, len(models)))
    return chart


def _local_points(analysis: Analysis) -> list[CriticalBatch]:
    local = analysis.fit.local
    return [] if local is None else [point for point in local.points if point.shown]


def draw_critical_batches(chart: Chart, axis: Axes, points: list[CriticalBatch], colour, label: str, marker="o"):
    """Draws the B_crit of a scan at each loss, with intervals."""
    loss = [p.loss for p in points]
    b_crit = np.array([p.b_crit for p in points])
    intervals = np.array([p.b_crit_interval for p in points])
    axis.errorbar(loss, b_crit, whiskers(b_crit, intervals), color=colour, elinewidth=0.8, alpha=0.55, fmt="none")
    axis.plot(loss, b_crit, f"{marker}-", color=colour, ms=5, label=label)
    chart.mark(
        axis,
        loss,
        b_crit,
        [f"{p.model}, loss {p.loss:.3f}\nB_crit {_with_interval(p)} tokens" for p in points],
        intervals,
    )


def draw_law(chart: Chart, axis: Axes, analysis: Analysis, low: float, high: float) -> None:
    """Draws the law with its band between two losses; nothing without a law."""
    law = analysis.fit.law
    if law is None:
        return
    x = np.geomspace(low, high, 60)
    below, above = analysis.fit.band(x)
    axis.fill_between(x, below, above, color=LAW_COLOUR, alpha=0.12, linewidth=0)
    formula = f"$B_{{crit}}$ = {_power_of_ten(law.b_star)} tokens · $L^{{{law.exponent:.1f}}}$"
    span = "[{:.1f}, {:.1f}]".format(*law.exponent_interval)
    shape = "" if law.shapes is None else "\nno hyperbolas: shape {:.2f} to {:.2f}".format(*law.shapes)
    axis.plot(x, law(x), "--", color=LAW_COLOUR, label=f"{formula}\n95 % interval of the exponent {span}{shape}")
    texts = [
        f"the law at loss {loss:.3f}\n{tokens(value)} [{tokens(a)}, {tokens(b)}] tokens"
        for loss, value, a, b in zip(x, law(x), below, above, strict=True)
    ]
    chart.mark(axis, x[::4], law(x)[::4], texts[::4], np.stack([below, above], 1)[::4])


def draw_noise(chart: Chart, axis: Axes, noise: list, *, intervals: bool = False) -> None:
    """Draws noise scales, if there are any. If unresolved, draws an open triangle at the lower bound."""
    if not noise:
        return
    resolved, bounds = [n for n in noise if n.resolved], [n for n in noise if not n.resolved and n.low > 0]
    loss, value = [n.loss for n in resolved], np.array([n.b_simple for n in resolved])
    if intervals:
        ends = np.array([(n.low, n.high) for n in resolved]).reshape(-1, 2)
        axis.errorbar(loss, value, whiskers(value, ends), color=NOISE_COLOUR, elinewidth=0.7, alpha=0.3, fmt="none")
    label = "noise scale tr(Σ)/|G|², measured in the training step"
    axis.plot(loss, value, "o", color=NOISE_COLOUR, ms=3.5, alpha=0.6, mec="none", label=label)
    texts = [
        _noise_text(n) + f"\nnoise scale {tokens(n.b_simple)} [{tokens(n.low)}, {tokens(n.high)}]" for n in resolved
    ]
    chart.mark(axis, loss, value, texts, [(n.low, n.high) for n in resolved])
    if bounds:
        loss, value = [n.loss for n in bounds], np.array([n.low for n in bounds])
        label = "noise scale unresolved: at least"
        axis.plot(loss, value, "^", color="none", ms=4, alpha=0.6, mec=NOISE_COLOUR, label=label)
        texts = [_noise_text(n) + f"\nnoise scale unresolved: at least {tokens(n.low)}" for n in bounds]
        chart.mark(axis, loss, value, texts)


def whiskers(values: np.ndarray, intervals: np.ndarray) -> np.ndarray:
    """Lengths of whiskers below and above the values, [2, values]; an infinite end is far outside the axes."""
    return np.abs(np.nan_to_num(intervals, posinf=1e15).T.reshape(2, -1) - values)


def _with_interval(point: CriticalBatch) -> str:
    low, high = point.b_crit_interval
    return f"{tokens(point.b_crit)} [{tokens(low)}, {tokens(high)}]"


def _noise_text(n) -> str:
    return f"{n.model}, batch of {n.batch_tokens:,} tokens, loss {n.loss:.3f}"


def _num_params(analysis: Analysis, model: str) -> str:
    n = next(s.model.num_params for s in analysis.experiment.subjects if s.model.name == model)
    return f"{n / 1e6:.3g}M" if n >= 1e6 else f"{n / 1e3:.3g}k"


def _power_of_ten(value: float) -> str:
    exponent = math.floor(math.log10(value))
    return f"{value / 10**exponent:.1f}·$10^{{{exponent}}}$"


def _draw_branches(chart: Chart, axis: Axes, branches: list[BranchMeasurement]) -> None:
    found = [b for b in branches if np.isfinite(b.b_crit)]
    bounds = [b for b in branches if not np.isfinite(b.b_crit) and np.isfinite(b.low)]
    loss, b_crit, colour = [b.loss for b in found], np.array([b.b_crit for b in found]), MODEL_COLOURS[1]
    if found:
        ends = whiskers(b_crit, np.array([(b.low, b.high) for b in found]))
        axis.errorbar(loss, b_crit, ends, color=colour, elinewidth=0.8, fmt="none")
        axis.plot(loss, b_crit, "s", color=colour, ms=5, label="$B_{crit}$, from branches of one run")
        chart.mark(
            axis,
            loss,
            b_crit,
            [_branch_text(b, f"{tokens(b.b_crit)} [{tokens(b.low)}, {tokens(b.high)}]") for b in found],
            [(b.low, b.high) for b in found],
        )
    if bounds:
        loss, low = [b.loss for b in bounds], [b.low for b in bounds]
        axis.plot(loss, low, "^", color="none", mec=colour, ms=5, label="$B_{crit}$ from branches, at least")
        chart.mark(axis, loss, low, [_branch_text(b, f"at least {tokens(b.low)}") for b in bounds])


def _branch_text(branch: BranchMeasurement, b_crit: str) -> str:
    return (
        f"{branch.model}, branches of a run of {branch.batch_tokens:,} tokens, loss {branch.loss:.3f}\n"
        f"B_crit {b_crit} tokens"
    )
