import csv
import dataclasses
import json
import xml.etree.ElementTree as ET

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from scaling_jax.io import UserError
from scaling_jax.report import draw_figure, write_figures
from scaling_jax.report.chart import Chart, draw, new_figure, save
from scaling_jax.report.critical_batch import critical_batch_chart, three_measurements_chart
from scaling_jax.report.figures import FIGURES
from scaling_jax.report.noise_charts import SingleRun, loss_chart, noise_by_layer_chart, noise_chart, run_near_b_crit
from scaling_jax.report.scan_charts import (
    batch_scan_chart,
    best_rate,
    pareto_chart,
    rate_search_chart,
    residuals_chart,
    tradeoffs_chart,
)
from scaling_jax.results.branches import BranchMeasurement
from scaling_jax.results.runs import part_windows, ratio_of_means
from scaling_jax.tasks import OtherModel
from scaling_jax.training import read_metrics, run_folder
from scaling_jax.training.metrics import MetricsLine, course
from scaling_jax.training.records import write_metrics
from tests.made_up_scan import PART_GRAD_SHARES, PART_NOISE_SHARES

MODELS = ["1x16", "1x32"]


def without_noise(analysis):
    """The same with no noise scale measured."""
    results = dataclasses.replace(analysis.results)
    vars(results)["noise_scale"] = []  # what is computed once is kept there
    return dataclasses.replace(analysis, results=results)


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


def test_the_scan_has_a_panel_a_model_and_one_colour_bar(analysis):
    axes = batch_scan_chart(analysis, MODELS).figure.axes
    assert len(axes) == 3
    assert [axis.get_xlabel() for axis in axes[:2]] == ["optimizer steps"] * 2
    assert axes[2].get_ylabel() == "test loss, nats per token"


def test_each_run_of_the_scan_says_its_batch_size_where_it_starts_and_nothing_covers_the_curves(analysis):
    figure = batch_scan_chart(analysis, MODELS).figure
    for axis in figure.axes[:2]:
        assert [text.get_text() for text in axis.texts] == [f"{2**k:,}" for k in range(7, 14)]
        assert axis.get_legend() is None
    assert len(figure.legends) == 1


def test_labels_of_costs_keep_apart_from_each_other_and_from_the_points(analysis):
    figure = pareto_chart(analysis).figure
    figure.draw_without_rendering()
    axis = figure.axes[0]
    boxes = [Text.get_window_extent(text) for text in axis.texts]  # without their arrows
    assert len(boxes) == 7
    assert not [1 for k, a in enumerate(boxes) for b in boxes[k + 1 :] if a.overlaps(b)]
    curve = axis.transData.transform(np.transpose(axis.lines[0].get_data()))
    assert not [1 for box in boxes for x, y in curve if box.contains(x, y)]


def test_lines_of_noise_scales_break_where_it_is_unresolved(runs):
    run = next(r for r in runs if r.model == "1x16")
    windows = list(run.record.noise)
    windows[3] = windows[3]._replace(noise=dataclasses.replace(windows[3].noise, resolved=False))
    record = dataclasses.replace(run.record)
    record.__dict__["noise"] = windows
    figure = noise_chart([run._replace(record=record)], ["1x16"]).figure
    (drawn,) = [x.get_ydata() for x in figure.axes[0].lines if x.get_linestyle() == "-" and len(x.get_xdata()) > 5]
    assert np.flatnonzero(np.isnan(drawn)).tolist() == [3]
    assert figure.axes[0].get_legend() is None
    assert len(figure.legends) == 1


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
    results = dataclasses.replace(analysis.results, branches=tuple(branches))
    chart = three_measurements_chart(dataclasses.replace(analysis, results=results), MODELS)
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


def test_the_noise_scale_by_layer_is_the_one_that_was_made_at_the_batch_next_to_b_crit(analysis, runs):
    run = run_near_b_crit(analysis, "1x16")
    distances = np.abs(np.log([r.batch_tokens for r in runs]) - np.log(np.median(fitted_b_crits(analysis))))
    assert abs(np.log(run.batch_tokens) - np.log(np.median(fitted_b_crits(analysis)))) == distances.min()
    chart = noise_by_layer_chart([run])
    (axis,) = chart.figure.axes
    whole = line(axis, "whole model")
    for part, ratio in zip(("embedding", "layer 1", "unembedding"), PART_NOISE_SHARES / PART_GRAD_SHARES, strict=True):
        at, value = line(axis, part).get_data()
        assert len(at) >= 8
        expected = np.interp(np.log(at), np.log(whole.get_xdata()), np.log(whole.get_ydata()))
        np.testing.assert_allclose(np.log(value), expected + np.log(ratio), atol=0.15)
    assert any(mark.text.startswith(f"{run.name}, layer 1\nby ") for mark in chart.marks)


def test_the_whole_model_lies_between_its_parts_in_their_own_windows_with_intervals(analysis):
    """Its noise scale grows a thousandfold, so windows that differ would put it outside of all of its parts."""
    num_steps = np.full(60, 8)
    noise_scale = np.geomspace(1e2, 1e5, 60)[:, None]
    noisy = 1 + 0.05 * np.random.default_rng(0).standard_normal((60, 3))
    moments = np.full((60, 3), 1.0) * noisy, noise_scale * np.array([0.8, 1.0, 1.2]) * noisy[::-1]
    lines = lines_by_part(num_steps, moments)
    run = run_near_b_crit(analysis, "1x16")
    record = dataclasses.replace(run.record, course=course(lines))
    (axis,) = noise_by_layer_chart([run._replace(record=record)]).figure.axes
    whole, parts = line(axis, "whole model"), [line(axis, part) for part in record.noise_by_part]
    for part in parts:
        np.testing.assert_array_equal(part.get_xdata(), whole.get_xdata())
    values = np.array([part.get_ydata() for part in parts])
    assert len(whole.get_ydata()) >= 7
    assert np.all(values.min(0) <= whole.get_ydata())
    assert np.all(whole.get_ydata() <= values.max(0))
    assert len(axis.containers) == 4  # error bars: three parts and the whole
    for window in record.noise_of_all_parts:
        assert window.low < window.value < window.high


def fitted_b_crits(analysis):
    return [p.tradeoff.b_crit for p in analysis.fit.points if p.model == "1x16"]


def lines_by_part(num_steps, moments_of_parts):
    """A run's lines from each line's |G|² and tr(Σ) of its parts [lines, parts], at 64 and 128 tokens."""
    grad_sq_norm, trace_cov = moments_of_parts
    lines, last = [], 0
    for k, steps in enumerate(num_steps.tolist()):
        last += steps
        values = {"step": last, "tokens": 128 * last, "batch_tokens": 128, "small_batch_tokens": 64}
        values |= {name: [1.0] * steps for name in ("train_loss", "small_sq_norm", "big_sq_norm")}
        for size, tokens in (("small", 64), ("big", 128)):
            values[f"{size}_sq_norm_by_layer"] = (grad_sq_norm[k] + trace_cov[k] / tokens).tolist()
        lines.append(MetricsLine.read(values))
    return lines


def test_parts_that_drown_in_noise_are_left_out_and_old_results_have_no_chart(analysis):
    draws = np.random.default_rng(0)
    num_steps, clean = draws.integers(1, 30, 60), 1 + 0.01 * draws.standard_normal(60)
    drowned = draws.standard_normal(60) / np.sqrt(num_steps)
    moments = np.stack([clean, drowned, clean], 1), np.full((60, 3), 64.0)
    lines = lines_by_part(num_steps, moments)
    found = part_windows(course(lines))
    assert [len(windows) for windows in found.values()] == [7, 0, 7]
    np.testing.assert_allclose([w.value for w in found["embedding"]], 64, rtol=0.02)  # tokens
    run = run_near_b_crit(analysis, "1x16")
    measured = dataclasses.replace(run.record, course=course(lines))
    (axis,) = noise_by_layer_chart([run._replace(record=measured)]).figure.axes
    assert len(line(axis, "embedding").get_xdata()) == 7
    assert not len(line(axis, "layer 1").get_xdata())
    old = [
        dataclasses.replace(r, course=r.course._replace(small_sq_norm_by_part=None, big_sq_norm_by_part=None))
        for r in analysis.results.runs
    ]
    results = dataclasses.replace(analysis.results, runs=tuple(old))
    assert run_near_b_crit(dataclasses.replace(analysis, results=results), "1x16") is None


def test_parts_of_a_task_have_its_names_and_a_colour_each(analysis):
    draws = np.random.default_rng(0)
    lines = lines_by_part(
        draws.integers(1, 30, 60), (1 + 0.01 * draws.standard_normal((60, 2)), np.full((60, 2), 64.0))
    )
    run = run_near_b_crit(analysis, "1x16")
    task = dataclasses.replace(run.record, course=course(lines), corpus={"parts": ["hidden", "out"]})
    (axis,) = noise_by_layer_chart([run._replace(record=task)]).figure.axes
    assert line(axis, "hidden").get_color() != line(axis, "out").get_color()
    for damaged in (["hidden"], 5, {"a": 1}, ["x", "x"]):
        assert list(part_windows(course(lines), damaged)) == ["part 1", "part 2"]


def test_intervals_of_means_over_unequal_numbers_of_steps_cover():
    """In 19 cases of 20, where steps are independent."""
    draws, num_steps, cases = np.random.default_rng(1), np.array([1, 2, 3, 5, 8, 13, 21, 34]), 2_000
    covered = 0
    for _ in range(cases):
        line_g2, line_tr = draws.standard_normal((2, 8)) / np.sqrt(num_steps)
        _, low, high = ratio_of_means(num_steps, 2 + line_g2, 6 + line_tr + line_g2)
        covered += low <= 3 <= high
    assert covered / cases == pytest.approx(0.95, abs=3 * np.sqrt(0.05 * 0.95 / cases))


@pytest.mark.parametrize("damage", [[1.0], "x", [[1.0], 2.0, 3.0]])
@pytest.mark.parametrize("both", [True, False])
def test_damaged_norms_by_layer_are_named(made_up, tmp_path, damage, both):
    run = made_up[0].run(made_up[0].cells[0], 0)
    path = tmp_path / "metrics.jsonl"
    sound = (run_folder(made_up[1], run) / "metrics.jsonl").read_text().splitlines()
    damaged = json.loads(sound[-1]) | {"big_sq_norm_by_layer": damage}
    if both:
        damaged["small_sq_norm_by_layer"] = damage
    path.write_text("\n".join([*sound[:-1], json.dumps(damaged), ""]))
    with pytest.raises(UserError, match=rf"metrics\.jsonl line {len(sound)} is damaged .*remove"):
        read_metrics(tmp_path)


def test_a_run_whose_first_line_lacks_norms_by_layer_has_none(made_up, tmp_path):
    """By an older version."""
    first, *later = read_metrics(run_folder(made_up[1], made_up[0].run(made_up[0].cells[0], 0)))
    first = dataclasses.replace(first, small_sq_norm_by_part=None, big_sq_norm_by_part=None)
    write_metrics(tmp_path, [first, *later])
    assert part_windows(course(read_metrics(tmp_path))) == {}


def test_the_best_rate_is_ringed_and_one_at_the_edge_flagged(runs):
    cell = next(r for r in runs if r.model == "1x16")
    target = len(cell.subject.target_losses) // 2
    best = best_rate(cell, target)
    assert not best.at_edge
    rule = cell.subject.learning_rates.rate(cell.batch_tokens, 0)
    assert best.learning_rate == rule
    cut = cell._replace(tried=[t for t in cell.tried if t.run.learning_rate >= rule])
    assert best_rate(cut, target).at_edge
    colours = []
    for one in (cell, cut):
        axis = rate_search_chart([one], ["1x16"]).figure.axes[0]
        ring = axis.lines[-1]
        assert (list(ring.get_xdata()), list(ring.get_ydata())) == ([best.learning_rate], [best.steps])
        colours.append(ring.get_color())
    assert colours[0] != colours[1]


def test_single_runs_are_drawn_with_their_losses_and_their_noise_scale(analysis):
    runs = [SingleRun(record) for record in analysis.results.runs if record.run.model.name == "1x16"]
    axis = loss_chart(runs, ["1x16"]).figure.axes[0]
    for drawn, run in zip(axis.lines, runs, strict=True):
        course = run.record.course
        np.testing.assert_array_equal(drawn.get_data(), [course.eval_tokens, course.eval_losses])
    axis = noise_chart(runs, ["1x16"]).figure.axes[0]
    drawn = [line.get_ydata() for line in axis.lines if line.get_linestyle() == "-" and len(line.get_xdata()) > 5]
    assert len(drawn) == len(runs)


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
        analysis = without_noise(dataclasses.replace(analysis, fit=fit))
    for chart in (
        critical_batch_chart(analysis),
        three_measurements_chart(analysis, ["1x16"]),
        tradeoffs_chart(analysis, ["1x16"]),
        residuals_chart(analysis, ["1x16"]),
        pareto_chart(analysis),
        noise_chart(runs, ["1x16"]),
        noise_by_layer_chart([run_near_b_crit(analysis, "1x16")]),
        rate_search_chart(runs, ["1x16"]),
        loss_chart([SingleRun(analysis.results.runs[0])], ["1x16"]),
    ):
        axis, *bars = chart.figure.axes
        assert axis.get_xlabel(), chart.name
        assert axis.get_ylabel(), chart.name
        assert all(bar.get_ylabel() for bar in bars), chart.name


def test_every_figure_is_a_png_an_svg_and_a_csv_and_the_same_again(analysis, made_up, tmp_path):
    paths = write_figures(analysis, made_up[1])
    folder = paths[0].parent
    kinds = (".png", ".svg", ".csv")
    assert {path.name for path in folder.iterdir()} == {f"{p.stem}{kind}" for p in paths for kind in kinds}
    again = save(critical_batch_chart(analysis), tmp_path)
    for path in map(again.with_suffix, kinds):
        assert path.read_bytes() == (folder / path.name).read_bytes()


def test_the_data_of_a_figure_lie_beside_it_with_their_intervals(analysis, tmp_path):
    chart = critical_batch_chart(analysis)
    save(chart, tmp_path)
    with (tmp_path / "critical_batch_size.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(chart.marks)
    for point in (p for p in analysis.fit.points if p.shown):
        (row,) = [r for r in rows if r["point"].startswith(f"{point.model}, loss {point.loss:.3f} B_crit")]
        found = [float(row[name]) for name in ("x", "y", "low", "high")]
        np.testing.assert_allclose(found, [point.loss, point.b_crit, *point.b_crit_interval], rtol=1e-9)
        assert row["x_axis"] == "test loss, nats per token"
        assert row["y_axis"] == "critical batch size, tokens"


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_drawn_into_axes_of_the_caller(name, analysis):
    own = draw_figure(analysis, name)
    panels = [axis for axis in own.axes if axis.get_label() != "<colorbar>"]
    figure = Figure()
    mine, *axes = figure.subplots(1, 1 + len(panels))
    mine.set_title("a word on tokens")
    given = axes if len(axes) > 1 else axes[0]
    assert draw_figure(analysis, name, given) is figure
    for axis, panel in zip(axes, panels, strict=True):
        assert len(axis.lines) == len(panel.lines) > 0
        assert axis.get_xlabel() == panel.get_xlabel()
        assert axis.get_ylim() == panel.get_ylim()
    assert not mine.lines
    assert not figure.legends  # no room was kept outside


def test_a_figure_is_drawn_into_a_subfigure_for_some_models(analysis):
    figure = Figure(layout="constrained")
    left, right = figure.subfigures(1, 2)
    assert draw_figure(analysis, "residuals", left, models=["1x32", "1x16"]) is left
    draw_figure(analysis, "three_measurements", right, models=["1x32"])
    assert [axis.get_title(loc="left") for axis in left.axes[:2]] == ["1x32", "1x16"]
    assert [axis.get_title(loc="left") for axis in right.axes] == ["1x32"]
    assert len(right.legends) == 1
    save(Chart("both", "", figure), analysis.results.folder)


def test_the_words_of_the_caller_stay_when_the_unit_is_another(analysis):
    model = OtherModel("1x16", 10, unit="images")
    experiment = analysis.experiment
    subjects = (dataclasses.replace(experiment.subjects[0], model=model),)
    results = dataclasses.replace(analysis.results, experiment=dataclasses.replace(experiment, subjects=subjects))
    other = dataclasses.replace(analysis, results=results)
    mine, theirs = Figure().subplots(1, 2)
    mine.set_title("a word on tokens")
    draw_figure(other, "tradeoff_fits", theirs)
    assert mine.get_title() == "a word on tokens"
    assert theirs.get_xlabel() == "batch size, images"


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("no_such", {}, "no figure 'no_such': choose from critical_batch_size"),
        ("residuals", {"models": ["other"]}, "no model 'other': choose from 1x16, 1x32"),
        ("residuals", {"into": Figure().subplots()}, "needs 2 axes, one for each panel, but was given 1"),
    ],
)
def test_a_figure_that_cannot_be_drawn_is_refused(name, options, says, analysis):
    with pytest.raises(UserError, match=says):
        draw_figure(analysis, name, **options)
