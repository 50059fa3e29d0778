"""Figures and the report of a finished scan; reads results, runs nothing."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from scaling_jax.analysis import Analysis

if TYPE_CHECKING:
    from scaling_jax.report.chart import Chart
    from scaling_jax.report.runs import GroupRuns


def write_figures(analysis: Analysis, workdir: str | Path) -> list[Path]:
    """The scan's figures as PNG and SVG in `workdir/figures`; returns the PNGs' paths."""
    from scaling_jax.report.chart import save
    from scaling_jax.report.runs import read_runs
    from scaling_jax.training.buckets import publish, working_copy

    workdir = working_copy(workdir)
    runs = read_runs(analysis.experiment, workdir)
    paths = [save(chart, workdir / "figures") for chart in _charts(analysis, runs)]
    publish(workdir)
    return paths


def write_report(analysis: Analysis, workdir: str | Path) -> Path:
    """`workdir/report.html`, one file that needs no other; returns its path. An old one stays until it is whole.

    Raises:
      UserError: if runs are missing, or branches.csv is damaged.
    """
    from scaling_jax.report.page import page
    from scaling_jax.report.provenance import versions
    from scaling_jax.report.runs import read_corpus, read_runs
    from scaling_jax.report.sections import sections
    from scaling_jax.training.buckets import publish, working_copy
    from scaling_jax.training.records import write_atomically

    workdir = working_copy(workdir)
    runs = read_runs(analysis.experiment, workdir)
    said = sections(analysis, runs, read_corpus(runs, workdir), versions())
    path = workdir / "report.html"
    write_atomically(path, page(f"Critical batch size: {analysis.experiment.name}", said))
    publish(workdir)
    return path


def _charts(analysis: Analysis, runs: "list[GroupRuns]") -> "Iterator[Chart]":
    from scaling_jax.report.batch_scan import batch_scan_chart
    from scaling_jax.report.critical_batch import critical_batch_chart
    from scaling_jax.report.noise_by_layer import noise_by_layer_chart, run_near_b_crit
    from scaling_jax.report.noise_over_training import noise_chart
    from scaling_jax.report.pareto import pareto_chart
    from scaling_jax.report.rate_search import rate_search_chart
    from scaling_jax.report.three_measurements import three_measurements_chart
    from scaling_jax.report.tradeoffs import residuals_chart, tradeoffs_chart

    models = [subject.model.name for subject in analysis.experiment.subjects]
    yield critical_batch_chart(analysis)
    yield batch_scan_chart(analysis, runs, models)
    yield three_measurements_chart(analysis, models)
    yield tradeoffs_chart(analysis, models)
    yield residuals_chart(analysis, models)
    yield pareto_chart(analysis)
    yield noise_chart(runs, models)
    if near := [run for model in models if (run := run_near_b_crit(analysis, runs, model))]:
        yield noise_by_layer_chart(near)
    yield rate_search_chart(runs, models)
