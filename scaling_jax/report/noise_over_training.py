"""Figure 8: the noise scale as each batch size's best run went on."""

import numpy as np

from scaling_jax.analysis.numbers import short as tokens
from scaling_jax.report.chart import Chart
from scaling_jax.report.critical_batch import reach
from scaling_jax.report.runs import GroupRuns, NoiseWindow
from scaling_jax.report.style import COLOURS, batch_bar, count_axis, new_figure, plain


def noise_chart(runs: list[GroupRuns], models: list[str]) -> Chart:
    """A panel a model; x = tokens processed, y = noise scale in tokens with its interval, coloured by batch size."""
    figure, axes = new_figure(len(models))
    chart = Chart(
        "noise_scale_over_training",
        "Noise scale against tokens processed, for the best run of every batch size.",
        figure,
    )
    norm = batch_bar(figure, axes, [r.batch_tokens for r in runs])
    values = []
    for axis, model in zip(axes, models, strict=False):
        for run in (r for r in runs if r.model == model):
            colour = COLOURS(norm(run.batch_tokens))
            resolved = [w for w in run.noise if w.noise.resolved and w.noise.value > 0]
            at, value = [w.tokens for w in resolved], np.array([w.noise.value for w in resolved])
            ends = np.array([(w.noise.low, w.noise.high) for w in resolved]).reshape(-1, 2)
            axis.errorbar(at, value, reach(value, ends), color=colour, elinewidth=0.7, alpha=0.4, fmt="none")
            axis.plot(at, value, "o-", color=colour, ms=3, lw=0.8)
            chart.mark(axis, at, value, [_text(run, w) for w in resolved])
            bounds = [w for w in run.noise if not w.noise.resolved and w.noise.low > 0]
            at, low = [w.tokens for w in bounds], [w.noise.low for w in bounds]
            axis.plot(at, low, "^", color="none", mec=colour, ms=4)
            chart.mark(axis, at, low, [_text(run, w) for w in bounds])
            values += list(value)
        count_axis(axis.xaxis)
        axis.set_xlabel("tokens processed")
        axis.set_title(plain(model), loc="left")
    if values:
        axes[0].set_ylim(np.percentile(values, 2) / 3, np.percentile(values, 98) * 3)
    count_axis(axes[0].yaxis)
    axes[0].set_ylabel("noise scale tr(Σ)/|G|², tokens")
    axes[0].plot([], [], "^", color="none", mec="0.4", ms=4, label="unresolved: at least")
    axes[0].legend(loc="lower right", fontsize=8.5)
    return chart


def _text(run: GroupRuns, window: NoiseWindow) -> str:
    found = window.noise
    said = f"at least {tokens(found.low)}"
    if found.resolved:
        said = f"{tokens(found.value)} [{tokens(found.low)}, {tokens(found.high)}]"
    return f"{run.group.name}\nby {tokens(window.tokens)} tokens: noise scale {said}"
