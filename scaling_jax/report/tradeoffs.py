"""Figures 4 and 5: the trade-off fit at each loss, and what it leaves over."""

import numpy as np

from scaling_jax.report.chart import COLOURS, Chart, batch_axis, count_axis, loss_bar, new_figure, plain
from scaling_jax.report.words import short as tokens
from scaling_jax.results import Analysis


def tradeoffs_chart(analysis: Analysis, models: list[str]) -> Chart:
    """A panel a model; x = batch size, y = steps to a loss, both log; a line is S_min·(1 + B_crit/B)."""
    figure, axes = new_figure(len(models))
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
            measured = zip(fit.batch_tokens, fit.steps, fit.steps_at(fit.batch_tokens), strict=True)
            texts = [f"{place} {b:,.0f} tokens\n{s:,.0f} steps, fitted {f:,.0f}" for b, s, f in measured]
            chart.mark(axis, fit.batch_tokens, fit.steps, texts)
            bounds = zip(fit.bound_batch_tokens, fit.bound_steps, strict=True)
            texts = [f"{place} {b:,.0f} tokens\nmore than {s:,.0f} steps: it ended above" for b, s in bounds]
            chart.mark(axis, fit.bound_batch_tokens, fit.bound_steps, texts)
            if point.in_law:
                batch = np.geomspace(min(fit.batch_tokens), max(fit.batch_tokens), 40)
                axis.plot(batch, fit.steps_at(batch), color=colour, lw=0.9)
                axis.plot([fit.b_crit], [2 * fit.s_min], "x", color="0.2", ms=4.5, mew=0.9, zorder=3)
                text = f"{model}, loss {point.loss:.3f}\nB_crit {tokens(fit.b_crit)} tokens: twice the fewest steps"
                chart.mark(axis, [fit.b_crit], [2 * fit.s_min], [text])
        batch_axis(axis)
        axis.set_title(plain(model), loc="left")
    axes[0].plot([], [], "x", color="0.2", ms=4.5, mew=0.9, label="$B_{crit}$")
    if any(p.bounds for p in analysis.fit.points if p.model in models):
        axes[0].plot([], [], "^", color="none", mec="0.4", ms=4.5, label="not reached: at least")
    axes[0].legend(loc="upper right", fontsize=8.5)
    count_axis(axes[0].yaxis)
    axes[0].set_ylabel("optimizer steps to a loss")
    return chart


def residuals_chart(analysis: Analysis, models: list[str]) -> Chart:
    """A panel a model; x = batch size in tokens, y = steps measured over steps fitted, coloured by loss."""
    figure, axes = new_figure(len(models), height=3.6)
    chart = Chart(
        "residuals",
        "Steps measured over steps fitted, by batch size: a trend would be a misfit, not noise.",
        figure,
    )
    norm = loss_bar(figure, axes, [p.loss for p in analysis.fit.points])
    for axis, model in zip(axes, models, strict=False):
        for point in (p for p in analysis.fit.points if p.model == model):
            order = np.argsort(point.tradeoff.batch_tokens)
            batch, percent = point.tradeoff.batch_tokens[order], 100 * np.expm1(point.tradeoff.residuals[order])
            axis.plot(batch, percent, "o-", ms=3, lw=0.6, color=COLOURS(norm(point.loss)), alpha=0.8)
            place = f"{model}, loss {point.loss:.3f}, batch of"
            texts = [f"{place} {b:,.0f} tokens\n{p:+.1f} %" for b, p in zip(batch, percent, strict=True)]
            chart.mark(axis, batch, percent, texts)
        axis.axhline(0, color="0.4", lw=0.8)
        batch_axis(axis)
        axis.set_title(plain(model), loc="left")
    axes[0].set_ylabel("steps measured / fitted − 1, %")
    return chart
