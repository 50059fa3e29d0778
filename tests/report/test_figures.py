import dataclasses

import numpy as np
import pytest

from scaling_jax.analysis import analyse
from scaling_jax.report import write_figures
from scaling_jax.report.batch_scan import batch_scan_figure
from scaling_jax.report.critical_batch import critical_batch_figure
from scaling_jax.report.pareto import pareto_figure
from scaling_jax.report.residuals import residuals_figure


@pytest.fixture(scope="module")
def analysis(made_up):
    return analyse(made_up[1])


def line(axis, label):
    return next(artist for artist in axis.lines if str(artist.get_label()).startswith(label))


def test_loss_falls_from_left_to_right_on_log_axes(analysis):
    (axis,) = critical_batch_figure(analysis).axes
    left, right = axis.get_xlim()
    assert left > right
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert axis.get_xlabel() == "test loss, nats per token"
    assert axis.get_ylabel() == "critical batch size, tokens"


def test_every_resolved_noise_scale_is_a_green_dot_and_every_model_a_line(analysis):
    (axis,) = critical_batch_figure(analysis).axes
    dots = line(axis, "noise scale tr")
    assert sorted(dots.get_ydata()) == sorted(n.b_simple for n in analysis.noise)
    assert dots.get_color() == "#009E73"
    for model in ("1x16", "1x32"):
        expected = [p.tradeoff.b_crit for p in analysis.fit.points if p.model == model]
        np.testing.assert_array_equal(line(axis, model).get_ydata(), expected)


def test_the_law_is_dashed_and_named_in_the_legend(analysis):
    (axis,) = critical_batch_figure(analysis).axes
    law = line(axis, "$B_{crit}$")
    assert law.get_linestyle() == "--"
    assert "L^{-5.0}" in law.get_label()


def test_the_scan_has_a_panel_a_model_and_one_colour_bar(analysis, made_up):
    axes = batch_scan_figure(analysis, made_up[1]).axes
    assert len(axes) == 3
    assert [axis.get_xlabel() for axis in axes[:2]] == ["steps", "steps"]
    assert axes[2].get_ylabel() == "test loss, nats per token"


def test_residuals_are_measured_over_fitted_steps_for_each_batch(analysis):
    axes = residuals_figure(analysis).axes
    drawn = axes[0].lines[0]
    fit = analysis.fit.points[0].tradeoff
    np.testing.assert_allclose(drawn.get_xdata(), np.sort(fit.batch_tokens))
    fitted = fit.s_min * (1 + fit.b_crit / drawn.get_xdata())
    measured = fit.steps[np.argsort(fit.batch_tokens)]
    np.testing.assert_allclose(drawn.get_ydata(), 100 * (measured / fitted - 1), atol=1e-6)


def test_exact_measurements_lie_on_the_time_compute_curve(analysis):
    axis = pareto_figure(analysis).axes[0]
    curve = axis.lines[0]
    np.testing.assert_allclose((curve.get_xdata() - 1) * (curve.get_ydata() - 1), 1)
    dots = [line for line in axis.lines if len(line.get_xdata()) == 7]
    assert len(dots) == len([p for p in analysis.fit.points if p.in_law])
    for line in dots:
        np.testing.assert_allclose((line.get_xdata() - 1) * (line.get_ydata() - 1), 1, rtol=0.6)


def test_figures_without_a_law_are_drawn_all_the_same(analysis, made_up, tmp_path):
    lawless = dataclasses.replace(analysis, fit=dataclasses.replace(analysis.fit, law=None, errors=None), noise=[])
    assert critical_batch_figure(lawless).axes
    assert pareto_figure(lawless).axes


def test_the_same_analysis_gives_the_same_files(analysis, made_up):
    paths = write_figures(analysis, made_up[1])
    svg = [path.with_suffix(".svg").read_bytes() for path in paths]
    assert [path.with_suffix(".svg").read_bytes() for path in write_figures(analysis, made_up[1])] == svg
