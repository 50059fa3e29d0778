"""Figure 6: time against compute, what every choice of batch size costs (McCandlish et al. 2018, eq. 2.11)."""

import numpy as np

from scaling_jax.analysis import Analysis
from scaling_jax.report.chart import Chart
from scaling_jax.report.style import COLOURS, LAW_COLOUR, MODEL_COLOURS, count_axis, loss_bar, new_figure, plain

_MARKERS = "os^Dv"


def pareto_chart(analysis: Analysis) -> Chart:
    """Log-log; x = steps over S_min (time), y = tokens over E_min (compute); runs of all models and losses."""
    figure, (axis,) = new_figure(width=6.0, height=4.8)
    chart = Chart(
        "time_and_compute",
        "Steps over the fewest possible against tokens over the fewest possible, for every run and loss.",
        figure,
    )
    points = [p for p in analysis.fit.points if p.in_law]
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
                f"{s:.2f} × fewest steps, {e:.2f} × fewest tokens"
                for b, s, e in zip(fit.batch_tokens, steps, tokens, strict=True)
            ]
            chart.mark(axis, steps, tokens, texts)
    for multiple in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8):
        name = f"{multiple:g}" if multiple >= 1 else f"1/{1 / multiple:g}"
        at = (1 + 1 / multiple, 1 + multiple)
        axis.plot(*at, "+", color=MODEL_COLOURS[1], ms=9)
        label = "B = $B_{crit}$" if multiple == 1 else f"B = {name} $B_{{crit}}$"
        axis.annotate(label, at, xytext=(7, 4), textcoords="offset points", fontsize=7.5)
        text = f"{name} × B_crit\n{at[0]:.3g} × fewest steps, {at[1]:.3g} × fewest tokens"
        chart.mark(axis, at[:1], at[1:], [text])
    axis.set_xlim(0.75, 80)
    axis.set_ylim(0.75, 80)
    count_axis(axis.xaxis)
    count_axis(axis.yaxis)
    axis.set_xlabel("time: steps / fewest steps")
    axis.set_ylabel("compute: tokens / fewest tokens")
    axis.set_title("What a batch size costs", loc="left")
    axis.legend(loc="upper right", fontsize=8.5)
    return chart
