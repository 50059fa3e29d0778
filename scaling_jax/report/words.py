"""Results in words: numbers as tables and sentences show them, the law in a line or in sentences."""

import math

import numpy as np

from scaling_jax.fitting import CriticalBatch, FormFit, JointFit, LossLaw, ScanFit
from scaling_jax.results import Analysis


def short(value: float) -> str:
    """Three significant digits, with k, M and G; NaN is what measurements couldn't resolve."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "unresolved"
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Two digits or more, in the largest unit that fits."""
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def clock(seconds: float) -> str:
    """0:09, 12:34 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def law_lines(fit: ScanFit, joint: JointFit | None, forms: tuple[FormFit, ...]) -> list[str]:
    """The laws in sentences, or that there is none."""
    law = fit.law
    if law is None:
        return ["No law: batches should lie on both sides of B_crit at three losses or more."]
    lines = [
        f"{_law(law)}, for losses {law.loss_range[1]:.4g} to {law.loss_range[0]:.4g} (nats per token), "
        "outside of which it is untested"
    ]
    if joint is not None and joint.law is not None:
        lines.append(f"from all runs at once: {_law(joint.law)}")
    for form in forms:
        floor = f" - {form.floor:.3g}" if form.floor else ""
        low, high = form.valid_range
        lines.append(
            f"form {form.form}: {form.constant:.3g} tokens · (x{floor})^{form.exponent:.2f}, x = {form.variable}, "
            f"{short(low)}–{short(high)}; held-out error {form.held_out_error:.1%}, criterion {form.criterion:.1f}"
        )
    return lines


def law_in_words(analysis: Analysis) -> list[str]:
    """What batch is critical at three losses, what more or less than that costs, and how far the law reaches."""
    law = analysis.fit.law
    if law is None:
        return [
            f"No law could be fitted: {analysis.fit.notes[-1]}.",
            *(_point(p) for p in analysis.fit.points if p.in_law and not p.tradeoff.one_sided),
        ]
    high, low = max(law.loss_range), min(law.loss_range)
    losses = (high, math.sqrt(high * low), low)
    below, above = analysis.fit.band(np.array(losses))
    sentences = [
        f"At a loss of {loss:.2f} nats per token, a batch of {short(law(loss))} [{short(a)}, {short(b)}] tokens is "
        "critical."
        for loss, a, b in zip(losses, below, above, strict=True)
    ]
    growth = sorted(0.9**x for x in law.exponent_interval)
    sentences.append(
        f"The law is B_crit = {law.b_star:.3g} tokens · L^{law.exponent:.2f}, the exponent's interval "
        f"[{law.exponent_interval[0]:.2f}, {law.exponent_interval[1]:.2f}]: each 10 % off the loss makes the critical "
        f"batch {0.9**law.exponent:.2f} [{growth[0]:.2f}, {growth[1]:.2f}] times as large. It was measured from "
        f"{high:.2f} down to {low:.2f}; outside of that it is a guess."
    )
    lowest = min((p for p in analysis.fit.points if p.in_law), key=lambda p: p.loss)
    sentences.append(_cost(lowest))
    if math.isfinite(analysis.noise_ratio):
        sentences.append(
            f"The noise scale, which any single run can measure as it trains, is {analysis.noise_ratio:.2f} times "
            "B_crit in the median over these losses."
        )
    return sentences


def _point(point: CriticalBatch) -> str:
    low, high = point.tradeoff.b_crit_interval
    return (
        f"At a loss of {point.loss:.2f} nats per token, a batch of {short(point.tradeoff.b_crit)} "
        f"[{short(low)}, {short(high)}] tokens is critical for {point.model}."
    )


def _cost(point: CriticalBatch) -> str:
    fit = point.tradeoff
    steps = [f"{fit.steps_at(factor * fit.b_crit):,.0f}" for factor in (0.25, 1, 4)]
    spent = [short(fit.tokens_at(factor * fit.b_crit)) for factor in (0.25, 1, 4)]
    return (
        f"What that means for {point.model} at a loss of {point.loss:.2f}, where its own fit has B_crit at "
        f"{short(fit.b_crit)} tokens: that batch takes {steps[1]} steps and {spent[1]} tokens, twice the fewest of "
        f"each. At 4 times that batch you pay 2.5 times the tokens ({spent[2]}) to save 38 % of the steps "
        f"({steps[2]} remain); at a quarter of it you pay 2.5 times the steps ({steps[0]}) to save 38 % of the tokens "
        f"({spent[0]} remain)."
    )


def _law(law: LossLaw) -> str:
    low, high = law.exponent_interval
    return (
        f"B_crit = {law.b_star:.3g} tokens · L^{law.exponent:.2f}, exponent's {law.confidence:.0%} interval "
        f"[{low:.2f}, {high:.2f}]"
    )
