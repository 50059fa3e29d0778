"""Figure 3: noise scale, a scan's B_crit and the B_crit of branches, at the same losses."""

import numpy as np
from matplotlib.axes import Axes

from scaling_jax.analysis import Analysis
from scaling_jax.analysis.branches import BranchMeasurement
from scaling_jax.analysis.numbers import short as tokens
from scaling_jax.report.chart import Chart
from scaling_jax.report.critical_batch import draw_critical_batches, draw_law, draw_noise, reach
from scaling_jax.report.style import MODEL_COLOURS, count_axis, loss_axis, new_figure, plain


def three_measurements_chart(analysis: Analysis, models: list[str]) -> Chart:
    """A panel a model; x = test loss falling to the right, y = tokens, all with intervals."""
    figure, axes = new_figure(len(models), height=4.8)
    chart = Chart(
        "three_measurements",
        "Noise scale, critical batch size from the scan and from branches of one run, against test loss.",
        figure,
    )
    for axis, model in zip(axes, models, strict=False):
        points = [p for p in analysis.fit.points if p.model == model and p.in_law]
        own = [b for b in analysis.branches if b.model == model]
        low, high = loss_axis(axis, [p.loss for p in points] + [b.loss for b in own])
        draw_noise(
            chart, axis, [n for n in analysis.noise if n.model == model and low <= n.loss <= high], intervals=True
        )
        draw_law(chart, axis, analysis, low, high)
        draw_critical_batches(chart, axis, points, MODEL_COLOURS[0], "$B_{crit}$, from the scan")
        _draw_branches(chart, axis, own)
        axis.set_title(plain(model), loc="left")
    fitted = [p.tradeoff.b_crit for p in analysis.fit.points if p.in_law and p.model in models]
    noise = [n.b_simple for n in analysis.noise if n.resolved and n.model in models]
    values = fitted + noise + [b.b_crit for b in analysis.branches if b.model in models and np.isfinite(b.b_crit)]
    if values:
        axes[0].set_ylim(np.percentile(values, 1) / 4, np.percentile(values, 99) * 3)
    count_axis(axes[0].yaxis)
    axes[0].set_ylabel("tokens per batch")
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(
        list(entries.values()), list(entries), loc="outside lower center", fontsize=8.5, ncols=min(2, len(models))
    )
    return chart


def _draw_branches(chart: Chart, axis: Axes, branches: list[BranchMeasurement]) -> None:
    found = [b for b in branches if np.isfinite(b.b_crit)]
    bounds = [b for b in branches if not np.isfinite(b.b_crit) and np.isfinite(b.low)]
    loss, b_crit, colour = [b.loss for b in found], np.array([b.b_crit for b in found]), MODEL_COLOURS[1]
    if found:
        whiskers = reach(b_crit, np.array([(b.low, b.high) for b in found]))
        axis.errorbar(loss, b_crit, whiskers, color=colour, elinewidth=0.8, fmt="none")
        axis.plot(loss, b_crit, "s", color=colour, ms=5, label="$B_{crit}$, from branches of one run")
        chart.mark(
            axis, loss, b_crit, [_text(b, f"{tokens(b.b_crit)} [{tokens(b.low)}, {tokens(b.high)}]") for b in found]
        )
    if bounds:
        loss, low = [b.loss for b in bounds], [b.low for b in bounds]
        axis.plot(loss, low, "^", color="none", mec=colour, ms=5, label="$B_{crit}$ from branches, at least")
        chart.mark(axis, loss, low, [_text(b, f"at least {tokens(b.low)}") for b in bounds])


def _text(branch: BranchMeasurement, b_crit: str) -> str:
    return (
        f"{branch.model}, branches of a run of {branch.batch_tokens:,} tokens, loss {branch.loss:.3f}\n"
        f"B_crit {b_crit} tokens"
    )
