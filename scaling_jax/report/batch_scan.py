"""Figure 2: the batch size scan, tokens against steps along every run, coloured by loss."""

import numpy as np
from matplotlib.axes import Axes

from scaling_jax.analysis import Analysis
from scaling_jax.analysis.numbers import short as tokens
from scaling_jax.fitting import Tradeoff
from scaling_jax.report.chart import Chart
from scaling_jax.report.runs import GroupRuns
from scaling_jax.report.style import COLOURS, count_axis, loss_bar, new_figure, plain


def batch_scan_chart(analysis: Analysis, runs: list[GroupRuns], models: list[str]) -> Chart:
    """A panel a model, x = steps, y = tokens, both log.

    Constant-loss fits are (S/S_min − 1)(E/E_min − 1) = 1 (McCandlish et al. 2018, eq. 2.11).
    """
    subjects = [s for s in analysis.experiment.subjects if s.model.name in models]
    figure, axes = new_figure(len(subjects), height=4.6)
    chart = Chart(
        "batch_size_scan",
        "Tokens processed against optimizer steps along the best run of every batch size, coloured by test loss.",
        figure,
    )
    norm = loss_bar(figure, axes, [loss for s in analysis.experiment.subjects for loss in s.target_losses])
    for axis, subject in zip(axes, subjects, strict=True):
        for run in (r for r in runs if r.group.subject == subject):
            shown = run.losses <= max(subject.target_losses) * 1.1
            steps, losses = run.steps[shown], run.losses[shown]
            processed = steps * run.batch_tokens
            axis.plot(steps, processed, "--", color="0.8", lw=0.8, zorder=1)
            axis.scatter(steps, processed, c=losses, cmap=COLOURS, norm=norm, s=11, zorder=2, linewidths=0)
            texts = [
                f"{subject.model.name}, batch of {run.batch_tokens:,} tokens\n"
                f"step {step:,.0f}, {tokens(e)} tokens: loss {loss:.3f}"
                for step, e, loss in zip(steps, processed, losses, strict=True)
            ]
            chart.mark(axis, steps, processed, texts)
        for point in (p for p in analysis.fit.points if p.model == subject.model.name and p.in_law):
            _draw_tradeoff(axis, point.tradeoff, COLOURS(norm(point.loss)))
        count_axis(axis.xaxis)
        axis.set_xlabel("optimizer steps")
        axis.set_title(plain(f"{subject.model.name}, {subject.model.num_params:,} parameters"), loc="left")
    count_axis(axes[0].yaxis)
    axes[0].set_ylabel("tokens processed")
    axes[0].plot([], [], "--o", color="0.8", mfc="0.4", mec="none", ms=3.5, label="a run, one batch size")
    axes[0].plot([], [], color="0.3", lw=1, label="fit at constant loss")
    axes[0].legend(loc="upper left", fontsize=8.5)
    return chart


def _draw_tradeoff(axis: Axes, fit: Tradeoff, colour) -> None:
    batch = np.geomspace(min(fit.batch_tokens) / 1.5, max(fit.batch_tokens) * 1.5, 40)
    steps = fit.steps_at(batch)
    axis.plot(steps, steps * batch, color=colour, lw=1, zorder=3)
