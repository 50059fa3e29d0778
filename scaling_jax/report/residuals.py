"""Figure 3: what the trade-off fits leave over, by batch size: a trend would be a misfit, not noise."""

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from scaling_jax.analysis import Analysis
from scaling_jax.report.style import new_figure


def residuals_figure(analysis: Analysis) -> Figure:
    """A panel a model; x = batch size in tokens, y = steps measured over steps fitted, coloured by loss."""
    models = list(dict.fromkeys(p.model for p in analysis.fit.points))
    figure, (axes,) = new_figure(max(1, len(models)), width=4.8 * max(1, len(models)) + 1.2, height=3.8, sharey=True)
    losses = [p.loss for p in analysis.fit.points] or [2.0, 3.0]
    colours, norm = plt.get_cmap("viridis"), Normalize(min(losses), max(losses))
    for axis, model in zip(axes, models, strict=False):
        for point in (p for p in analysis.fit.points if p.model == model):
            order = np.argsort(point.tradeoff.batch_tokens)
            percent = 100 * np.expm1(point.tradeoff.residuals[order])
            axis.plot(
                point.tradeoff.batch_tokens[order],
                percent,
                "o-",
                ms=3,
                lw=0.6,
                color=colours(norm(point.loss)),
                alpha=0.8,
            )
        axis.axhline(0, color="0.4", lw=0.8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axis.tick_params(axis="x", labelrotation=30)
        axis.set_xlabel("batch size, tokens")
        axis.set_title(model, loc="left")
    axes[0].set_ylabel("steps measured / fitted − 1, %")
    bar = figure.colorbar(plt.cm.ScalarMappable(norm, colours), ax=axes, pad=0.02)
    bar.set_label("test loss, nats per token")
    bar.outline.set_visible(False)
    return figure
