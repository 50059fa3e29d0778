"""Figure 4: time against compute, what every choice of batch size costs (McCandlish et al. 2018, eq. 2.11)."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from scaling_jax.analysis import Analysis
from scaling_jax.report.style import LAW_COLOUR, MODEL_COLOURS, new_figure

_MARKERS = "os^Dv"


def pareto_figure(analysis: Analysis) -> Figure:
    """Log-log; x = steps over S_min (time), y = tokens over E_min (compute); runs of all models and losses."""
    figure, ((axis,),) = new_figure(width=6.4, height=5.0)
    ratio = np.geomspace(1 / 64, 64, 200)  # of B to B_crit
    axis.plot(1 + 1 / ratio, 1 + ratio, color=LAW_COLOUR, lw=1.2, label="$(S/S_{min} - 1)(E/E_{min} - 1) = 1$")
    points = [p for p in analysis.fit.points if p.in_law]
    losses = [p.loss for p in points] or [2.0, 3.0]
    colours, norm = plt.get_cmap("viridis"), Normalize(min(losses), max(losses))
    for k, model in enumerate(dict.fromkeys(p.model for p in points)):
        marker = _MARKERS[k % len(_MARKERS)]
        axis.plot([], [], marker, color="0.4", ms=4, label=f"{model}: steps and tokens to a loss")
        for point in (p for p in points if p.model == model):
            fit = point.tradeoff
            steps, tokens = fit.steps / fit.s_min, fit.steps * fit.batch_tokens / fit.e_min
            axis.plot(steps, tokens, marker, color=colours(norm(point.loss)), ms=3.5, alpha=0.7, mec="none")
    for multiple in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8):
        name = f"{multiple:g}" if multiple >= 1 else f"1/{1 / multiple:g}"
        at = (1 + 1 / multiple, 1 + multiple)
        axis.plot(*at, "+", color=MODEL_COLOURS[1], ms=9)
        label = "B = $B_{crit}$" if multiple == 1 else f"B = {name} $B_{{crit}}$"
        axis.annotate(label, at, xytext=(7, 4), textcoords="offset points", fontsize=7.5)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlim(0.75, 80)
    axis.set_ylim(0.75, 80)
    axis.set_xlabel("time: steps / fewest steps")
    axis.set_ylabel("compute: tokens / fewest tokens")
    axis.set_title("What a batch size costs", loc="left")
    axis.legend(loc="upper right", fontsize=8.5)
    bar = figure.colorbar(plt.cm.ScalarMappable(norm, colours), ax=axis, pad=0.02)
    bar.set_label("test loss, nats per token")
    bar.outline.set_visible(False)
    return figure
