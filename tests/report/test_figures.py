import dataclasses
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from scaling_jax.analysis.branches import BranchMeasurement
from scaling_jax.report import write_figures
from scaling_jax.report.batch_scan import batch_scan_chart
from scaling_jax.report.chart import Chart, draw, save
from scaling_jax.report.critical_batch import critical_batch_chart
from scaling_jax.report.noise_over_training import noise_chart
from scaling_jax.report.pareto import pareto_chart
from scaling_jax.report.rate_search import best_rate, rate_search_chart
from scaling_jax.report.style import new_figure
from scaling_jax.report.three_measurements import three_measurements_chart
from scaling_jax.report.tradeoffs import residuals_chart, tradeoffs_chart

MODELS = ["1x16", "1x32"]


def line(axis, label):
    return next(artist for artist in axis.lines if str(artist.get_label()).startswith(label))


def test_loss_falls_from_left_to_right_on_log_axes(analysis):
    (axis,) = critical_batch_chart(analysis).figure.axes
    left, right = axis.get_xlim()
    assert left > right
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert axis.get_xlabel() == "test loss, nats per token"
    assert axis.get_ylabel() == "critical batch size, tokens"


def test_every_resolved_noise_scale_is_a_green_dot_and_every_model_a_line(analysis):
    (axis,) = critical_batch_chart(analysis).figure.axes
    dots = line(axis, "noise scale tr")
    assert sorted(dots.get_ydata()) == sorted(n.b_simple for n in analysis.noise)
    assert dots.get_color() == "#009E73"
    for model in MODELS:
        expected = [p.tradeoff.b_crit for p in analysis.fit.points if p.model == model]
        np.testing.assert_array_equal(line(axis, model).get_ydata(), expected)


def test_the_law_is_dashed_and_named_in_the_legend(analysis):
    (axis,) = critical_batch_chart(analysis).figure.axes
    law = line(axis, "$B_{crit}$")
    assert law.get_linestyle() == "--"
    assert "L^{-5.0}" in law.get_label()


def test_the_scan_has_a_panel_a_model_and_one_colour_bar(analysis, runs):
    axes = batch_scan_chart(analysis, runs, MODELS).figure.axes
    assert len(axes) == 3
    assert [axis.get_xlabel() for axis in axes[:2]] == ["optimizer steps"] * 2
    assert axes[2].get_ylabel() == "test loss, nats per token"


def test_residuals_are_measured_over_fitted_steps_for_each_batch(analysis):
    axes = residuals_chart(analysis, MODELS).figure.axes
    drawn = axes[0].lines[0]
    fit = analysis.fit.points[0].tradeoff
    np.testing.assert_allclose(drawn.get_xdata(), np.sort(fit.batch_tokens))
    fitted = fit.s_min * (1 + fit.b_crit / drawn.get_xdata())
    measured = fit.steps[np.argsort(fit.batch_tokens)]
    np.testing.assert_allclose(drawn.get_ydata(), 100 * (measured / fitted - 1), atol=1e-6)


def test_a_trade_offs_cross_lies_on_its_line_at_twice_the_fewest_steps(analysis):
    axis = tradeoffs_chart(analysis, ["1x16"]).figure.axes[0]
    crosses = [drawn for drawn in axis.lines if drawn.get_marker() == "x" and len(drawn.get_xdata())]
    points = [p for p in analysis.fit.points if p.model == "1x16" and p.in_law]
    assert len(crosses) == len(points)
    for cross, point in zip(crosses, points, strict=True):
        (b_crit,), (steps,) = cross.get_data()
        assert steps == pytest.approx(2 * point.tradeoff.s_min)
        assert point.tradeoff.steps_at(b_crit) == pytest.approx(steps)


def test_exact_measurements_lie_on_the_time_compute_curve(analysis):
    axis = pareto_chart(analysis).figure.axes[0]
    curve = axis.lines[0]
    np.testing.assert_allclose((curve.get_xdata() - 1) * (curve.get_ydata() - 1), 1)
    dots = [line for line in axis.lines if len(line.get_xdata()) == 7]
    assert len(dots) == len([p for p in analysis.fit.points if p.in_law])
    for drawn in dots:
        np.testing.assert_allclose((drawn.get_xdata() - 1) * (drawn.get_ydata() - 1), 1, rtol=0.6)


def test_branches_are_drawn_beside_the_scan_and_the_noise_scale(analysis):
    branches = [
        BranchMeasurement("1x32", 1_024, 0, 1e6, 2.4, 1_300.0, 900.0, np.inf),
        BranchMeasurement("other", 1, 0, 1.0, 2.0, 1.0, 1.0, 1.0),
    ]
    chart = three_measurements_chart(dataclasses.replace(analysis, branches=tuple(branches)), MODELS)
    first, second = chart.figure.axes
    np.testing.assert_array_equal(line(second, "$B_{crit}$, from branches").get_data(), [[2.4], [1_300]])
    assert not [drawn for drawn in first.lines if "branches" in str(drawn.get_label())]
    assert "B_crit 1.3k [900, ∞] tokens" in "".join(mark.text for mark in chart.marks)


def test_the_noise_scale_over_training_is_the_one_that_was_made(runs):
    axis = noise_chart(runs, ["1x16"]).figure.axes[0]
    drawn = [line.get_ydata() for line in axis.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 5]
    assert len(drawn) == 7  # batch sizes
    ends = [values[-1] for values in drawn]
    np.testing.assert_allclose(ends, 1e5 * 1.95**-5, rtol=0.2)  # made_up_scan's law near its lowest loss


def test_the_best_rate_is_ringed_and_one_at_the_edge_flagged(runs):
    group = next(r for r in runs if r.model == "1x16")
    target = len(group.group.subject.target_losses) // 2
    best = best_rate(group, target)
    assert not best.at_edge
    rule = group.group.subject.learning_rates.rate(group.batch_tokens, 0)
    assert best.learning_rate == rule
    cut = group._replace(tried=[t for t in group.tried if t.rate_index >= 0])
    assert best_rate(cut, target).at_edge
    colours = []
    for one in (group, cut):
        axis = rate_search_chart([one], ["1x16"]).figure.axes[0]
        ring = axis.lines[-1]
        assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([best.learning_rate], [best.steps])
        colours.append(ring.get_color())
    assert colours[0] != colours[1]


def test_marks_fall_on_their_points():
    figure, (axis,) = new_figure(width=4.0, height=3.0)
    axis.plot([1.0, 2.0, 3.0], [10.0, 1_000.0, 20.0], "o")
    axis.set_yscale("log")
    chart = Chart("one", "a <chart> & more", figure)
    chart.mark(axis, [1.0, 2.0, 3.0, 99.0], [10.0, 1_000.0, 20.0, 1.0], "abcd")
    drawn = draw(chart, "p")
    root = ET.fromstring(drawn.svg)
    assert root.get("viewBox") == "0 0 288 216"
    assert root.get("aria-label") == chart.caption
    dots = [
        (float(use.get("x")), float(use.get("y")))
        for use in root.iter("use")
        if "stroke: #1f77b4" in (use.get("style") or "")
    ]
    assert [text for _, _, text in drawn.marks] == ["a", "b", "c"]  # d lies outside of the figure
    np.testing.assert_allclose([mark[:2] for mark in drawn.marks], dots, atol=0.1)


@pytest.mark.parametrize("law", [True, False])
def test_every_axis_has_a_label(analysis, runs, law):
    if not law:
        fit = dataclasses.replace(analysis.fit, law=None, errors=None)
        analysis = dataclasses.replace(analysis, fit=fit, noise=[])
    for chart in (
        critical_batch_chart(analysis),
        three_measurements_chart(analysis, ["1x16"]),
        tradeoffs_chart(analysis, ["1x16"]),
        residuals_chart(analysis, ["1x16"]),
        pareto_chart(analysis),
        noise_chart(runs, ["1x16"]),
        rate_search_chart(runs, ["1x16"]),
    ):
        axis, *bars = chart.figure.axes
        assert axis.get_xlabel(), chart.name
        assert axis.get_ylabel(), chart.name
        assert all(bar.get_ylabel() for bar in bars), chart.name


def test_every_figure_is_a_png_and_an_svg_and_the_same_again(analysis, made_up, tmp_path):
    paths = write_figures(analysis, made_up[1])
    folder = paths[0].parent
    assert {path.name for path in folder.iterdir()} == {f"{p.stem}{kind}" for p in paths for kind in (".png", ".svg")}
    again = save(critical_batch_chart(analysis), tmp_path)
    for path in (again, again.with_suffix(".svg")):
        assert path.read_bytes() == (folder / path.name).read_bytes()
