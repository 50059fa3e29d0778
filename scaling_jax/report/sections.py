"""What the report says, section by section."""

import json
import math
from typing import Any

from scaling_jax.analysis import Analysis
from scaling_jax.analysis.numbers import short as tokens
from scaling_jax.analysis.table_fit import law_lines
from scaling_jax.config import to_dict
from scaling_jax.report.batch_scan import batch_scan_chart
from scaling_jax.report.chart import Chart, draw
from scaling_jax.report.critical_batch import critical_batch_chart
from scaling_jax.report.noise_by_layer import noise_by_layer_chart, run_near_b_crit
from scaling_jax.report.noise_over_training import noise_chart
from scaling_jax.report.page import Section, bullets, charts, code, facts, folded, paragraph, table
from scaling_jax.report.pareto import pareto_chart
from scaling_jax.report.provenance import command
from scaling_jax.report.rate_search import best_rate, rate_search_chart
from scaling_jax.report.runs import GroupRuns
from scaling_jax.report.three_measurements import three_measurements_chart
from scaling_jax.report.tradeoffs import residuals_chart, tradeoffs_chart
from scaling_jax.report.words import law_in_words

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


def sections(
    analysis: Analysis,
    runs: list[GroupRuns],
    corpus: dict[str, Any],
    versions: dict[str, str],
) -> list[Section]:
    """The whole report; charts come a model each, so that they are readable on a phone."""
    models = [subject.model.name for subject in analysis.experiment.subjects]

    def drawn(*made: Chart) -> str:
        return charts(draw(chart, f"{chart.name}-{k}") for k, chart in enumerate(made))

    near_b_crit = [run for model in models if (run := run_near_b_crit(analysis, runs, model))]
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
            + drawn(*(batch_scan_chart(analysis, runs, [model]) for model in models)),
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
            paragraph(
                "Measured inside the training step, in windows that grow with the run; whiskers are 95 % intervals."
            )
            + drawn(*(noise_chart(runs, [model]) for model in models))
            + _by_layer_intro(near_b_crit)
            + drawn(*(noise_by_layer_chart([run]) for run in near_b_crit)),
        ),
        Section(
            "The learning-rate search",
            paragraph(
                "Every batch size was given a learning rate of its own. Where the best one of those tried is the "
                "largest or the smallest, a better one may lie beyond."
            )
            + drawn(*(rate_search_chart(runs, [model]) for model in models)),
        ),
        Section("Every run", runs_table(runs)),
        Section(
            "How to make it again",
            code(command(analysis.experiment))
            + paragraph("The text, and its fingerprint:")
            + facts({name.replace("_", " "): corpus[name] for name in FINGERPRINT if name in corpus})
            + paragraph("Versions where this report was made:")
            + facts(versions)
            + folded("experiment.json", code(json.dumps(to_dict(analysis.experiment), indent=2))),
        ),
    ]


def fits_table(analysis: Analysis) -> str:
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


def three_table(analysis: Analysis) -> str:
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


def runs_table(runs: list[GroupRuns]) -> str:
    """Every run, with how it ended."""
    rows = []
    for group in runs:
        lowest = best_rate(group, -1)
        for tried in group.tried:
            best = lowest is not None and tried.run.learning_rate == lowest.learning_rate
            result = tried.result
            loss = "not finite" if result.test_loss is None else f"{result.test_loss:.4f}"
            rows.append(
                (
                    group.model,
                    f"{group.batch_tokens:,}",
                    group.group.seed,
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


def _three_intro(analysis: Analysis) -> str:
    said = (
        "What one run measures by itself (the noise scale, a dot for each run with its 95 % interval; ∞ in the table "
        "where it is unresolved) beside what the scan found at the same losses"
    )
    return (
        f"{said}, and what branches of one run found." if analysis.branches else f"{said}. No branches were measured."
    )


def _by_layer_intro(runs: list[GroupRuns]) -> str:
    if not runs:
        return ""
    return paragraph(
        "Below, the same by part of the model, for the batch size next to the median B_crit; windows in which a part's "
        "|G|² can't be told from zero are left out. The whole model's tr(Σ) and |G|² are the sums of the parts'."
    )


def _interval(low: float, high: float) -> str:
    return f"{tokens(low)} – {tokens(high)}"
