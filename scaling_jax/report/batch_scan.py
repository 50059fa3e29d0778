"""Figure 2: the batch size scan, tokens against steps along every run, coloured by loss."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from scaling_jax.analysis import Analysis
from scaling_jax.analysis.measurements import tried_runs
from scaling_jax.report.style import new_figure
from scaling_jax.scanning.search import best_of, evaluations


def batch_scan_figure(analysis: Analysis, workdir: Path) -> Figure:
    """A panel a model, x = steps, y = tokens, both log.

    Constant-loss fits are (S/S_min − 1)(E/E_min − 1) = 1 (McCandlish et al. 2018, eq. 2.11).
    """
    subjects = analysis.experiment.subjects
    figure, (axes,) = new_figure(len(subjects), width=4.8 * len(subjects) + 1.2, height=4.6, sharey=True)
    targets = [loss for s in subjects for loss in s.target_losses]
    colours = plt.get_cmap("viridis")
    norm = Normalize(min(targets), max(targets))
    for axis, subject in zip(axes, subjects, strict=True):
        for group in (g for g in analysis.experiment.groups if g.subject == subject):
            run = best_of(tried_runs(analysis.experiment, group, workdir)).run
            steps, losses = (np.array(x) for x in evaluations(workdir / "runs" / run.run_id))
            shown = losses <= max(subject.target_losses) * 1.1
            steps, losses = steps[shown], losses[shown]
            tokens = steps * group.batch_tokens
            axis.plot(steps, tokens, "--", color="0.8", lw=0.8, zorder=1)
            axis.scatter(steps, tokens, c=losses, cmap=colours, norm=norm, s=11, zorder=2, linewidths=0)
        for point in (p for p in analysis.fit.points if p.model == subject.model.name and p.in_law):
            _draw_tradeoff(axis, point, colours(norm(point.loss)))
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("steps")
        axis.set_title(f"{subject.model.name}, {subject.model.num_params:,} parameters", loc="left")
    axes[0].set_ylabel("tokens processed")
    axes[0].legend(
        handles=[
            Line2D(
                [], [], ls="--", color="0.8", marker="o", mfc="0.4", mec="none", ms=3.5, label="a run, one batch size"
            ),
            Line2D([], [], color="0.3", lw=1, label="fit at constant loss"),
        ],
        loc="upper left",
        fontsize=8.5,
    )
    bar = figure.colorbar(plt.cm.ScalarMappable(norm, colours), ax=axes, pad=0.02)
    bar.set_label("test loss, nats per token")
    bar.outline.set_visible(False)
    return figure


def _draw_tradeoff(axis, point, colour) -> None:
    fit = point.tradeoff
    batch = np.geomspace(min(fit.batch_tokens) / 1.5, max(fit.batch_tokens) * 1.5, 60)
    steps = fit.s_min * (1 + fit.b_crit / batch)
    axis.plot(steps, steps * batch, color=colour, lw=1, zorder=3)
