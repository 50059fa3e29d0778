"""Figure 7: the learning-rate search, steps to a loss against learning rate for each batch size."""

import math
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from scaling_jax.report.chart import Chart
from scaling_jax.report.runs import GroupRuns
from scaling_jax.report.style import COLOURS, MODEL_COLOURS, batch_bar, count_axis, new_figure, plain

_FLAG = MODEL_COLOURS[1]


class Best(NamedTuple):
    """The rate that got to a target first."""

    learning_rate: float
    steps: float
    at_edge: bool  # of the rates tried: a better one may lie beyond


def best_rate(group: GroupRuns, target: int) -> Best | None:
    """The best rate for target loss number `target`; None if no rate got there."""
    reached = [t for t in group.tried if math.isfinite(t.steps_to_target[target])]
    if not reached:
        return None
    best = min(reached, key=lambda t: t.steps_to_target[target])
    indices = [t.rate_index for t in group.tried]
    at_edge = best.rate_index in (min(indices), max(indices))
    return Best(best.run.learning_rate, float(best.steps_to_target[target]), at_edge)


def rate_search_chart(runs: list[GroupRuns], models: list[str]) -> Chart:
    """A panel a model; x = learning rate, y = steps to the middle one of its target losses, both log.

    The lowest target is no use here: a rate that can't be the best any more isn't trained to it.
    """
    figure, axes = new_figure(len(models))
    chart = Chart(
        "learning_rate_search",
        "Optimizer steps to a loss against learning rate, a line a batch size, with the best rate marked.",
        figure,
    )
    norm = batch_bar(figure, axes, [r.batch_tokens for r in runs])
    for axis, model in zip(axes, models, strict=False):
        groups = [r for r in runs if r.model == model]
        targets = groups[0].group.subject.target_losses
        target = len(targets) // 2
        for group in groups:
            _draw_group(chart, axis, group, target, COLOURS(norm(group.batch_tokens)))
        count_axis(axis.xaxis)
        axis.set_xlabel("learning rate")
        axis.set_title(plain(f"{model}, to a loss of {targets[target]:.3g} nats per token"), loc="left", fontsize=10)
    count_axis(axes[0].yaxis)
    axes[0].set_ylabel("optimizer steps to the loss")
    handles = [
        Line2D([], [], ls="none", marker="o", color="0.4", ms=9, mfc="none", label="best of those tried"),
        Line2D([], [], ls="none", marker="s", color=_FLAG, ms=10, mfc="none", label="best, but at an edge: not tuned"),
        Line2D([], [], ls="none", marker="^", color="0.4", ms=5, mfc="none", label="not there yet when it was ended"),
    ]
    figure.legend(handles=handles, loc="outside lower center", fontsize=8.5, ncols=2)
    return chart


def _draw_group(chart: Chart, axis: Axes, group: GroupRuns, target: int, colour) -> None:
    loss = group.group.subject.target_losses[target]
    line: tuple[list, list] = ([], [])
    for tried in group.tried:
        rate, steps = tried.run.learning_rate, tried.steps_to_target[target]
        outcome = f"{steps:,.0f} steps"
        if math.isfinite(steps):
            line[0].append(rate)
            line[1].append(steps)
        else:
            steps = tried.result.steps
            outcome = f"not in {steps:,} steps ({tried.result.status})"
            axis.plot([rate], [steps], "^", color=colour, mfc="none", ms=5)
        text = f"{group.group.name}, learning rate {rate:g}\nto loss {loss:.3g}: {outcome}"
        chart.mark(axis, [rate], [steps], [text])
    axis.plot(*line, "o-", color=colour, ms=4, lw=0.8)
    best = best_rate(group, target)
    if best is not None:
        ring = {"marker": "s", "color": _FLAG, "ms": 10} if best.at_edge else {"marker": "o", "color": "0.4", "ms": 9}
        axis.plot([best.learning_rate], [best.steps], mfc="none", mew=1.2, ls="none", **ring)  # type: ignore[arg-type]
