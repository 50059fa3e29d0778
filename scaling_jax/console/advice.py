"""Advice for one loss as a table and sentences."""

import math

from rich.console import Group as Rows
from rich.table import Table
from rich.text import Text

from scaling_jax.advice.advise import Advice
from scaling_jax.report.words import duration, short
from scaling_jax.training import Stage


def advice_table(advice: Advice) -> Rows:
    to = advice.to
    shown = Table(title=f"model {to.model} to loss {to.loss:g}", title_justify="left", title_style="bold")
    names = ["batch", "steps", "95 % interval", "tokens", "excess", "wall time", "flags"]
    for column in names:
        if column != "wall time" or advice.hardware is not None:
            shown.add_column(column, justify="left" if column == "flags" else "right", no_wrap=column != "flags")
    for row in advice.rows:
        low, high = row.steps_interval
        flags = ["untested"] * (not row.tested) + ["over budget"] * (not row.within_budget)
        shown.add_row(
            f"{row.batch_tokens:,.0f}",
            short(row.steps),
            f"{short(low)}–{short(high)}" if high < math.inf else "unknown",
            short(row.tokens),
            f"{row.excess_compute:.0%}",
            *([duration(row.seconds)] if row.seconds is not None else []),
            ", ".join(flags),
        )
    return Rows(shown, *(Text(line) for line in _sentences(advice)))


def _sentences(advice: Advice) -> list[str]:
    to = advice.to
    low, high = to.b_crit_interval
    lines = [
        "batch and tokens in tokens; excess: compute over the least that any batch size needs",
        f"knee: {short(to.b_crit)} tokens (B_crit, {short(low)}–{short(high)}): twice the fewest steps, "
        f"{short(to.s_min)}, and twice the fewest tokens, {short(to.e_min)}",
    ]
    if to.law_b_crit is not None and to.law_interval is not None:
        low, high = to.law_interval
        lines.append(f"by the law through all losses: {short(to.law_b_crit)} ({short(low)}–{short(high)})")
    if advice.within_budget is not None:
        lines.append(f"largest batch within the budget of tokens: {short(advice.within_budget)} tokens")
    if advice.hardware is not None:
        lines.append(_about_time(advice))
    if advice.stages:
        lines.append("ramp: " + ", then ".join(_stage(stage) for stage in advice.stages))
        lines += [f"  {name}: {short(r.steps)} steps, {short(r.tokens)} tokens" for name, r in advice.schedules.items()]
    return lines + [f"note: {note}" for note in advice.notes]


def _about_time(advice: Advice) -> str:
    hardware = advice.hardware
    assert hardware is not None
    if advice.fastest is None:
        return (
            "wall time takes every device as equally fast at any share of the batch, so that smaller batches win; say "
            "with --device-batch-tokens from how many tokens on a device is at full speed"
        )
    seconds = hardware.seconds(advice.fastest, float(advice.to.steps(advice.fastest)))
    return f"fastest on {hardware.devices} devices: {short(advice.fastest)} tokens, {duration(seconds)}"


def _stage(stage: Stage) -> str:
    start = f"from {short(stage.tokens)} tokens on " if stage.tokens else ""
    return f"{start}{stage.batch_tokens:,} (lr × {stage.learning_rate_factor:.3g})"
