"""Advice for the terminal: a table of batch sizes, and sentences on B_crit, CBS20, learning rates and the ramp."""

import math

from rich.console import Group as Rows
from rich.text import Text

from scaling_jax.advice.advise import Advice
from scaling_jax.advice.goal import Goal
from scaling_jax.console.grid import Grid
from scaling_jax.report.words import duration, short
from scaling_jax.training import Stage

_RAMP_BY = {
    "local": "the local B_crit",
    "law": "the law's B_crit, as there is no local one",
    "fit": "B_crit at each loss, as there is neither a local one nor a law",
}


def advice_table(advice: Advice) -> Rows:
    """The advice for a loss: a row for each batch size, B_crit, and the ramp."""
    to = advice.to
    missing = {"wall\ntime": advice.hardware is None, "lr": all(row.learning_rate is None for row in advice.rows)}
    columns = ["batch", "steps", "bracket" if to.extrapolated else "95 %\ninterval", "tokens", "excess"]
    columns += [column for column in ("wall\ntime", "lr", "flags") if not missing.get(column)]
    cells = []
    for row in advice.rows:
        low, high = row.steps_interval
        flags = ["untested"] * (not row.tested) + ["over budget"] * (not row.within_budget)
        flags += ["lr at an edge"] * (row.learning_rate_source == "edge")
        approximate = "~" * (row.learning_rate_source in ("between", "rule"))
        cells.append(
            (
                f"{row.batch_tokens:,.0f}",
                short(row.steps),
                f"{short(low)}–{short(high)}" if high < math.inf else "unknown",
                short(row.tokens),
                f"{row.excess_compute:.0%}",
                *([duration(row.seconds)] if row.seconds is not None else []),
                *([] if row.learning_rate is None else [f"{approximate}{row.learning_rate:.2g}"]),
                ", ".join(flags),
            )
        )
    title = f"model {to.model} to loss {to.loss:g}"
    shown = Grid(columns, cells, title, ("flags",), {"flags": 8})
    return Rows(shown, *(Text(line) for line in _advice_sentences(advice)))


def _advice_sentences(advice: Advice) -> list[str]:
    to = advice.to
    reference = short(advice.reference_batch_tokens)
    above = "the minimum that any batch size needs" if to.hyperbolas else f"what a batch of {reference} tokens needs"
    lines = [
        f"batch and tokens are in tokens; excess: compute above {above}",
        f"B_crit (the knee): {_b_crit(to.b_crit, to.b_crit_interval)}, by {_source(to)}; there a run needs twice the "
        f"minimum of {short(to.s_min)} steps"
        + (f" and twice the minimum of {short(to.e_min)} tokens" if to.hyperbolas else ""),
    ]
    if math.isfinite(to.local_b_crit):
        lines.append(
            f"local B_crit, of the next stretch of loss: {_b_crit(to.local_b_crit, to.local_interval)}; for ramps, and "
            "to continue a run from this loss"
        )
    if to.law_b_crit is not None and to.law_interval is not None and not to.extrapolated:
        lines.append(
            f"B_crit by the law through all losses: {_b_crit(to.law_b_crit, to.law_interval)}; only for losses that "
            "weren't measured"
        )
    limit = f"; from the limit of small batches: {short(advice.cbs20_of_limit)}" if to.hyperbolas else ""
    lines.append(f"CBS20 (20 % more tokens than with {reference} a batch): {short(advice.cbs20)} tokens{limit}")
    if advice.within_budget is not None:
        lines.append(f"largest batch within the budget: {short(advice.within_budget)} tokens")
    if advice.hardware is not None:
        lines.append(_about_time(advice))
    lines += _about_rates(advice)
    if advice.stages:
        by = f"by {_RAMP_BY[advice.follows or 'law']}"
        if advice.extra_tokens is not None:
            by = f"of one late switch, for at most {advice.extra_tokens:.0%} more tokens than its first batch alone"
        lines.append(f"ramp {by}: " + ", then ".join(map(_stage, advice.stages)))
        lines += [f"  {name}: {short(r.steps)} steps, {short(r.tokens)} tokens" for name, r in advice.schedules.items()]
    return lines + [f"note: {note}" for note in advice.notes]


def _b_crit(value: float, interval: tuple[float, float]) -> str:
    return f"{short(value)} [{short(interval[0])}, {short(interval[1])}] tokens"


def _source(to: Goal) -> str:
    if to.extrapolated:
        return "the law, as this loss wasn't measured; the interval includes the law with parts of the data"
    if len(to.neighbours) == 1:
        return "the fit at this loss"
    return "the fits at " + " and ".join(f"{point.loss:.4g}" for _, point in to.neighbours)


def _about_rates(advice: Advice) -> list[str]:
    """How to set the learning rate, Adam's β's and weight decay at each batch size."""
    sources = {row.learning_rate_source for row in advice.rows} - {None}
    lines = []
    if sources:
        words = {"between": "~ between batches: interpolated", "rule": "~ beyond them: as √B from the nearest"}
        approximate = [text for source, text in words.items() if source in sources]
        where = ", at their nearest loss" if advice.to.extrapolated else ""
        lines.append("; ".join([f"lr: the best learning rate of the runs{where}", *approximate]))
    return [
        *lines,
        "Adam: at a constant batch, keep your runs' β's, or by β^(B/B_0) their half-lives in tokens (Marek et al. "
        "2025), as train does in a ramp; AdamW: weight decay as √B, with lr as √B, keeps its timescale (Bergsma et al. "
        "2025)",
    ]


def _about_time(advice: Advice) -> str:
    hardware = advice.hardware
    assert hardware is not None
    if advice.fastest is None:
        return (
            "wall time assumes that a device has full speed at any batch size, so the smallest batch is the fastest; "
            "give --device-batch-tokens, the batch size (tokens per device) at which the device reaches full speed"
        )
    seconds = hardware.seconds(advice.fastest, float(advice.to.steps(advice.fastest)))
    return f"fastest on {hardware.devices} devices: {short(advice.fastest)} tokens, {duration(seconds)}"


def _stage(stage: Stage) -> str:
    start = f"from {short(stage.tokens)} tokens " if stage.tokens else ""
    return f"{start}{stage.batch_tokens:,} (lr × {stage.learning_rate_factor:.3g})"
