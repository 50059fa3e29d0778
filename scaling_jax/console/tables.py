"""Tables and sentences for the terminal: fits, summaries of scans, plans, compiled programs, status, advice."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console, ConsoleOptions
from rich.console import Group as Rows
from rich.table import Table
from rich.text import Text

from scaling_jax.advice.advise import Advice
from scaling_jax.compile.ahead_of_time import CompiledBatch, Executable
from scaling_jax.compile.topologies import Topology
from scaling_jax.report.words import clock, duration, law_lines, short
from scaling_jax.results import Analysis
from scaling_jax.results.measurements import some_losses
from scaling_jax.results.status import Status
from scaling_jax.results.table import TableFit
from scaling_jax.scanning.experiment import FEWEST_STEPS
from scaling_jax.scanning.plan import EFFICIENCY, ScanPlan
from scaling_jax.training import Stage

_GIB = 2**30
_POWER = re.compile(r"\^(-?\d+(?:\.\d+)?)")
_SUPERSCRIPTS = str.maketrans("-.0123456789", "⁻·⁰¹²³⁴⁵⁶⁷⁸⁹")


def print_fit(found: TableFit, written: Path) -> Rows:
    """The fit of a table: every trade-off, the laws, and the notes."""
    table = Table(title="S_min in steps; E_min, B_crit, CBS20 in tokens", title_justify="left", title_style="bold")
    for column in ("model", "loss", "S_min", "E_min", "B_crit", "95 % interval", "CBS20", "flags"):
        left, first = column in ("model", "flags"), column == "model"
        table.add_column(column, justify="left" if left else "right", no_wrap=not first, min_width=6 if first else None)
    for point in found.fit.points:
        t = point.tradeoff
        s_min, e_min, b_crit, cbs20 = (
            "–" if t.one_sided or t.shape.u_shaped else short(value)
            for value in (t.s_min, t.e_min, point.b_crit, t.cbs20)
        )
        flags = [f"B_opt {short(t.shape.b_opt)}"] * t.shape.u_shaped
        flags += ["one-sided"] * t.one_sided + [f"{point.not_reached} not reached"] * bool(point.not_reached)
        interval = "–" if t.shape.u_shaped else "–".join(short(end) for end in point.b_crit_interval)
        table.add_row(point.model, f"{point.loss:.4g}", s_min, e_min, b_crit, interval, cbs20, ", ".join(flags))
    lines = [
        *law_lines(found.fit, found.joint, found.forms),
        *(f"note: {note}" for note in found.notes),
        f"fit: {written}",
    ]
    return Rows(table, *map(_Line, lines))


def summary(analysis: Analysis, figures: Sequence[Path] = ()) -> Rows:
    """The summary of a scan: B_crit and noise scale at three losses of each model, the laws, notes, and figures."""
    table = Table(
        title="Critical batch size from the start, local one, and noise scale, in tokens",
        title_justify="left",
        title_style="bold",
    )
    for column in ("model", "loss", "B_crit", "95 % interval", "local", "95 % interval", "noise"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for model in dict.fromkeys(p.model for p in analysis.fit.points):
        points = [p for p in analysis.fit.points if p.model == model and p.shown]
        for point in _spread(points, 3):
            low, high = point.b_crit_interval
            local = ("", "")
            if math.isfinite(point.local_b_crit):
                local = short(point.local_b_crit), "–".join(map(short, point.local_b_crit_interval))
            table.add_row(
                model,
                f"{point.loss:.2f}",
                short(point.b_crit),
                f"{short(low)}–{short(high)}",
                *local,
                _noise_near(analysis, model, point.loss),
            )
    lines = law_lines(analysis.fit, analysis.joint, analysis.forms)
    if math.isfinite(analysis.noise_ratio):
        lines.append(f"noise scale / local B_crit: {analysis.noise_ratio:.2f} (median)")
    lines += [f"note: {note}" for note in analysis.notes]
    if figures:
        lines.append(f"figures in {figures[0].parent}: {', '.join(path.name for path in figures)}")
    return Rows(table, *map(_Line, lines))


def plan_table(plan: ScanPlan) -> Rows:
    """The plan of a scan: what each missing batch size needs at most, and the totals."""
    table = Table(title="At most, per batch size", title_justify="left", title_style="bold")
    for column in ("model · batch", "runs", "tokens", "FLOPs", "memory, GiB"):
        table.add_column(column, justify="left" if column.startswith("model") else "right")
    for p in plan.cells:
        runs = f"{p.least_runs}–{p.most_runs}"
        table.add_row(p.cell.name, runs, short(p.most_tokens), f"{p.most_flops:.2g}", f"{p.bytes_needed / 2**30:.2f}")
    cells = plan.cells
    lines = [
        f"{len(cells)} batch sizes to train, {plan.cells_done} done; {sum(p.least_runs for p in cells)} to "
        f"{sum(p.most_runs for p in cells)} runs, {plan.workers} batch sizes at a time",
        f"at most {short(sum(p.most_tokens for p in cells))} tokens, {sum(p.most_flops for p in cells):.2g} FLOPs, "
        f"{duration(plan.most_seconds)} at {100 * EFFICIENCY:.0f} % of the {plan.flops_per_second / 1e9:,.0f} GFLOP/s "
        "that a large matrix product reaches here",
        "at most: if every learning rate is tried and trains to max_tokens; most runs end earlier, at their targets: "
        "the demo needs 1/30 of its upper limit",
        f"memory for one batch size at a time: {plan.bytes_available / 2**30:.1f} GiB",
        f"target losses: give ones to which even very large batches need {FEWEST_STEPS} steps or more; below that, "
        "warm-up, first evaluations and rounding weigh",
    ]
    if plan.easy:
        reached = (
            f"model {easy.model} at {easy.batch_tokens:,} tokens, {some_losses(easy.losses, easy.num_targets)}"
            for easy in plan.easy
        )
        lines.append(f"reached in fewer than {FEWEST_STEPS} steps: {'; '.join(reached)}; give lower targets")
    return Rows(table, *(Text(line) for line in lines))


def print_compiled(batches: Sequence[CompiledBatch], slice_: Topology) -> Rows:
    """Memory, FLOPs and collective operations of each batch size; what doesn't divide; what doesn't fit."""
    return Rows(
        Text(
            f"{slice_.name}: {slice_.size_in_words} of {slice_.chip.memory_bytes / _GIB:.4g} GiB, "
            f"{slice_.num_hosts} hosts. Compiled, not run."
        ),
        *(_compiled_table(model_batches) for model_batches in _by_model(batches)),
        *(Text(line) for line in _compiled_sentences(batches, slice_)),
    )


def status_table(status: Status) -> Rows:
    """The status of a scan or of runs: a summary, and a row for each cell or run."""
    count = {state: sum(g.state == state for g in status.parts) for state in ("done", "running", "not begun")}
    head = f"{status.name}: {count['done']} of {len(status.parts)} {status.what} done"
    if count["done"] < len(status.parts):
        others = len(status.parts) - sum(count.values())
        head += f", {count['running']} running" * bool(status.running) + f", {others} interrupted" * bool(others)
        head += f", {count['not begun']} not begun · {100 * status.fraction:.0f} % of the work"
        if status.seconds_left is not None:
            head += f" · about {clock(status.seconds_left)} left"
        if status.running is False:
            head += "\nIt isn't running. Run the same command again to continue it."
    table = Table(box=None, header_style="dim", pad_edge=False)
    for column in ("model · batch", "", "rates", "newest", "step", "loss", "tokens/s", "ago"):
        first = column == "model · batch"  # on a narrow terminal only this column wraps, so that no number is cut
        left = first or not column
        table.add_column(
            column, justify="left" if left else "right", no_wrap=not first, min_width=12 if first else None
        )
    for g in status.parts:
        newest = (
            "" if g.learning_rate is None else f"{g.learning_rate:.3g}",
            "" if g.step is None else f"{g.step:,}",
            "" if g.test_loss is None else f"{g.test_loss:.3f}",
            "" if g.tokens_per_second is None else short(g.tokens_per_second),
            "" if g.seconds_ago is None else clock(g.seconds_ago),
        )
        table.add_row(g.name, g.state, str(g.rates_tried or ""), *(() if g.state == "done" else newest))
    return Rows(Text(head), table)


def advice_table(advice: Advice) -> Rows:
    """The advice for a loss: a row for each batch size, B_crit, and the ramp."""
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
    return Rows(shown, *(Text(line) for line in _advice_sentences(advice)))


class _Line(NamedTuple):
    """A line of text; a terminal that can show them gets superscripts in place of `^`."""

    text: str

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        can_show = console.is_terminal and console.encoding.startswith("utf")
        yield Text(_POWER.sub(lambda power: power[1].translate(_SUPERSCRIPTS), self.text) if can_show else self.text)


def _spread(points: list, count: int) -> list:
    if len(points) <= count:
        return points
    return [points[round(k * (len(points) - 1) / (count - 1))] for k in range(count)]


def _noise_near(analysis: Analysis, model: str, loss: float) -> str:
    near = [n for n in analysis.noise if n.model == model and abs(math.log(n.loss / loss)) < 0.03]
    values = [n.b_simple if n.resolved else math.inf for n in near]
    return short(float(np.quantile(values, 0.5, method="nearest"))) if values else ""


def _compiled_table(batches: list[CompiledBatch]) -> Table:
    table = Table(title=batches[0].program.model.name, title_justify="left", title_style="bold")
    for column in (
        "batch",
        "chips",
        "small\nbatch",
        "GiB per\nchip",
        "FLOPs per\nstep",
        "XLA's\ncount",
        "collec-\ntives",
        "MiB",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for batch in batches:
        program = batch.program
        table.add_row(
            short(batch.batch_tokens),
            str(program.num_devices),
            f"{program.num_microbatches} × {program.small_batch_sequences}",
            f"{_gib(batch.step)} ({_gib(batch.plain_step)})",
            f"{batch.step_flops:.3g}",
            f"× {batch.counted_flops / batch.step_flops:.2f}",
            f"{len(batch.step.collectives)} ({len(batch.plain_step.collectives)})",
            f"{_bytes_sent(batch.step) / 2**20:.1f}",
            style=None if batch.fits else "red",
        )
    return table


def _compiled_sentences(batches: Sequence[CompiledBatch], slice_: Topology) -> list[str]:
    where = "of all chips" if any(b.program.sharding == "fsdp" for b in batches) else "per chip"
    lines = [
        f"small batch: microbatches {where} × sequences per microbatch; in parentheses: without the noise scale; XLA's "
        "count: FLOPs counted by XLA divided by FLOPs of the formula; MiB: size of all collective operations together"
    ]
    compared = [b for b in batches if b.step.fits and b.plain_step.fits]
    if compared:
        operations = max(len(b.step.collectives) - len(b.plain_step.collectives) for b in compared)
        num_bytes = max(_bytes_sent(b.step) - _bytes_sent(b.plain_step) for b in compared)
        lines.append(f"the noise scale adds {operations} collective operations and {num_bytes} bytes to them at most")
    for model_batches in _by_model(batches):
        lines.append(f"evaluation of {model_batches[0].program.model.name}: {_gib(model_batches[0].evaluation)} GiB")
    for batch in batches:
        if batch.nearest_batches:
            near = " or ".join(f"{tokens:,}" for tokens in batch.nearest_batches)
            lines.append(
                f"batch of {batch.batch_tokens:,} tokens is {batch.program.batch_sequences} sequences, which "
                f"{slice_.size_in_words} can't share, so it is compiled for {batch.slice_name}; nearest batches "
                f"that {slice_.size_in_words} can share: {near} tokens"
            )
    lines += [f"DOESN'T FIT: {b.program.model.name}, batch of {b.batch_tokens:,} tokens" for b in batches if not b.fits]
    return list(dict.fromkeys(lines))  # models with the same context give the same line for a batch


def _by_model(batches: Sequence[CompiledBatch]) -> list[list[CompiledBatch]]:
    batches = sorted(batches, key=lambda batch: batch.batch_tokens)
    models = dict.fromkeys(batch.program.model for batch in sorted(batches, key=lambda b: b.program.model.num_params))
    return [[batch for batch in batches if batch.program.model == model] for model in models]


def _gib(executable: Executable) -> str:
    return "too large" if executable.memory_bytes is None else f"{executable.memory_bytes / _GIB:.3g}"


def _bytes_sent(executable: Executable) -> int:
    return sum(collective.num_bytes for collective in executable.collectives)


def _advice_sentences(advice: Advice) -> list[str]:
    to = advice.to
    low, high = to.b_crit_interval
    lines = [
        "batch and tokens are in tokens; excess: compute above the minimum that any batch size needs",
        f"B_crit (the knee): {short(to.b_crit)} [{short(low)}, {short(high)}] tokens; there a run needs twice the "
        f"minimum of {short(to.s_min)} steps and twice the minimum of {short(to.e_min)} tokens",
    ]
    if to.law_b_crit is not None and to.law_interval is not None:
        low, high = to.law_interval
        lines.append(
            f"B_crit by the law through all losses: {short(to.law_b_crit)} [{short(low)}, {short(high)}] tokens"
        )
    if advice.within_budget is not None:
        lines.append(f"largest batch within the budget: {short(advice.within_budget)} tokens")
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
            "wall time assumes that a device has full speed at any batch size, so the smallest batch is the fastest; "
            "give --device-batch-tokens, the batch size (tokens per device) at which the device reaches full speed"
        )
    seconds = hardware.seconds(advice.fastest, float(advice.to.steps(advice.fastest)))
    return f"fastest on {hardware.devices} devices: {short(advice.fastest)} tokens, {duration(seconds)}"


def _stage(stage: Stage) -> str:
    start = f"from {short(stage.tokens)} tokens " if stage.tokens else ""
    return f"{start}{stage.batch_tokens:,} (lr × {stage.learning_rate_factor:.3g})"
