"""Figures and HTML reports of results. Trains nothing."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from scaling_jax.io import UserError
from scaling_jax.results import Analysis, Results

if TYPE_CHECKING:
    from scaling_jax.report.chart import Chart
    from scaling_jax.results.budget_table import BudgetTableFit
    from scaling_jax.results.compare import Compared


def write_figures(analysis: Analysis, workdir: str | Path | None = None) -> list[Path]:
    """Writes the scan's figures as PNG, SVG and CSV to the folder `figures`. Returns the paths of the PNG files.

    The CSV file has the data of a figure: a row for each point, with its interval if it has one.

    Args:
      workdir: results folder to write to; None takes the scan's folder.
    """
    from scaling_jax.io.stores import publish, working_copy

    _check_matplotlib()
    from scaling_jax.report.chart import save
    from scaling_jax.report.units import chart_in_unit

    folder = analysis.results.folder if workdir is None else working_copy(workdir, fetch=False)
    unit = analysis.experiment.unit
    paths = [save(chart_in_unit(chart, unit), folder / "figures") for chart in _charts(analysis)]
    publish(folder)
    return paths


def write_budget_figures(found: "BudgetTableFit") -> list[Path]:
    """Writes the figures of a table of budgets to <table>.figures beside it. Returns the paths of the PNG files."""
    _check_matplotlib()
    from scaling_jax.report.budget_charts import budget_charts
    from scaling_jax.report.chart import save

    folder = found.table.path.with_suffix(".figures")
    return [save(chart, folder) for chart in budget_charts(found.fit)]


def write_comparison(compared: "Compared", folder: Path) -> Path:
    """Writes the figure of compared scans to a folder. Returns the path of the PNG file."""
    _check_matplotlib()
    from scaling_jax.report.chart import save
    from scaling_jax.report.compare_chart import saving_chart

    return save(saving_chart(compared), folder)


def write_report(analysis: Analysis, workdir: str | Path | None = None) -> Path:
    """Writes the scan's report.html, a single file that needs no other, and returns its path.

    Args:
      workdir: results folder to write to; None takes the scan's folder.
    """
    from scaling_jax.io.files import write_whole
    from scaling_jax.io.stores import publish, working_copy

    _check_matplotlib()
    from scaling_jax.report.page import page
    from scaling_jax.report.sections import sections
    from scaling_jax.report.units import page_in_unit

    folder = analysis.results.folder if workdir is None else working_copy(workdir, fetch=False)
    path = folder / "report.html"
    html = page(f"Critical batch size: {analysis.experiment.name}", sections(analysis))
    write_whole(path, page_in_unit(html, analysis.experiment.unit))
    publish(folder)
    return path


def write_runs_report(results: Results) -> Path:
    """Writes report.html for a folder of single runs, and returns its path."""
    from scaling_jax.io.files import write_whole
    from scaling_jax.io.stores import publish

    _check_matplotlib()
    from scaling_jax.report.page import page
    from scaling_jax.report.sections import run_sections

    path = results.folder / "report.html"
    write_whole(path, page(f"Runs: {results.folder.resolve().name}", run_sections(results)))
    publish(results.folder)
    return path


def _check_matplotlib() -> None:
    """Raises UserError if matplotlib refuses the environment's MPLBACKEND, which it does when it is imported."""
    try:
        import matplotlib  # noqa: F401
    except ValueError as error:
        what = str(error).splitlines()[0].partition(";")[0]
        raise UserError(f"MPLBACKEND={os.environ.get('MPLBACKEND')} ({what}): unset it, or set it to agg") from None


def _charts(analysis: Analysis) -> "Iterator[Chart]":
    from scaling_jax.report.critical_batch import critical_batch_chart, three_measurements_chart
    from scaling_jax.report.noise_charts import noise_by_layer_chart, noise_chart, run_near_b_crit
    from scaling_jax.report.scan_charts import (
        batch_scan_chart,
        pareto_chart,
        rate_search_chart,
        residuals_chart,
        tradeoffs_chart,
    )
    from scaling_jax.report.spread_chart import law_spread_chart
    from scaling_jax.results.runs import few_enough

    models = [subject.model.name for subject in analysis.experiment.subjects]
    runs = few_enough(analysis.results.cells)
    yield critical_batch_chart(analysis)
    yield batch_scan_chart(analysis, models)
    yield three_measurements_chart(analysis, models)
    if spread := law_spread_chart(analysis):
        yield spread
    yield tradeoffs_chart(analysis, models)
    yield residuals_chart(analysis, models)
    yield pareto_chart(analysis)
    if analysis.noise:
        yield noise_chart(runs, models)
    if near := [run for model in models if (run := run_near_b_crit(analysis, model))]:
        yield noise_by_layer_chart(near)
    yield rate_search_chart(runs, models)
