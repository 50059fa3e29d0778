"""Figure 1: critical batch size against loss (Kaplan et al. 2020, fig. 10), with every noise-scale measurement."""

import math

import numpy as np
from matplotlib.figure import Figure

from scaling_jax.analysis import Analysis
from scaling_jax.report.style import LAW_COLOUR, MODEL_COLOURS, NOISE_COLOUR, loss_axis, new_figure


def critical_batch_figure(analysis: Analysis) -> Figure:
    """Log-log; x = test loss falling to the right, y = tokens."""
    figure, ((axis,),) = new_figure(width=7.5, height=5.2)
    fitted = [p for p in analysis.fit.points if p.in_law]
    losses = [p.loss for p in fitted] or [p.loss for p in analysis.fit.points] or [2.0, 3.0]
    low, high = min(losses), max(losses)
    low, high = low * (low / high) ** 0.06, high * (high / low) ** 0.06

    _draw_noise(axis, analysis, low, high)
    law = analysis.fit.law
    x = np.geomspace(low, high, 100)
    if law is not None:
        below, above = analysis.fit.band(x)
        axis.fill_between(x, below, above, color=LAW_COLOUR, alpha=0.12, linewidth=0)
        formula = f"$B_{{crit}}$ = {_power_of_ten(law.b_star)} tokens · $L^{{{law.exponent:.1f}}}$"
        span = "[{:.1f}, {:.1f}]".format(*law.exponent_interval)
        axis.plot(x, law(x), "--", color=LAW_COLOUR, label=f"{formula}\nexponent's 95 % interval {span}")
    for k, model in enumerate(dict.fromkeys(p.model for p in fitted)):
        colour = MODEL_COLOURS[k % len(MODEL_COLOURS)]
        points = [p for p in fitted if p.model == model]
        b_crit = np.array([p.tradeoff.b_crit for p in points])
        ends = np.array([p.tradeoff.b_crit_interval for p in points]).T
        error = np.abs(np.nan_to_num(ends, posinf=1e12) - b_crit)
        params = _num_params(analysis, model)
        axis.errorbar([p.loss for p in points], b_crit, error, color=colour, elinewidth=0.8, alpha=0.55, fmt="none")
        axis.plot([p.loss for p in points], b_crit, "o-", color=colour, ms=5, label=f"{model}, N = {params}")

    axis.set_yscale("log")
    loss_axis(axis, low, high)
    values = [p.tradeoff.b_crit for p in fitted] + [
        n.b_simple for n in analysis.noise if n.resolved and low <= n.loss <= high
    ]
    if values:
        axis.set_ylim(np.percentile(values, 1) / 3, np.percentile(values, 99) * 3)
    axis.set_xlabel("test loss, nats per token")
    axis.set_ylabel("critical batch size, tokens")
    axis.set_title("Critical batch size vs. performance", loc="left")
    axis.legend(loc="lower right", fontsize=8.5)
    return figure


def _draw_noise(axis, analysis: Analysis, low, high) -> None:
    inside = [n for n in analysis.noise if low <= n.loss <= high]
    resolved = [n for n in inside if n.resolved]
    bounds = [n for n in inside if not n.resolved and n.low > 0]
    axis.plot(
        [n.loss for n in resolved],
        [n.b_simple for n in resolved],
        "o",
        color=NOISE_COLOUR,
        ms=3.5,
        alpha=0.6,
        mec="none",
        label="noise scale tr(Σ)/|G|², measured in the training step",
    )
    if bounds:
        axis.plot(
            [n.loss for n in bounds],
            [n.low for n in bounds],
            "^",
            color="none",
            ms=4,
            alpha=0.6,
            mec=NOISE_COLOUR,
            label="noise scale unresolved: at least",
        )


def _num_params(analysis: Analysis, model: str) -> str:
    n = next(s.model.num_params for s in analysis.experiment.subjects if s.model.name == model)
    return f"{n / 1e6:.3g}M" if n >= 1e6 else f"{n / 1e3:.3g}k"


def _power_of_ten(value: float) -> str:
    exponent = math.floor(math.log10(value))
    return f"{value / 10**exponent:.1f}·$10^{{{exponent}}}$"
