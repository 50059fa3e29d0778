"""What an experiment's compiled programs ask of a TPU slice, as a table for each model and sentences."""

from collections.abc import Sequence

from rich.console import Group as Rows
from rich.table import Table
from rich.text import Text

from scaling_jax.analysis.numbers import short as tokens
from scaling_jax.parallel.topologies import Topology
from scaling_jax.scanning.ahead_of_time import CompiledBatch, Executable

_GIB = 2**30


def print_compiled(batches: Sequence[CompiledBatch], slice_: Topology) -> Rows:
    """Memory, FLOPs and collective operations of each batch size, then what doesn't divide and what doesn't fit."""
    return Rows(
        Text(
            f"{slice_.name}: {len(slice_.devices)} chips of {slice_.chip.memory_bytes / _GIB:.4g} GiB, "
            f"{slice_.num_hosts} hosts. Compiled, not run."
        ),
        *(_table(model_batches) for model_batches in _by_model(batches)),
        *(Text(line) for line in _sentences(batches, slice_)),
    )


def _table(batches: list[CompiledBatch]) -> Table:
    table = Table(title=batches[0].program.model.name, title_justify="left", title_style="bold")
    for column in (
        "batch",
        "chips",
        "small\nbatch",
        "GiB\na chip",
        "FLOPs\na step",
        "XLA's\ncount",
        "all-\nreduces",
        "MiB",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for batch in batches:
        program = batch.program
        table.add_row(
            tokens(batch.batch_tokens),
            str(program.num_devices),
            f"{program.num_microbatches} × {program.small_batch_sequences}",
            f"{_gib(batch.step)} ({_gib(batch.plain_step)})",
            f"{batch.step_flops:.3g}",
            f"× {batch.counted_flops / batch.step_flops:.2f}",
            f"{len(batch.step.collectives)} ({len(batch.plain_step.collectives)})",
            f"{_bytes_reduced(batch.step) / 2**20:.1f}",
            style=None if batch.fits else "red",
        )
    return table


def _sentences(batches: Sequence[CompiledBatch], slice_: Topology) -> list[str]:
    lines = [
        "small batch: microbatches a chip × sequences in each; in parentheses: without the noise scale; XLA's: its "
        "count of FLOPs over the formula's; MiB: what the all-reduces sum"
    ]
    compared = [b for b in batches if b.step.fits and b.plain_step.fits]
    if compared:
        operations = max(len(b.step.collectives) - len(b.plain_step.collectives) for b in compared)
        num_bytes = max(_bytes_reduced(b.step) - _bytes_reduced(b.plain_step) for b in compared)
        lines.append(f"the noise scale adds {operations} collective operations and {num_bytes} bytes to them, at most")
    for model_batches in _by_model(batches):
        lines.append(f"evaluation of {model_batches[0].program.model.name}: {_gib(model_batches[0].evaluation)} GiB")
    for batch in batches:
        if batch.nearest_batches:
            near = " or ".join(f"{tokens:,}" for tokens in batch.nearest_batches)
            lines.append(
                f"batch of {batch.batch_tokens:,} tokens is {batch.program.batch_sequences} sequences, which "
                f"{len(slice_.devices)} chips can't share: {batch.slice_name} can; nearest that they can: "
                f"{near} tokens"
            )
    lines += [f"DOESN'T FIT: {b.program.model.name}, batch of {b.batch_tokens:,} tokens" for b in batches if not b.fits]
    return list(dict.fromkeys(lines))  # models of one context say the same of a batch


def _by_model(batches: Sequence[CompiledBatch]) -> list[list[CompiledBatch]]:
    batches = sorted(batches, key=lambda batch: batch.batch_tokens)
    models = dict.fromkeys(batch.program.model for batch in sorted(batches, key=lambda b: b.program.model.num_params))
    return [[batch for batch in batches if batch.program.model == model] for model in models]


def _gib(executable: Executable) -> str:
    return "too large" if executable.memory_bytes is None else f"{executable.memory_bytes / _GIB:.3g}"


def _bytes_reduced(executable: Executable) -> int:
    return sum(collective.num_bytes for collective in executable.collectives)
