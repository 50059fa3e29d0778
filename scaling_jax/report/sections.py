"""What the report says, section by section."""

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
from scaling_jax.report.words import law_in_words, law_lines
from scaling_jax.report.words import short as tokens
from scaling_jax.results import Analysis, CellRuns, Results
from scaling_jax.results.runs import few_enough, last_noise_scale
from scaling_jax.scanning import Experiment
from scaling_jax.scanning.experiment import DEMO, QUICK

_NOISE_INTRO = "Measured inside the training step, in windows that grow with the run; whiskers are 95 % intervals."
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
    """The whole report; charts come a model each, so that they are readable on a phone."""
    runs, corpus = analysis.results.cells, analysis.results.runs[0].corpus
    drawn_runs = few_enough(runs)
    models = [subject.model.name for subject in analysis.experiment.subjects]

    def drawn(*made: Chart) -> Markup:
        return charts(draw(chart, f"{chart.name}-{k}") for k, chart in enumerate(made))

    near_b_crit = [run for model in models if (run := run_near_b_crit(analysis, model))]
    return [
        Section(
            "The law in words",
            paragraph(
                "A batch is critical at which a run takes twice the fewest steps possible and twice the fewest tokens. "
                f"Brackets hold {100 * analysis.fit.confidence:.0f} % intervals."
            )
            + bullets(law_in_words(analysis))
            + drawn(critical_batch_chart(analysis), pareto_chart(analysis)),
        ),
        Section("What was flagged", bullets(analysis.notes) if analysis.notes else paragraph("Nothing.")),
        Section(
            "The batch size scan",
            paragraph(
                "Along a dashed line a run of one batch size goes on, its colour the test loss. A solid line joins "
                "what different batch sizes need to get to one loss, as fitted: few steps and many tokens, or the "
                "reverse."
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
                "Steps to a loss are S_min·(1 + B_crit/B) at batch size B. A cross marks B_crit, where a run takes "
                "twice the fewest steps and twice the fewest tokens. Below, what the fits leave over: a trend across "
                "batch sizes would be a misfit, not noise."
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
            + drawn(*(noise_by_layer_chart([run]) for run in near_b_crit)),
        ),
        Section(
            "The learning-rate search",
            paragraph(
                "Every batch size was given a learning rate of its own. Where the best one of those tried is the "
                "largest or the smallest, a better one may lie beyond."
            )
            + drawn(*(rate_search_chart(drawn_runs, [model]) for model in models)),
        ),
        Section("Every run", runs_table(runs)),
        Section(
            "How to make it again",
            code(command(analysis.experiment))
            + paragraph("The text, and its fingerprint:")
            + facts({name.replace("_", " "): corpus[name] for name in FINGERPRINT if name in corpus})
            + paragraph("Versions where this report was made:")
            + facts(versions())
            + folded("experiment.json", code(json.dumps(to_dict(analysis.experiment), indent=2))),
        ),
    ]


def run_sections(results: Results) -> list[Section]:
    """What there is to show of runs that are no scan: how each went, and its noise scale."""
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
        Section("Every run", _single_runs_table(results)),
        Section("Where this report was made", facts(versions())),
    ]


def fits_table(analysis: Analysis) -> Markup:
    """Every trade-off fit."""
    rows = []
    for p in analysis.fit.points:
        t = p.tradeoff
        flags = ["one-sided"] * t.one_sided + ["not in the law"] * (not p.in_law)
        flags += [f"{p.not_reached} didn't get there"] * bool(p.not_reached)
        values = (t.s_min, t.e_min, t.b_crit)
        interval = _interval(*t.b_crit_interval)
        rows.append((p.model, f"{p.loss:.3f}", *map(tokens, values), interval, tokens(t.cbs20), ", ".join(flags)))
    header = (
        "model",
        "loss",
        "S_min, steps",
        "E_min, tokens",
        "B_crit, tokens",
        "95 % interval",
        "CBS20, tokens",
        "flags",
    )
    return table(header, rows)


def three_table(analysis: Analysis) -> Markup:
    """The measurements at the losses of the scan; a noise scale's range is the middle half of its runs."""
    rows = []
    for c in analysis.comparison:
        noise = ("", "")
        if not math.isnan(c.noise_scale):
            noise = tokens(c.noise_scale), _interval(c.noise_scale_low, c.noise_scale_high)
        branch = ("", "")
        if not math.isnan(c.branches):
            branch = tokens(c.branches), _interval(c.branches_low, c.branches_high)
        scan = tokens(c.scan), _interval(c.scan_low, c.scan_high)
        rows.append((c.model, f"{c.loss:.3f}", *noise, *scan, *branch))
    header = ("model", "loss", "noise scale, tokens", "middle half", "B_crit by scan, tokens", "95 % interval")
    if not analysis.branches:
        return table(header, [row[:6] for row in rows])
    return table((*header, "B_crit by branches, tokens", "interval"), rows)


def runs_table(runs: Sequence[CellRuns]) -> Markup:
    """Every run, with how it ended."""
    rows = []
    for cell in runs:
        lowest = best_rate(cell, -1)
        for tried in cell.tried:
            best = lowest is not None and tried.run.learning_rate == lowest.learning_rate
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
                    result.status,
                    ("best, at an edge" if lowest is not None and lowest.at_edge else "best") if best else "",
                )
            )
    header = ("model", "batch, tokens", "seed", "learning rate", "steps", "tokens", "last test loss", "ended", "")
    return table(header, rows)


def _single_runs_table(results: Results) -> Markup:
    rows = []
    for record in results.runs:
        run, steps, result = record.run, int(record.course.line_steps.sum()), record.result
        loss = f"{record.course.eval_losses[-1]:.4f}" if len(record.course.eval_losses) else ""
        noise = last_noise_scale(record.course)
        scale = "" if noise is None else f"{tokens(noise.value)} [{tokens(noise.low)}, {tokens(noise.high)}]"
        ended = "not done" if result is None else result.status
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


def _three_intro(analysis: Analysis) -> str:
    said = (
        "What one run measures by itself (the noise scale, a dot for each run with its 95 % interval; ∞ in the table "
        "where it is unresolved) beside what the scan found at the same losses"
    )
    return (
        f"{said}, and what branches of one run found." if analysis.branches else f"{said}. No branches were measured."
    )


def _by_layer_intro(runs: Sequence[CellRuns]) -> Markup:
    if not runs:
        return Markup()
    return paragraph(
        "Below, the same by part of the model, for the batch size next to the median B_crit; windows in which a part's "
        "|G|² can't be told from zero are left out. The whole model's tr(Σ) and |G|² are the sums of the parts'."
    )


def _interval(low: float, high: float) -> str:
    return f"{tokens(low)} – {tokens(high)}"


def versions() -> dict[str, str]:
    """Of Python and of the packages that results depend on, here and now."""
    return {"Python": platform.python_version()} | {name: importlib.metadata.version(name) for name in _PACKAGES}


def command(experiment: Experiment) -> str:
    """What makes the same results in a new folder, from anywhere that holds the report's experiment.json."""
    for demo, options in ((DEMO, ()), (QUICK, ("--quick",))):
        if dataclasses.replace(experiment, text=demo.text) == demo:
            text = () if experiment.text == demo.text else ("--text", experiment.text)
            return shlex.join(["scaling-jax", "demo", *options, *text, "--results", "again"])
    return "scaling-jax scan experiment.json --results again"
