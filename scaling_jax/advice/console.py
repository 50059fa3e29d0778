"""Advice for one goal as a table and sentences, and its ramp as JSON."""

import dataclasses
import json
import math
from pathlib import Path

from rich.console import Group as Rows
from rich.table import Table
from rich.text import Text

from scaling_jax.advice.choices import Choice, Hardware, choices, fastest, largest_within, powers_around
from scaling_jax.advice.goal import Goal, goal
from scaling_jax.advice.ramp import Reached, Stage, progress, ramp, reach
from scaling_jax.analysis.numbers import duration, short
from scaling_jax.analysis.table_fit import fit_table
from scaling_jax.errors import UserError
from scaling_jax.training.records import write_atomically


@dataclasses.dataclass(frozen=True, eq=False)
class Advice:
    """Everything that `scaling-jax advise` says."""

    to: Goal
    rows: tuple[Choice, ...]
    within_budget: float | None  # largest batch, tokens
    hardware: Hardware | None
    fastest: float | None
    stages: tuple[Stage, ...]  # of the ramp; empty where the goal is extrapolated
    schedules: dict[str, Reached]  # the ramp and the constant batches that it lies between
    notes: tuple[str, ...]


def advise(
    results: Path,
    target_loss: float,
    *,
    model: str | None = None,
    budget_tokens: float | None = None,
    hardware: Hardware | None = None,
    start_batch_tokens: int | None = None,
    max_batch_tokens: int | None = None,
    fraction: float = 1.0,
    extrapolate: bool = False,
) -> Advice:
    """Fits a results folder's measurements.csv, or a CSV, and advises on one loss.

    Raises:
      UserError: where the data can't answer; the message says what would.
    """
    asked = {
        "budget_tokens": budget_tokens,
        "start_batch_tokens": start_batch_tokens,
        "max_batch_tokens": max_batch_tokens,
        "ramp_fraction": fraction,
    }
    for name, value in asked.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} = {value} must be positive and finite")
    path = results / "measurements.csv" if results.is_dir() else results
    if not path.exists():
        raise UserError(f"no {path}: give a results folder after `scaling-jax fit`, or a CSV of steps to loss")
    found = fit_table(path, laws=False)
    budget = math.inf if budget_tokens is None else budget_tokens
    to = goal(found.fit, target_loss, model, extrapolate=extrapolate)
    stages: tuple[Stage, ...] = ()
    schedules = {}
    if not to.extrapolated:
        way = progress(found.fit, target_loss, to.model)
        start = start_batch_tokens or _start(to, fraction * float(way.b_crit[0]))
        stages = ramp(
            found.fit,
            target_loss,
            start_batch_tokens=start,
            max_batch_tokens=max_batch_tokens,
            model=to.model,
            fraction=fraction,
        )
        for batch in dict.fromkeys((start, stages[-1].batch_tokens)):
            schedules[f"constant {batch:,}"] = reach(way, (Stage(0, batch, 1.0),))
        schedules["ramp"] = reach(way, stages)
    return Advice(
        to=to,
        rows=choices(to, powers_around(to), hardware, budget),
        within_budget=None if budget_tokens is None else largest_within(to, budget),
        hardware=hardware,
        fastest=None if hardware is None else fastest(to, hardware, budget),
        stages=stages,
        schedules=schedules,
        notes=_notes(to),
    )


def write_stages(path: Path, stages: tuple[Stage, ...]) -> None:
    """The ramp as a JSON list of stages.

    Raises:
      UserError: if there is none, or it can't be written.
    """
    if not stages:
        raise UserError("no ramp to an extrapolated loss: choose a loss inside the range measured")
    try:
        write_atomically(path, json.dumps([dataclasses.asdict(stage) for stage in stages], indent=2) + "\n")
    except (OSError, ValueError) as error:  # the latter for a path without a name
        raise UserError(f"can't write {path}: {error}") from error


def print_advice(advice: Advice) -> Rows:
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


def _start(to: Goal, b_crit: float) -> int:
    """The largest doubling of the smallest batch tested that isn't above B_crit at the highest loss."""
    smallest = to.batch_range[0]
    return round(smallest * 2 ** max(0, math.floor(math.log2(b_crit / smallest))))


def _notes(to: Goal) -> tuple[str, ...]:
    notes = []
    if to.extrapolated:
        notes.append(
            f"EXTRAPOLATED: loss {to.loss:g} was not measured; S_min goes on along a straight line, B_crit along the "
            "law, and no interval covers what may happen there"
        )
    elif to.law_b_crit is not None and to.law_interval is not None:
        low, high = to.b_crit_interval
        if to.law_interval[0] > high or to.law_interval[1] < low:
            notes.append(
                "the law's B_crit and this model's lie outside of each other's intervals: trust the model's own"
            )
    return tuple(notes)
