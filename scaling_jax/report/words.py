"""Results in words: numbers, the end of a run, and the law of B_crit in lines and in sentences."""

import math

import numpy as np

from scaling_jax.fitting import CriticalBatch, FormFit, JointFit, LossLaw, ScanFit
from scaling_jax.fitting.forms import MEANS_LITTLE, MEANS_LITTLE_HELD_OUT
from scaling_jax.fitting.scan_fit import REJECTED
from scaling_jax.results import Analysis
from scaling_jax.results.branches import BranchMeasurement
from scaling_jax.training import Run, RunResult

_LAW_IN = {"loss": "L", "above floor": "L above a floor", "data": "D_min", "size": "N"}


def short(value: float) -> str:
    """A number with three significant digits and k, M, G or T; "unresolved" for NaN."""
    if not math.isfinite(value):
        return "∞" if value > 0 else "unresolved"
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= size * 0.9995:
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """A time with three digits, in the largest unit of which it has at least two."""
    for size, unit in ((86_400, "days"), (3_600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def clock(seconds: float) -> str:
    """A time as 0:09, 12:34 or 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def ending(run: Run, result: RunResult) -> str:
    """How a run ended."""
    if result.status == "reached":
        return f"reached the target loss ({run.target_loss:g})"
    if result.status == "exhausted":
        return (
            f"reached max_tokens ({run.max_tokens:,})"
            if run.max_steps is None
            else f"reached max_steps ({run.max_steps:,})"
        )
    return "given up: missed a deadline" if result.status == "given up" else result.status


def branch_line(m: BranchMeasurement) -> str:
    """B_crit at one point of a run, with its interval, or as a bound."""
    where = f"{m.model} at {short(m.tokens)} tokens, loss {m.loss:.3f}"
    if math.isinf(m.b_crit):
        return f"{where}: B_crit at least {short(m.low)} tokens"
    return f"{where}: B_crit {short(m.b_crit)} [{short(m.low)}, {short(m.high)}] tokens"


def law_lines(fit: ScanFit, joint: JointFit | None, forms: tuple[FormFit, ...]) -> list[str]:
    """The fitted laws, one line each; one line that says what is missing if there is no law."""
    law = fit.law
    other_forms = _form_lines(forms)
    if law is None or fit.table_of_law is None:
        local = _local_lines(fit) + [f"local: {line}" for line in other_forms]
        return [f"No law: {_why(fit)}." if law is None else _law_with_losses(law), *_shape_lines(law), *local]
    lines = [_law_with_losses(law)]
    if joint is not None and joint.law is not None:
        lines.append(f"the same law, fitted to all runs at once: {_law(joint.law)}")
    if forms and forms[0].form != "loss" and not _alike(forms):
        lines.insert(0, other_forms.pop(0))  # the better law comes first
    return lines + other_forms + _local_lines(fit)


def _law_with_losses(law: LossLaw) -> str:
    high, low = max(law.loss_range), min(law.loss_range)
    return f"{_law(law)}, for losses {high:.4g} to {low:.4g} nats per token; untested at other losses"


def _shape_lines(law: LossLaw | None) -> list[str]:
    if law is None or law.shapes is None:
        return []
    (first, last), (low, high) = law.shapes, sorted(law.loss_range)
    return [f"steps as 1 + (B_crit/B)^a, a = {first:.2f} at {high:.4g} and {last:.2f} at {low:.4g}"]


def _form_lines(forms: tuple[FormFit, ...]) -> list[str]:
    """Other forms of the law, the best first, and whether it is better than the second."""
    lines = [f"{_proportional(form)} — held-out error {_percent(form.held_out_error)}" for form in forms]
    if len(forms) > 1:
        first, second = forms[:2]
        errors = f"held-out error {_percent(first.held_out_error)} against {_percent(second.held_out_error)}"
        other = f"the law in {_LAW_IN[second.form]}"
        how = f"can't be told from {other}: {errors}" if _alike(forms) else f"fits best: {errors} for {other}"
        lines[0] = f"{_proportional(first)} — {how}"
    return lines


def _alike(forms: tuple[FormFit, ...]) -> bool:
    """True if the first form, which has the smallest held-out error, can't be told from the second."""
    if len(forms) < 2:
        return False
    first, second = forms[:2]
    little = second.held_out_error < (1 + MEANS_LITTLE_HELD_OUT) * first.held_out_error
    return little or second.criterion - first.criterion < MEANS_LITTLE


def _local_lines(fit: ScanFit) -> list[str]:
    """The law of the local B_crit, in a line; nothing without one."""
    if fit.local is None or fit.local.law is None:
        return []
    law, p = fit.local.law, fit.local.shape_p
    shape = "" if math.isnan(p) else f", hyperbolas {'' if p < REJECTED else 'not '}rejected (p = {p:.2g})"
    return [
        f"local, for the next bit of loss: {_law(law)}, {max(law.loss_range):.4g} to {min(law.loss_range):.4g}{shape}"
    ]


def _why(fit: ScanFit) -> str:
    """Why there is no law."""
    return next(note for note in fit.notes[::-1] if note.startswith("no law: ")).removeprefix("no law: ")


def law_in_words(analysis: Analysis) -> list[str]:
    """B_crit at three losses, the law, and what larger and smaller batches cost, in sentences."""
    law = analysis.fit.law
    if law is None:
        return [
            f"No law could be fitted: {_why(analysis.fit)}.",
            *(_point(p) for p in analysis.fit.points if p.shown and not p.tradeoff.one_sided),
        ]
    high, low = max(law.loss_range), min(law.loss_range)
    losses = (high, math.sqrt(high * low), low)
    below, above = analysis.fit.band(np.array(losses))
    sentences = [
        f"At a loss of {loss:.2f} nats per token, B_crit is {short(law(loss))} [{short(a)}, {short(b)}] tokens."
        for loss, a, b in zip(losses, below, above, strict=True)
    ]
    growth = sorted(0.9**x for x in law.exponent_interval)
    sentences.append(
        f"The law is {_law(law)}. When the loss falls by 10 %, B_crit is multiplied by {0.9**law.exponent:.2f} "
        f"[{growth[0]:.2f}, {growth[1]:.2f}]. The law was measured from {high:.2f} down to {low:.2f} nats per token. "
        "It is untested at other losses."
    )
    if law.shapes is not None:
        sentences.append(
            "The trade-offs are no hyperbolas, so B_crit here is the batch size at which a run needs twice the minimum "
            f"steps. Steps go as 1 + (B_crit/B)^a, with a = {law.shapes[0]:.2f} at {high:.2f} nats per token and "
            f"{law.shapes[1]:.2f} at {low:.2f}; a hyperbola has a = 1."
        )
    lowest = min((p for p in analysis.fit.points if p.in_law), key=lambda p: p.loss)
    sentences.append(_cost(lowest))
    if math.isfinite(analysis.noise_ratio):
        sentences.append(
            f"The noise scale is {analysis.noise_ratio:.2f} times the local B_crit (median). Any single run can "
            "measure it during training."
        )
    return sentences


def _point(point: CriticalBatch) -> str:
    low, high = point.b_crit_interval
    return (
        f"At a loss of {point.loss:.2f} nats per token, B_crit of {point.model} is {short(point.b_crit)} "
        f"[{short(low)}, {short(high)}] tokens."
    )


def _cost(point: CriticalBatch) -> str:
    batches = [factor * point.b_crit for factor in (0.25, 1, 4)]
    steps = [f"{point.steps_at(batch):,.0f}" for batch in batches]
    spent = [short(batch * point.steps_at(batch)) for batch in batches]
    start = (
        f"Example: {point.model} at a loss of {point.loss:.2f}. Its own fit gives B_crit = {short(batches[1])} tokens. "
    )
    if point.free_shape:
        return (
            f"{start}At this batch size, a run needs {steps[1]} steps, twice the minimum, and {spent[1]} tokens. At 4 "
            f"times this batch size, it needs {steps[2]} steps and {spent[2]} tokens; at a quarter, {steps[0]} steps "
            f"and {spent[0]} tokens."
        )
    return (
        f"{start}"
        f"At this batch size, a run needs {steps[1]} steps and {spent[1]} tokens, twice the minimum of each. At 4 "
        f"times this batch size, it needs 2.5 times the tokens ({spent[2]}) and 38 % fewer steps ({steps[2]}). At a "
        f"quarter of this batch size, it needs 2.5 times the steps ({steps[0]}) and 38 % fewer tokens ({spent[0]})."
    )


def _law(law: LossLaw) -> str:
    low, high = law.exponent_interval
    spread = law.systematic_spread
    parts = f"; with parts of the data {spread[0]:.2f} to {spread[1]:.2f}" if spread else ""
    return (
        f"B_crit = {short(law.b_star)} tokens · L^{law.exponent:.2f} ({100 * law.confidence:.0f} % interval of the "
        f"exponent [{low:.2f}, {high:.2f}]{parts})"
    )


def _proportional(form: FormFit) -> str:
    above = f"(L - {form.floor:.3g})" if form.floor else "L"
    symbol = {"loss": "L", "above floor": above, "data": "D_min", "size": "N"}[form.form]
    of, unit = form.variable.split(" in ")
    low, high = form.valid_range
    interval = "" if form.exponent_interval is None else " [{:.2f}, {:.2f}]".format(*form.exponent_interval)
    floors = ""
    if len(form.floors) > 1:
        (first, steep), (last, flat) = form.floors[0], form.floors[-1]
        floors = f"; floors of {first:.2f} to {last:.2f} fit about as well, with exponents {steep:.2f} to {flat:.2f}"
    return (
        f"B_crit ∝ {symbol}^{form.exponent:.2f}{interval} ({form.form}), for {of} {short(low)}–{short(high)} "
        f"{unit}{floors}"
    )


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"
