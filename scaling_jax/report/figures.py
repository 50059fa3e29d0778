"""The figures of a scan, by the names of their files."""

from collections.abc import Callable, Iterator

from matplotlib.figure import Figure, SubFigure
from matplotlib.text import Text

from scaling_jax.io import UserError
from scaling_jax.report.chart import Chart, Into, axes_of
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
from scaling_jax.report.units import chart_in_unit
from scaling_jax.results import Analysis
from scaling_jax.results.runs import few_enough

Draw = Callable[[Analysis, list[str], Into], Chart | None]  # None where there is nothing to show


def _noise(analysis: Analysis, models: list[str], into: Into) -> Chart | None:
    return noise_chart(few_enough(analysis.results.cells), models, into) if analysis.noise else None


def _noise_by_layer(analysis: Analysis, models: list[str], into: Into) -> Chart | None:
    near = [run for model in models if (run := run_near_b_crit(analysis, model))]
    return noise_by_layer_chart(near, into) if near else None


FIGURES: dict[str, Draw] = {
    "critical_batch_size": lambda analysis, _, into: critical_batch_chart(analysis, into),
    "batch_size_scan": batch_scan_chart,
    "three_measurements": three_measurements_chart,
    "law_spread": lambda analysis, _, into: law_spread_chart(analysis, into),
    "tradeoff_fits": tradeoffs_chart,
    "residuals": residuals_chart,
    "time_and_compute": lambda analysis, _, into: pareto_chart(analysis, into),
    "noise_scale_over_training": _noise,
    "noise_scale_by_layer": _noise_by_layer,
    "learning_rate_search": lambda analysis, models, into: rate_search_chart(
        few_enough(analysis.results.cells), models, into
    ),
}


def charts(analysis: Analysis) -> Iterator[Chart]:
    """Every figure of a scan that has something to show, for all models."""
    for draw in FIGURES.values():
        if chart := draw(analysis, models_of(analysis), None):
            yield chart_in_unit(chart, analysis.experiment.unit)


def chart_of(analysis: Analysis, name: str, models: list[str], into: Into) -> Chart:
    """One figure; see `draw_figure`."""
    if name not in FIGURES:
        raise UserError(f"there is no figure {name!r}: choose from {', '.join(FIGURES)}")
    for model in models:
        if model not in (known := models_of(analysis)):
            raise UserError(f"the scan has no model {model!r}: choose from {', '.join(known)}")
    axes = [] if into is None or isinstance(into, Figure | SubFigure) else axes_of(into)
    elsewhere = {text for axis in axes for text in axis.figure.findobj(Text)}  # a caller's own words stay
    elsewhere -= {text for axis in axes for text in axis.findobj(Text)}
    chart = FIGURES[name](analysis, models, into)
    if chart is None:
        raise UserError(f"{analysis.results.folder} has nothing for the figure {name}")
    return chart_in_unit(chart, analysis.experiment.unit, elsewhere)


def models_of(analysis: Analysis) -> list[str]:
    return [subject.model.name for subject in analysis.experiment.subjects]
