"""The chart of compared scans: tokens that each saves over the first, at each batch size."""

import math

from scaling_jax.report.chart import MODEL_COLOURS, Chart, batch_axis, new_figure, plain
from scaling_jax.results.compare import Compared


def saving_chart(compared: Compared) -> Chart:
    """Share of tokens saved over the first scan against batch size, with intervals. A panel per model."""
    models = list(dict.fromkeys(pair.models[0] for pair in compared.pairs))
    first = compared.sides[0].name
    unit = "bytes" if compared.in_bytes else "tokens"
    figure, axes = new_figure(len(models), height=4.4)
    chart = Chart("comparison", f"Share of {unit} saved over {first} to the same losses, against batch size.", figure)
    others = [side.name for side in compared.sides[1:]]
    for axis, model in zip(axes, models, strict=True):
        axis.axhline(0, color="0.4", lw=0.9)
        for pair in (p for p in compared.pairs if p.models[0] == model):
            k = others.index(pair.names[1])
            shift = 1.04 ** (k - (len(others) - 1) / 2)
            colour = MODEL_COLOURS[k % len(MODEL_COLOURS)]
            name = plain(pair.names[1])
            reached = [row for row in pair.batches if not math.isnan(row.saving)]
            x, y = [row.batch * shift for row in reached], [100 * row.saving for row in reached]
            ends = [(100 * row.interval[0], 100 * row.interval[1]) for row in reached]
            bars = [
                [v - low for v, (low, _) in zip(y, ends, strict=True)],
                [h - v for v, (_, h) in zip(y, ends, strict=True)],
            ]
            label = f"{name}, at loss {pair.losses[-1]:.3g}"
            axis.errorbar(x, y, bars, fmt="o-", color=colour, ms=4.5, lw=1, elinewidth=1.4, label=label)
            texts = [
                f"{pair.names[1]} over {first}, {model}, batch of {row.batch:,.0f} {unit}\n"
                f"{100 * row.saving:.0f} % saved [{100 * row.interval[0]:.0f}, {100 * row.interval[1]:.0f}]"
                for row in reached
            ]
            chart.mark(axis, x, y, texts, ends)
            x, y = [row.batch * shift for row in pair.batches], [100 * row.mean_saving for row in pair.batches]
            axis.plot(x, y, "--", color=colour, lw=1, label=f"{name}, mean over losses")
        batch_axis(axis)
        axis.set_xlabel(f"batch size, {unit}")
        axis.tick_params(axis="x", labelrotation=30)
        axis.set_title(plain(model), loc="left")
        axis.legend(loc="best", fontsize=8.5)
    axes[0].set_ylabel(f"{unit} saved over {plain(first)}, %")
    return chart
