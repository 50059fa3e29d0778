"""Figure 9: the noise scale of each part of a model, from the embedding to the unembedding, as one run went on."""

import math

import numpy as np

from scaling_jax.analysis import Analysis
from scaling_jax.analysis.numbers import short as tokens
from scaling_jax.report.chart import Chart
from scaling_jax.report.runs import GroupRuns, PartNoise
from scaling_jax.report.style import COLOURS, MODEL_COLOURS, count_axis, new_figure, plain

MOST_NAMED = 6  # layers in the legend; of more only the first and the last
_ENDS = {"embedding": ("s", MODEL_COLOURS[1]), "unembedding": ("D", MODEL_COLOURS[2])}


def run_near_b_crit(analysis: Analysis, runs: list[GroupRuns], model: str) -> GroupRuns | None:
    """Of the runs whose parts were measured the one at the batch size next to the model's median B_crit."""
    b_crit = [p.tradeoff.b_crit for p in analysis.fit.points if p.model == model]
    middle = math.log(np.median(b_crit or [r.batch_tokens for r in runs]))
    measured = [r for r in runs if r.model == model and any(r.noise_by_part.values())]
    return min(measured, key=lambda r: abs(math.log(r.batch_tokens) - middle), default=None)


def noise_by_layer_chart(runs: list[GroupRuns]) -> Chart:
    """A panel a run; x = tokens processed, y = noise scale of each part, tokens, where it is resolved."""
    figure, axes = new_figure(len(runs))
    chart = Chart(
        "noise_scale_by_layer",
        "Noise scale of the embedding, of each layer and of the unembedding against tokens processed.",
        figure,
    )
    values = []
    for axis, run in zip(axes, runs, strict=True):
        num_layers = len(run.noise_by_part) - 2
        for k, (part, windows) in enumerate(run.noise_by_part.items()):
            at, value = [w.tokens for w in windows], [w.value for w in windows]
            marker, colour = _ENDS.get(part, ("o", COLOURS(0.85 * (k - 1) / max(num_layers - 1, 1))))
            named = part in _ENDS or num_layers <= MOST_NAMED or k in (1, num_layers)
            axis.plot(at, value, f"{marker}-", color=colour, ms=4, lw=1.1, label=part if named else None)
            chart.mark(axis, at, value, [_text(run, part, w) for w in windows])
            values += value
        whole = [w for w in run.noise if w.noise.resolved and w.noise.value > 0]
        at, value = [w.tokens for w in whole], [w.noise.value for w in whole]
        axis.plot(at, value, "--", color="0.25", lw=1, label="whole model", zorder=1)
        values += value
        count_axis(axis.xaxis)
        axis.set_xlabel("tokens processed")
        axis.set_title(plain(run.group.name), loc="left")
        axis.legend(fontsize=8.5)
    if values:
        axes[0].set_ylim(min(values) / 1.5, max(values) * 1.5)
    count_axis(axes[0].yaxis)
    axes[0].set_ylabel("noise scale tr(Σ)/|G|², tokens")
    return chart


def _text(run: GroupRuns, part: str, window: PartNoise) -> str:
    said = f"{tokens(window.value)} [{tokens(window.low)}, {tokens(window.high)}]"
    return f"{run.group.name}, {part}\nby {tokens(window.tokens)} tokens: noise scale {said}"
