"""Charts over the course of runs: the noise scale of whole models and of their parts, and the loss of single runs."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.lines import Line2D

from scaling_jax.report.chart import (
    COLOURS,
    MODEL_COLOURS,
    Chart,
    Into,
    batch_bar,
    count_axis,
    legend_below,
    new_figure,
    plain,
)
from scaling_jax.report.critical_batch import whiskers
from scaling_jax.report.words import short as tokens
from scaling_jax.results import Analysis, CellRuns, RunRecord
from scaling_jax.results.runs import NoiseWindow, PartNoise

MOST_NAMED = 6  # layers in the legend; with more layers, only the first and the last
_ENDS = {"embedding": ("s", MODEL_COLOURS[1]), "unembedding": ("D", MODEL_COLOURS[2])}


class SingleRun(NamedTuple):
    """A run outside of a scan, for charts of runs."""

    record: RunRecord

    @property
    def name(self) -> str:
        return self.record.run.label

    @property
    def model(self) -> str:
        return self.record.run.model.name

    @property
    def batch_tokens(self) -> int:
        return self.record.run.batch_tokens


def loss_chart(runs: Sequence[SingleRun], models: list[str]) -> Chart:
    """The loss of each run. A panel per model; x = tokens processed; y = test loss; colour = first batch size."""
    figure, axes = new_figure(len(models))
    chart = Chart("loss", "Test loss against tokens processed, for every run.", figure)
    norm = batch_bar(figure, axes, [r.batch_tokens for r in runs])
    for axis, model in zip(axes, models, strict=False):
        for run in (r for r in runs if r.model == model):
            at, losses = run.record.course.eval_tokens, run.record.course.eval_losses
            axis.plot(at, losses, "o-", color=COLOURS(norm(run.batch_tokens)), ms=3, lw=0.8)
            texts = [f"{run.name}\nby {tokens(n)} tokens: loss {x:.4f}" for n, x in zip(at, losses, strict=True)]
            chart.mark(axis, at, losses, texts)
        count_axis(axis.xaxis)
        axis.set_xlabel("tokens processed")
        axis.set_title(plain(model), loc="left")
    axes[0].set_ylabel("test loss, nats per token")
    return chart


def noise_chart(runs: Sequence[CellRuns | SingleRun], models: list[str], into: Into = None) -> Chart:
    """The noise scale of each run, with intervals. A panel per model; x = tokens processed; y = tokens."""
    figure, axes = new_figure(len(models), into=into)
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
            resolved = [w for w in run.record.noise if w.noise.resolved and w.noise.value > 0]
            at, value = [w.tokens for w in resolved], np.array([w.noise.value for w in resolved])
            ends = np.array([(w.noise.low, w.noise.high) for w in resolved]).reshape(-1, 2)
            axis.errorbar(at, value, whiskers(value, ends), color=colour, elinewidth=0.7, alpha=0.4, fmt="none")
            axis.plot(*_broken(run.record.noise), "o-", color=colour, ms=3, lw=0.8)
            chart.mark(axis, at, value, [_window_text(run, w) for w in resolved], ends)
            bounds = [w for w in run.record.noise if not w.noise.resolved and w.noise.low > 0]
            at, low = [w.tokens for w in bounds], [w.noise.low for w in bounds]
            axis.plot(at, low, "^", color="none", mec=colour, ms=4)
            chart.mark(axis, at, low, [_window_text(run, w) for w in bounds])
            values += list(value)
        count_axis(axis.xaxis)
        axis.set_xlabel("tokens processed")
        axis.set_title(plain(model), loc="left")
    if values:
        axes[0].set_ylim(np.percentile(values, 2) / 3, np.percentile(values, 98) * 3)
    count_axis(axes[0].yaxis)
    axes[0].set_ylabel("noise scale tr(Σ)/|G|², tokens")
    bound = Line2D([], [], ls="none", marker="^", mfc="none", mec="0.4", ms=4, label="unresolved: at least")
    legend_below(figure, axes, [bound], [str(bound.get_label())], 1)
    return chart


def run_near_b_crit(analysis: Analysis, model: str) -> CellRuns | None:
    """The run with noise scales by part whose batch size is nearest to the model's median B_crit; None without any."""
    runs = analysis.results.cells
    b_crit = [p.b_crit for p in analysis.fit.points if p.model == model]
    middle = math.log(np.median(b_crit or [r.batch_tokens for r in runs]))
    measured = [r for r in runs if r.model == model and any(r.record.noise_by_part.values())]
    return min(measured, key=lambda r: abs(math.log(r.batch_tokens) - middle), default=None)


def noise_by_layer_chart(runs: Sequence[CellRuns], into: Into = None) -> Chart:
    """The resolved noise scales of each part of a model, and of all parts in the same windows, with intervals.

    A panel per run; x = tokens processed; y = tokens.
    """
    figure, axes = new_figure(len(runs), into=into)
    chart = Chart(
        "noise_scale_by_layer",
        "Noise scale of each part of the model against tokens processed.",
        figure,
    )
    values = []
    for axis, run in zip(axes, runs, strict=True):
        layers = [part for part in run.record.noise_by_part if part not in _ENDS]
        every = sorted({w.tokens for windows in run.record.noise_by_part.values() for w in windows})
        for part, windows in run.record.noise_by_part.items():
            at, value = [w.tokens for w in windows], np.array([w.value for w in windows])
            k = layers.index(part) if part in layers else 0
            marker, colour = _ENDS.get(part, ("o", COLOURS(0.85 * k / max(len(layers) - 1, 1))))
            named = part in _ENDS or len(layers) <= MOST_NAMED or k in (0, len(layers) - 1)
            ends = np.array([(w.low, w.high) for w in windows]).reshape(-1, 2)
            axis.errorbar(at, value, whiskers(value, ends), color=colour, elinewidth=0.7, alpha=0.4, fmt="none")
            there = dict(zip(at, value, strict=True))  # a line doesn't cross windows that other parts resolve
            drawn = [there.get(tokens, math.nan) for tokens in every] if there else []
            axis.plot(
                every if there else [], drawn, f"{marker}-", color=colour, ms=4, lw=1.1, label=part if named else None
            )
            chart.mark(axis, at, value, [_part_text(run, part, w) for w in windows], ends)
            values += list(value)
        whole = run.record.noise_of_all_parts
        at, value = [w.tokens for w in whole], np.array([w.value for w in whole])
        ends = np.array([(w.low, w.high) for w in whole]).reshape(-1, 2)
        axis.errorbar(at, value, whiskers(value, ends), color="0.25", elinewidth=0.7, alpha=0.4, fmt="none")
        axis.plot(at, value, ".--", color="0.25", lw=1, label="whole model", zorder=1)
        chart.mark(axis, at, value, [_part_text(run, "whole model", w) for w in whole], ends)
        values += list(value)
        count_axis(axis.xaxis)
        axis.set_xlabel("tokens processed")
        axis.set_title(plain(run.name), loc="left")
    entries = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    order = sorted(entries, key=lambda label: (label == "whole model", label == "unembedding"))
    legend_below(figure, axes, [entries[k] for k in order], order, 3 + len(axes))
    if values:
        axes[0].set_ylim(min(values) / 1.5, max(values) * 1.5)
    count_axis(axes[0].yaxis)
    axes[0].set_ylabel("noise scale tr(Σ)/|G|², tokens")
    return chart


def _broken(windows: Sequence[NoiseWindow]) -> tuple[list[float], list[float]]:
    """(tokens, noise scale) of every window, NaN where it is unresolved: nobody knows where a line would go there."""
    known = [w.noise.value if w.noise.resolved and w.noise.value > 0 else math.nan for w in windows]
    return [w.tokens for w in windows], known


def _window_text(run: CellRuns | SingleRun, window: NoiseWindow) -> str:
    found = window.noise
    said = f"at least {tokens(found.low)}"
    if found.resolved:
        said = f"{tokens(found.value)} [{tokens(found.low)}, {tokens(found.high)}]"
    return f"{run.name}\nby {tokens(window.tokens)} tokens: noise scale {said}"


def _part_text(run: CellRuns, part: str, window: PartNoise) -> str:
    said = f"{tokens(window.value)} [{tokens(window.low)}, {tokens(window.high)}]"
    return f"{run.name}, {part}\nby {tokens(window.tokens)} tokens: noise scale {said}"
