"""Figures and HTML reports of results. Trains nothing."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scaling_jax.io import UserError
from scaling_jax.results import Analysis, Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

    from scaling_jax.report.chart import Into
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
    from scaling_jax.report.figures import charts

    folder = analysis.results.folder if workdir is None else working_copy(workdir, fetch=False)
    paths = [save(chart, folder / "figures") for chart in charts(analysis)]
    publish(folder)
    return paths


def draw_figure(
    analysis: Analysis, name: str, into: "Into" = None, models: Sequence[str] | None = None
) -> "Figure | SubFigure":
    """Draws one of the scan's figures, into a figure or axes of yours if you give them, and returns its figure.

    Args:
      name: of its file, such as "critical_batch_size"; `write_figures` writes them all.
      into: an empty matplotlib figure or subfigure, or an axis for each of the figure's panels.
      models: those to show, in this order; None takes all. A figure with panels has one for each model.

    Raises:
      UserError: if there is no such figure or model, nothing to show, or another number of axes than panels.
    """
    _check_matplotlib()
    from scaling_jax.report.figures import chart_of, models_of

    return chart_of(analysis, name, models_of(analysis) if models is None else list(models), into).figure


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
