"""The sections of the report: their text, tables and charts."""

import dataclasses
import importlib.metadata
import json
import math
import platform
import shlex
from collections.abc import Sequence

from markupsafe import Markup

from scaling_jax.io.config import to_dict
from scaling_jax.report.chart import Chart, draw
from scaling_jax.report.critical_batch import critical_batch_chart, three_measurements_chart
from scaling_jax.report.noise_charts import SingleRun, loss_chart, noise_by_layer_chart, noise_chart, run_near_b_crit
from scaling_jax.report.page import Section, bullets, charts, code, facts, folded, paragraph, table
from scaling_jax.report.scan_charts import (
    batch_scan_chart,
    best_rate,
    pareto_chart,
    rate_search_chart,
    residuals_chart,
    tradeoffs_chart,
)
from scaling_jax.report.spread_chart import law_spread_chart
from scaling_jax.report.units import chart_in_unit
from scaling_jax.report.words import ending, law_in_words, law_lines
from scaling_jax.report.words import short as tokens
from scaling_jax.results import Analysis, CellRuns, Results
from scaling_jax.results.measurements import some_losses
from scaling_jax.results.runs import few_enough, last_noise_scale
from scaling_jax.scanning import Experiment
from scaling_jax.scanning.experiment import DEMO, QUICK
from scaling_jax.scanning.tried import Tried
from scaling_jax.tasks import OtherModel, TaskModel

_NOISE_INTRO = (
    "The noise scale comes from the training steps themselves. A point is a window of steps; windows get longer during "
    "a run. Vertical lines are 95 % intervals. An open triangle is a lower bound: the noise scale is unresolved there."
)
_PACKAGES = ("scaling-jax", "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "matplotlib")
FINGERPRINT = (
    "source",
    "files",
    "bytes",
    "sha256",
    "held_out",
    "tokenizer",
    "tokenizer_sha256",
    "train_tokens",
    "test_tokens",
)


def sections(analysis: Analysis) -> list[Section]:
    """The sections of a scan's report. Each chart shows one model, so that it is readable on a phone."""
    runs, corpus = analysis.results.cells, analysis.results.runs[0].corpus
    drawn_runs = few_enough(runs)
    models = [subject.model.name for subject in analysis.experiment.subjects]

    def drawn(*made: Chart) -> Markup:
        unit = analysis.experiment.unit
        return charts(draw(chart_in_unit(chart, unit), f"{chart.name}-{k}") for k, chart in enumerate(made))

    near_b_crit = [run for model in models if (run := run_near_b_crit(analysis, model))]
    return [
        Section(
            "The law in words",
            paragraph(
                "At the critical batch size B_crit, a run needs twice the minimum number of steps and twice the "
                f"minimum number of tokens. Brackets are {100 * analysis.fit.confidence:.0f} % intervals."
            )
            + bullets(law_in_words(analysis))
            + drawn(critical_batch_chart(analysis), pareto_chart(analysis))
            + _spread(analysis),
        ),
        Section("Notes", bullets(analysis.notes) if analysis.notes else paragraph("None.")),
        Section(
            "The batch size scan",
            paragraph(
                "A dashed line is a run with one batch size; the colour of its points is the test loss. A solid line "
                "is the fit at one loss: it shows how many steps and tokens each batch size needs to reach this loss."
            )
            + drawn(*(batch_scan_chart(analysis, [model]) for model in models)),
        ),
        Section(
            "Three measurements",
            paragraph(_three_intro(analysis))
            + drawn(*(three_measurements_chart(analysis, [model]) for model in models))
            + three_table(analysis),
        ),
        Section(
            "The trade-off fits",
            paragraph(
                "At batch size B, a run needs S_min·(1 + (B_crit/B)^a) steps to a loss. A cross marks B_crit, at which "
                "it needs twice the minimum steps. With a = 1 this is a hyperbola, and a run at B_crit needs twice "
                "the minimum tokens, too. Only if all losses together reject that, a is free. The charts below show "
                "the residuals. A trend across batch sizes would show that the fit is wrong."
            )
            + drawn(*(tradeoffs_chart(analysis, [model]) for model in models))
            + drawn(*(residuals_chart(analysis, [model]) for model in models))
            + fits_table(analysis)
            + folded("Other forms of the law", bullets(law_lines(analysis.fit, analysis.joint, analysis.forms))),
        ),
        Section(
            "The noise scale over training",
            paragraph(_NOISE_INTRO)
            + drawn(*(noise_chart(drawn_runs, [model]) for model in models))
            + _by_layer_intro(near_b_crit)
            + drawn(*(noise_by_layer_chart([run]) for run in near_b_crit))
            if analysis.noise
            else paragraph("No run was measured."),
        ),
        Section(
            "The learning-rate search",
            paragraph(
                "Each batch size has its own best learning rate. If the best rate is the smallest or the largest of "
                "the rates tried, a better rate may lie beyond."
            )
            + drawn(*(rate_search_chart(drawn_runs, [model]) for model in models)),
        ),
        Section("Every run", runs_table(runs)),
        Section(
            "How to repeat this scan",
            code(command(analysis.experiment))
            + paragraph("The data and its fingerprint:")
            + facts({name.replace("_", " "): corpus[name] for name in FINGERPRINT if name in corpus})
            + paragraph("Versions with which this report was made:")
            + facts(versions())
            + folded("experiment.json", code(json.dumps(to_dict(analysis.experiment), indent=2))),
        ),
    ]


def run_sections(results: Results) -> list[Section]:
    """The sections of a report on single runs: the loss and the noise scale of each run."""
    runs = [SingleRun(record) for record in results.runs if len(record.course.eval_losses)]
    models = list(dict.fromkeys(run.model for run in runs))

    def drawn(*made: Chart) -> Markup:
        return charts(draw(chart, f"{chart.name}-{k}") for k, chart in enumerate(made))

    return [
        Section("The loss", drawn(*(loss_chart(runs, [model]) for model in models))),
        Section(
            "The noise scale over training",
            paragraph(_NOISE_INTRO) + drawn(*(noise_chart(runs, [model]) for model in models)),
        ),
        Section("Every run", _single_runs_table(results) + _narrow_intervals(results)),
        Section("Versions with which this report was made", facts(versions())),
    ]


def fits_table(analysis: Analysis) -> Markup:
    """The table of all trade-off fits."""
    rows = []
    for p in analysis.fit.points:
        t = p.tradeoff
        flags = ["one-sided"] * t.one_sided + ["not in the law"] * (not p.in_law)
        b_opt, b_opt_interval = tokens(t.shape.b_opt), _interval(*t.shape.b_opt_interval)
        flags += [f"U-shaped: B_opt {b_opt}, {b_opt_interval} tokens"] * (t.shape.u_shaped and not p.in_law)
        flags += [f"{p.not_reached} runs ended above the loss"] * bool(p.not_reached)
        values = (t.s_min, t.e_min, p.b_crit)
        interval = _interval(*p.b_crit_interval)
        shape = (f"{t.shape.a:.2f}", "–" if math.isnan(t.shape_p) else f"{t.shape_p:.2g}")
        slopes = "{:.2f}, {:.2f}".format(*t.end_slopes)
        measured = map(tokens, values)
        rows.append((p.model, f"{p.loss:.3f}", *measured, interval, tokens(t.cbs20), *shape, slopes, ", ".join(flags)))
    header = (
        "model",
        "loss",
        "S_min, steps",
        "E_min, tokens",
        "B_crit, tokens",
        "95 % interval",
        "CBS20, tokens",
        "shape a",
        "p of a = 1",
        "end slopes",
        "flags",
    )
    return table(header, rows)


def three_table(analysis: Analysis) -> Markup:
    """The table of noise scale, scan and branches at the losses of the scan."""
    rows = []
    for c in analysis.comparison:
        columns = [
            (c.local, c.local_low, c.local_high),
            (c.noise_scale, c.noise_scale_low, c.noise_scale_high),
            (c.scan, c.scan_low, c.scan_high),
            (c.branches, c.branches_low, c.branches_high),
        ]
        # Values over their intervals: four columns side by side would leave a phone's screen.
        cells = ["" if math.isnan(x) else f"{tokens(x)}\n{tokens(low)}–{tokens(high)}" for x, low, high in columns]
        rows.append((c.model, f"{c.loss:.3f}", *cells))
    header = (
        "model",
        "loss",
        "local\nB_crit,\ntokens",
        "noise\nscale,\ntokens",
        "B_crit\nfrom the\nstart",
        "B_crit by\nbranches",
    )
    return table(header, rows) if analysis.branches else table(header[:5], [row[:5] for row in rows])


def runs_table(runs: Sequence[CellRuns]) -> Markup:
    """The table of all runs."""
    rows = []
    for cell in runs:
        for tried in cell.tried:
            result = tried.result
            loss = "not finite" if result.test_loss is None else f"{result.test_loss:.4f}"
            rows.append(
                (
                    cell.model,
                    f"{cell.batch_tokens:,}",
                    cell.cell.seed,
                    f"{tried.run.learning_rate:.3g}",
                    f"{result.steps:,}",
                    tokens(result.tokens),
                    loss,
                    ending(tried.run, result),
                    _best_for(cell, tried),
                )
            )
    header = (
        "model",
        "batch, tokens",
        "seed",
        "learning rate",
        "steps",
        "tokens",
        "last test loss",
        "ended",
        "best rate for",
    )
    return table(header, rows)


def versions() -> dict[str, str]:
    """{name: version} of Python and of the packages that results depend on."""
    return {"Python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def command(experiment: Experiment) -> str:
    """The command that repeats a scan in a new folder; a scan that is no demo needs the report's experiment.json."""
    for demo, options in ((DEMO, ()), (QUICK, ("--quick",))):
        if dataclasses.replace(experiment, text=demo.text) == demo:
            text = () if experiment.text == demo.text else ("--text", experiment.text)
            return shlex.join(["scaling-jax", "demo", *options, *text, "--results", "again"])
    model = experiment.subjects[0].model
    if isinstance(model, TaskModel):
        return "scaling-jax scan YOUR_EXPERIMENT.py --results again"
    by = " --command '…'" if isinstance(model, OtherModel) else ""
    return f"scaling-jax scan experiment.json{by} --results again"


def _single_runs_table(results: Results) -> Markup:
    rows = []
    for record in results.runs:
        run, steps, result = record.run, int(record.course.line_steps.sum()), record.result
        loss = f"{record.course.eval_losses[-1]:.4f}" if len(record.course.eval_losses) else ""
        noise = last_noise_scale(record.course)
        scale = "" if noise is None else f"{tokens(noise.value)} [{tokens(noise.low)}, {tokens(noise.high)}]"
        ended = "not done" if result is None else ending(run, result)
        rate = f"{run.learning_rate:.3g}"
        rows.append((run.model.name, f"{run.batch_tokens:,}", run.seed, rate, f"{steps:,}", loss, scale, ended))
    header = (
        "model",
        "first batch, tokens",
        "seed",
        "learning rate",
        "steps",
        "last test loss",
        "noise scale at the end, tokens",
        "ended",
    )
    return table(header, rows)


def _best_for(cell: CellRuns, tried: Tried) -> str:
    """The target losses to which a run took the fewest steps of its cell: the best rate often depends on the loss."""
    targets = cell.subject.target_losses
    best = [best_rate(cell, k) for k in range(len(targets))]
    own = [
        (loss, found.at_edge)
        for loss, found in zip(targets, best, strict=True)
        if found is not None and found.learning_rate == tried.run.learning_rate
    ]
    if not own:
        return ""
    edge = ", at an edge of the rates" if any(at_edge for _, at_edge in own) else ""
    return some_losses([loss for loss, _ in own], len(targets)) + edge


def _narrow_intervals(results: Results) -> Markup:
    """One paragraph on the noise scales in the table whose interval may be too narrow."""
    ends = [(record.run_id, last_noise_scale(record.course)) for record in results.runs]
    warned = [f"{run_id}: {noise.warning}" for run_id, noise in ends if noise is not None and noise.warning]
    return paragraph(f"Noise scales at the end. {'. '.join(warned)}.") if warned else Markup()


def _three_intro(analysis: Analysis) -> str:
    said = (
        "The noise scale, which one run measures by itself, beside the local B_crit of the scan: that of the steps "
        "from one loss to the next. Both ask which batch is worthwhile for the next bit of loss. A dot is the noise "
        "scale of one run, with its 95 % interval. B_crit from the start is an average over the whole way, so it lags "
        "behind. In the table, an interval stands under each value: of B_crit the 95 % interval, of the noise scale "
        "the middle half of the runs; ∞ stands for unresolved."
    )
    if not analysis.branches:
        return f"{said} No branches were measured."
    fewest = min(branch.replicates for branch in analysis.branches)
    how = f"Squares are B_crit from branches of one run, with 95 % intervals over {fewest} or more replicates."
    if fewest < 2:  # version 0.1 took evaluations of one branch as independent
        how = (
            "Squares are B_crit from branches of one run. Some have one replicate, so their interval is too narrow "
            "or not bounded; the branch command trains more replicates."
        )
    return f"{said} {how}"


def _spread(analysis: Analysis) -> Markup:
    chart = law_spread_chart(analysis)
    if chart is None:
        return Markup()
    return paragraph(
        "How far does the exponent move if a part of the data is left out, or if B_crit diverges at a loss L_inf above "
        "0? A law to trust stays inside its interval, which is shaded."
    ) + (
        charts([draw(chart_in_unit(chart, analysis.experiment.unit), chart.name)])
        + folded("The exponent and B_crit of each part", spread_table(analysis))
    )


def spread_table(analysis: Analysis) -> Markup:
    """The table of the laws with parts of the data, and of the floors that fit about as well."""
    fit, rows = analysis.fit, []
    for name, law in (("from the start", fit.law), ("local", None if fit.local is None else fit.local.law)):
        if law is None:
            continue
        middle = math.sqrt(math.prod(law.loss_range))
        rows.append((name, "all data", f"{law.exponent:.2f}", tokens(law(middle)), f"{middle:.3f}"))
        rows += [
            (name, part.kept, f"{part.exponent:.2f}", tokens(part.b_crit), f"{middle:.3f}") for part in law.systematic
        ]
    whole = "from the start" if fit.table_of_law is not None else "local"
    for floor, exponent in (floor for form in analysis.forms for floor in form.floors[1:]):
        rows.append((whole, f"of L - {floor:.2f}", f"{exponent:.2f}", "", ""))
    return table(("B_crit", "fitted", "exponent", "tokens", "at loss"), rows)


def _by_layer_intro(runs: Sequence[CellRuns]) -> Markup:
    if not runs:
        return Markup()
    return paragraph(
        "The next charts show the noise scale of each part of the model, at the batch size nearest to the median "
        "B_crit. They leave out windows in which it is unresolved. tr(Σ) and |G|² of the whole model are the sums over "
        "its parts."
    )


def _interval(low: float, high: float) -> str:
    return f"{tokens(low)} – {tokens(high)}"
