"""The advice for one target loss: batch sizes side by side, and a batch ramp, which can be written to a file."""

import dataclasses
import math
from pathlib import Path

from scaling_jax.advice.choices import Choice, Hardware, choices, fastest, largest_within, powers_around
from scaling_jax.advice.goal import Goal, goal
from scaling_jax.advice.late_switch import late_switch
from scaling_jax.advice.ramp import Cost, Stage, cost, descent, ramp
from scaling_jax.advice.ramp_formats import ramp_as_text
from scaling_jax.advice.rates import best_rates
from scaling_jax.io import UserError
from scaling_jax.io.config import check_at_most
from scaling_jax.io.files import write_whole
from scaling_jax.results.results import check_measurements
from scaling_jax.results.runs import check_runs
from scaling_jax.results.table import fit_table
from scaling_jax.scanning.records import read_experiment
from scaling_jax.tasks import Model, ModelConfig, OtherModel, TaskModel
from scaling_jax.training.run import check_whole_sequences

_MOST_FRACTION = 1_000  # of B_crit, as a batch


@dataclasses.dataclass(frozen=True, eq=False)
class Advice:
    """What `scaling-jax advise` prints."""

    to: Goal
    rows: tuple[Choice, ...]
    within_budget: float | None  # largest batch within the budget, in tokens; None without a budget
    hardware: Hardware | None
    fastest: float | None  # batch with the least wall time, in tokens
    stages: tuple[Stage, ...]  # of the ramp; empty if the goal is extrapolated
    schedules: dict[str, Cost]  # cost of the ramp, and of its smallest and largest batch as constant batches
    notes: tuple[str, ...]
    follows: str | None  # what the ramp follows: "local", "law" or "fit"; see `Descent`
    reference_batch_tokens: float  # of CBS20, and of the excess if there is no E_min
    cbs20: float  # from the reference batch, in tokens
    cbs20_of_limit: float  # from the limit of small batches, in tokens; NaN if the trade-offs are no hyperbolas
    context: int | None = None  # of the model, in tokens; None if it isn't known
    extra_tokens: float | None = None  # share that the ramp, one late switch, may take; None for other ramps


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
    extra_tokens: float | None = None,
    reference_batch_tokens: float | None = None,
    extrapolate: bool = False,
) -> Advice:
    """Fits measurements.csv in a results folder, or another CSV table, and gives advice for one target loss.

    Args:
      results: a results folder after `scaling-jax fit`, or a CSV table of steps to loss.
      target_loss: nats per token.
      model: None takes the model with the lowest loss.
      budget_tokens: largest number of training tokens.
      hardware: for wall times.
      start_batch_tokens, max_batch_tokens: first and largest batch of the ramp.
      fraction: the ramp follows this fraction of the local B_crit.
      extra_tokens: the ramp is one late switch to `max_batch_tokens` instead; see `late_switch`.
      reference_batch_tokens: CBS20 counts from it; None takes the smallest batch of the runs.
      extrapolate: allow a loss outside the measured range.

    Raises:
      UserError: if the data can't answer; the message says which data could. If a run in the folder is damaged.
    """
    asked = {
        "budget_tokens": budget_tokens,
        "start_batch_tokens": start_batch_tokens,
        "max_batch_tokens": max_batch_tokens,
        "ramp_fraction": fraction,
        "reference_batch_tokens": reference_batch_tokens,
    }
    for name, value in asked.items():
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"{name} = {value} must be positive and finite")
        if value is not None and name.endswith("batch_tokens"):
            check_at_most(name, value, 2**63 - 1)
    check_at_most("ramp_fraction", fraction, _MOST_FRACTION)
    if extra_tokens is not None and max_batch_tokens is None:
        raise UserError("a late switch needs the batch after it: give --max-batch-tokens")
    path = results / "measurements.csv" if results.is_dir() else results
    if not path.exists():
        raise UserError(f"there is no {path}: give a results folder after `scaling-jax fit`, or a CSV of steps to loss")
    if results.is_dir():
        check_runs(results)
        check_measurements(results)
    found = fit_table(path, laws=False)
    budget = math.inf if budget_tokens is None else budget_tokens
    to = goal(found.fit, target_loss, model, extrapolate=extrapolate)
    reference = to.batch_range[0] if reference_batch_tokens is None else reference_batch_tokens
    trained = _model(results, to.model)
    stages: tuple[Stage, ...] = ()
    schedules, follows = {}, None
    if not to.extrapolated:
        way = descent(found.fit, target_loss, to.model)
        start, follows = start_batch_tokens or _start(to, fraction * float(way.b_crit[0])), way.follows
        if extra_tokens is not None and max_batch_tokens is not None:
            stages = late_switch(
                found.fit,
                target_loss,
                start_batch_tokens=start,
                max_batch_tokens=max_batch_tokens,
                extra_tokens=extra_tokens,
                model=to.model,
            )
        else:
            stages = ramp(
                found.fit,
                target_loss,
                start_batch_tokens=start,
                max_batch_tokens=max_batch_tokens,
                model=to.model,
                fraction=fraction,
            )
        for batch in dict.fromkeys((start, stages[-1].batch_tokens)):
            schedules[f"constant {batch:,}"] = cost(way, (Stage(0, batch, 1.0),))
        schedules["ramp"] = cost(way, stages)
        if isinstance(trained, Model):
            check_whole_sequences(start, trained.context, "start_batch_tokens")
    rates = best_rates(found.table, to.model, target_loss)
    return Advice(
        to=to,
        rows=choices(to, powers_around(to), hardware, budget, rates, reference),
        within_budget=None if budget_tokens is None else largest_within(to, budget),
        hardware=hardware,
        fastest=None if hardware is None else fastest(to, hardware, budget),
        stages=stages,
        schedules=schedules,
        notes=_notes(to, stages, isinstance(trained, OtherModel | TaskModel)),
        follows=follows,
        reference_batch_tokens=reference,
        cbs20=to.cbs20(reference),
        cbs20_of_limit=to.cbs20(),
        context=trained.context if isinstance(trained, ModelConfig) else None,
        extra_tokens=extra_tokens,
    )


def write_stages(
    path: Path,
    stages: tuple[Stage, ...],
    format: str = "json",
    *,
    context: int | None = None,
    devices: int | None = None,
    drop_rates: bool = False,
) -> None:
    """Writes a ramp in a format; see `ramp_formats.ramp_as_text` for the arguments.

    Raises:
      UserError: if there is no ramp, the format can't say it, or the file can't be written.
    """
    if not stages:
        raise UserError("there is no ramp to an extrapolated loss: choose a loss inside the measured range")
    text = ramp_as_text(stages, format, context=context, devices=devices, drop_rates=drop_rates)
    try:
        write_whole(path, text)
    except (OSError, ValueError) as error:  # ValueError for a path without a file name
        raise UserError(f"can't write {path} ({error}): choose another file") from error


def _model(results: Path, name: str) -> Model | OtherModel | TaskModel | None:
    """A model of a scan; None for a table, which doesn't know it."""
    if not (results / "experiment.json").exists():
        return None
    return next((s.model for s in read_experiment(results).subjects if s.model.name == name), None)


def _start(to: Goal, b_crit: float) -> int:
    """The smallest tested batch, doubled as often as it stays at or below B_crit at the highest loss."""
    smallest = to.batch_range[0]
    return round(smallest * 2 ** max(0, math.floor(math.log2(b_crit / smallest))))


def _notes(to: Goal, stages: tuple[Stage, ...], of_others: bool) -> tuple[str, ...]:
    notes = []
    if to.extrapolated:
        known = "Brackets hold what the law with parts of the data and two lines of S_min allow; they are no intervals"
        far = "So far outside, steps and tokens are guesses"
        notes.append(
            f"EXTRAPOLATED: loss {to.loss:g} is outside the measured range. S_min continues along a straight line, "
            f"B_crit along the law. {far if to.s_min_range[1] == math.inf else known}"
        )
    elif to.law_b_crit is not None and to.law_interval is not None:
        low, high = to.b_crit_interval
        if to.law_interval[0] > high or to.law_interval[1] < low:
            notes.append(
                "B_crit of the law and of this model lie outside of each other's intervals: use this model's B_crit"
            )
    if not to.hyperbolas:
        notes.append(
            "the trade-offs are no hyperbolas, so tokens have no minimum. Steps go as 1 + (B_crit/B)^a, "
            "fitted at each loss; outside the scanned batches they rest on this form"
        )
    if stages and stages[-1].batch_tokens > to.batch_range[1]:
        notes.append(
            f"the ramp goes beyond the largest batch of the runs, {to.batch_range[1]:,.0f} tokens: limit it with "
            "--max-batch-tokens"
        )
    usual = ModelConfig(1, 16, 1).context
    if stages and not of_others and stages[0].batch_tokens % usual | (stages[0].batch_tokens < 2 * usual):
        notes.append(
            f"the ramp starts at {stages[0].batch_tokens:,} tokens, but train takes two or more whole sequences a "
            f"batch: with its usual context of {usual} tokens give --start-batch-tokens {2 * usual}, or give train a "
            "--context"
        )
    return tuple(notes)
