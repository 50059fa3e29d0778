"""Tables and sentences for the terminal: fits, summaries of scans, plans, compiled programs, status."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console, ConsoleOptions
from rich.console import Group as Rows
from rich.text import Text

from scaling_jax.advice.measured import usable
from scaling_jax.compile.ahead_of_time import CompiledBatch, Executable
from scaling_jax.compile.topologies import Topology
from scaling_jax.console.grid import Grid
from scaling_jax.data.feeding import RESIDENT_BYTES
from scaling_jax.fitting import cbs20
from scaling_jax.report.words import clock, duration, law_lines, short
from scaling_jax.results import Analysis
from scaling_jax.results.measurements import some_losses
from scaling_jax.results.status import Status
from scaling_jax.results.table import TableFit
from scaling_jax.scanning.experiment import FEWEST_STEPS
from scaling_jax.scanning.plan import EFFICIENCY, ScanPlan

_GIB = 2**30
_POWER = re.compile(r"\^(-?\d+(?:\.\d+)?)")
_SUPERSCRIPTS = str.maketrans("-.0123456789", "⁻·⁰¹²³⁴⁵⁶⁷⁸⁹")


def print_fit(found: TableFit, written: Path) -> Rows:
    """The fit of a table: every trade-off, the laws, and the notes."""
    free_shape = any(point.free_shape for point in found.fit.points)  # then tokens have no minimum
    title = "S_min in steps, the others in tokens; CBS20: 20 % over the tokens of the smallest batch, B_min"
    if not free_shape:
        title += ", or over E_min"
    columns = ["model", "loss", "S_min", "E_min", "B_crit", "95 %\ninterval", "CBS20\nE_min", "CBS20\nB_min", "flags"]
    if free_shape:
        columns = [column for column in columns if "E_min" not in column]
    rows = []
    for point in found.fit.points:
        t = point.tradeoff
        curved = t.shape.u_shaped and not point.in_law  # else the only one of many, by chance
        hidden = curved or (not usable(point) if free_shape else t.one_sided)
        values = [point.s_min, t.e_min, point.b_crit, t.cbs20, cbs20(point, t.batch_tokens.min())]
        s_min, e_min, b_crit, *of_cbs20 = ["–" if hidden else short(value) for value in values]
        flags = [f"B_opt {short(t.shape.b_opt)}"] * curved + ["one-sided"] * (hidden and not curved)
        flags += [f"{point.not_reached} not reached"] * bool(point.not_reached)
        interval = "–" if curved else "–".join(short(end) for end in point.b_crit_interval)
        row = (s_min, b_crit, interval, of_cbs20[1]) if free_shape else (s_min, e_min, b_crit, interval, *of_cbs20)
        rows.append((point.model, f"{point.loss:.4g}", *row, ", ".join(flags)))
    names = [name for point in found.fit.points for name in re.split(r"[\s-]", point.model)]
    wraps = {"model": max(map(len, [*names, "model"])), "flags": 9}
    table = Grid(columns, rows, title, ("model", "flags"), wraps, heads=2)
    lines = [
        *law_lines(found.fit, found.joint, found.forms),
        *(f"note: {note}" for note in found.notes),
        f"fit: {written}",
    ]
    return Rows(table, *map(Line, lines))


def summary(analysis: Analysis, figures: Sequence[Path] = (), written: Path | None = None) -> Rows:
    """The summary of a scan: B_crit and noise scale at three losses of each model, the laws, notes, and files."""
    rows = []
    for model in dict.fromkeys(p.model for p in analysis.fit.points):
        points = [p for p in analysis.fit.points if p.model == model and p.shown]
        for point in _spread(points, 3):
            low, high = point.b_crit_interval
            local = ("", "")
            if math.isfinite(point.local_b_crit):
                local = short(point.local_b_crit), "–".join(map(short, point.local_b_crit_interval))
            interval, noise = f"{short(low)}–{short(high)}", _noise_near(analysis, model, point.loss)
            rows.append((model, f"{point.loss:.2f}", short(point.b_crit), interval, *local, noise))
    table = Grid(
        ("model", "loss", "B_crit", "95 %\ninterval", "local", "95 %\ninterval", "noise"),
        rows,
        "Critical batch size from the start, local one, and noise scale, in tokens",
        ("model",),
        heads=2,
    )
    lines = law_lines(analysis.fit, analysis.joint, analysis.forms)
    if math.isfinite(analysis.noise_ratio):
        lines.append(f"noise scale / local B_crit: {analysis.noise_ratio:.2f} (median)")
    lines += [f"note: {note}" for note in analysis.notes]
    if figures:
        lines.append(f"figures in {figures[0].parent}: {', '.join(path.name for path in figures)}")
    if written is not None:
        lines.append(f"fit: {written}")
    return Rows(table, *map(Line, lines))


def plan_table(plan: ScanPlan) -> Rows:
    """The plan of a scan: what each missing batch size needs at most, and the totals."""
    rows = []
    for p in plan.cells:
        runs = f"{p.least_runs}–{p.most_runs}"
        rows.append((p.cell.name, runs, short(p.most_tokens), f"{p.most_flops:.2g}", f"{p.bytes_needed / _GIB:.2f}"))
    columns = ("model · batch", "runs", "tokens", "FLOPs", "GiB")
    table = Grid(columns, rows, "At most, per batch size", columns[:1])
    cells = plan.cells
    of = f"the {plan.share_cells} batch sizes that are done" if plan.share_cells else "the demo's runs"
    lines = [
        f"{len(cells)} batch sizes to train, {plan.cells_done} done; {sum(p.least_runs for p in cells)} to "
        f"{sum(p.most_runs for p in cells)} runs, {plan.workers} batch sizes at a time",
        f"expected: {duration(plan.expected_seconds)}, {short(plan.expected_tokens)} tokens, if runs "
        f"end as early as {of}, after {plan.expected_tokens / max(plan.most_tokens, 1):.2g} of the tokens at most",
        f"at most: {duration(plan.most_seconds)}, {short(plan.most_tokens)} tokens, "
        f"{sum(p.most_flops for p in cells):.2g} FLOPs, if every learning rate is tried and trains to max_tokens",
        f"times: {_how_timed(plan)}",
        f"memory: {max((p.bytes_needed for p in cells), default=0) / _GIB:.1f} GiB for a batch size at most; there are "
        f"{plan.bytes_available / _GIB:.1f} GiB for each of {plan.workers} at a time",
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


def _how_timed(plan: ScanPlan) -> str:
    if plan.timed:
        return f"from steps of {', '.join(plan.timed)}, timed now on this machine, as busy as it is"
    return (
        f"from FLOPs, at {100 * EFFICIENCY:.0f} % of the {plan.flops_per_second / 1e9:,.0f} GFLOP/s that a large "
        "matrix product reaches here; no steps could be timed in a few seconds"
    )


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
    rows = []
    for g in status.parts:
        newest = (
            "" if g.learning_rate is None else f"{g.learning_rate:.3g}",
            "" if g.step is None else f"{g.step:,}",
            "" if g.test_loss is None else f"{g.test_loss:.3f}",
            "" if g.tokens_per_second is None else short(g.tokens_per_second),
            "" if g.seconds_ago is None else clock(g.seconds_ago),
        )
        rows.append((g.name, g.state, str(g.rates_tried or ""), *(() if g.state == "done" else newest)))
    columns = ("model · batch", "", "rates", "newest", "step", "loss", "tokens/s", "ago")
    return Rows(Text(head), Grid(columns, rows, "", columns[:2], {"model · batch": 12}, heads=2, bordered=False))


class Line(NamedTuple):
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


def _compiled_table(batches: list[CompiledBatch]) -> Grid:
    columns = (
        "batch,\ntokens",
        "chips",
        "small\nbatch",
        "GiB per\nchip",
        "FLOPs per\nstep",
        "XLA's\ncount",
        "collectives",
        "MiB",
    )
    rows = [
        (
            f"{batch.batch_tokens:,}",
            str(batch.program.num_devices),
            f"{batch.program.num_microbatches} × {batch.program.small_batch_sequences}",
            f"{_gib(batch.step)} ({_gib(batch.plain_step)})",
            f"{batch.step_flops:.3g}",
            f"× {batch.counted_flops / batch.step_flops:.2f}",
            f"{len(batch.step.collectives)} ({len(batch.plain_step.collectives)})",
            f"{_bytes_sent(batch.step) / 2**20:.1f}",
        )
        for batch in batches
    ]
    styles = [None if batch.fits else "red" for batch in batches]
    return Grid(columns, rows, batches[0].program.model.name, styles=styles)


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
        if fitting := [batch for batch in model_batches if batch.step.memory_bytes is not None]:
            lines.append(_memory_in_words(fitting[-1]))
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


def _memory_in_words(batch: CompiledBatch) -> str:
    step = batch.step
    whole, arguments, temporary, program = (
        f"{num_bytes / _GIB:.3g}"
        for num_bytes in (step.memory_bytes or 0, step.argument_bytes, step.temporary_bytes, step.program_bytes)
    )
    return (
        f"{whole} GiB per chip of {batch.program.model.name} at {batch.batch_tokens:,} tokens: {arguments} for the "
        f"training state and for {RESIDENT_BYTES / _GIB:.3g} GiB of text, which is there however "
        f"small the model is; {temporary} for activations, gradients and copies, also of the "
        f"text; {program} for the program"
    )


def _by_model(batches: Sequence[CompiledBatch]) -> list[list[CompiledBatch]]:
    batches = sorted(batches, key=lambda batch: batch.batch_tokens)
    models = dict.fromkeys(
        batch.program.model for batch in sorted(batches, key=lambda b: b.program.task.model.num_params)
    )
    return [[batch for batch in batches if batch.program.model == model] for model in models]


def _gib(executable: Executable) -> str:
    return "too large" if executable.memory_bytes is None else f"{executable.memory_bytes / _GIB:.3g}"


def _bytes_sent(executable: Executable) -> int:
    return sum(collective.num_bytes for collective in executable.collectives)
