"""Commands that read results."""

from pathlib import Path

import tyro

from scaling_jax.cli.app import app
from scaling_jax.errors import UserError


@app.command
def status(results: tyro.conf.Positional[Path], json: bool = False) -> None:
    """How far the scan in a folder is: groups, newest losses, time left; while it runs and after.

    Example: scaling-jax status results/demo

    Args:
      results: the folder that a scan writes, or gs://bucket/folder.
      json: print it for machines.
    """
    from rich.console import Console

    from scaling_jax.analysis.plain import as_json
    from scaling_jax.report.status import print_status, read_status
    from scaling_jax.training.buckets import working_copy

    found = read_status(working_copy(results))
    if json:
        print(as_json(found))
    else:
        Console().print(print_status(found), highlight=False)


@app.command
def fit(results: tyro.conf.Positional[Path], json: bool = False) -> None:
    """Fit a finished scan again, or a table of your own: critical batch sizes and their law, fit.json.

    Example: scaling-jax fit mine.csv

    Args:
      results: the folder that a scan wrote, or a CSV with columns model, batch_tokens, target_loss, steps.
      json: print fit.json instead of a table.
    """
    from rich.console import Console

    from scaling_jax.analysis import analyse
    from scaling_jax.analysis.table_fit import fit_table, write_fit
    from scaling_jax.report.fitted_table import print_fit
    from scaling_jax.report.summary import summary
    from scaling_jax.training.buckets import working_copy

    results = working_copy(results)
    if results.suffix == ".csv" and not results.exists():
        raise UserError(f"no table {results}")
    if results.is_file():
        found = fit_table(results)
        written = write_fit(found)
        table = print_fit(found, written)
    else:
        analysis = analyse(results)
        written = results / "fit.json"
        table = summary(analysis, [], results)
    if json:
        print(written.read_text(), end="")
    else:
        Console().print(table, highlight=False)


@app.command
def report(results: tyro.conf.Positional[Path], tensorboard: bool = False, wandb: str | None = None) -> None:
    """Fit a finished scan again and write its figures and report.html.

    Example: scaling-jax report results/demo --tensorboard

    Args:
      results: the folder that a scan wrote, or gs://bucket/folder.
      tensorboard: write event files beside each run's metrics.
      wandb: the Weights & Biases project that runs are shown in.
    """
    from scaling_jax.trackers import Follower, asked_for
    from scaling_jax.training.buckets import working_copy

    results = working_copy(results)
    for writer in asked_for(tensorboard, wandb):
        with Follower(results, writer):
            pass
    show(results)


@app.command
def advise(
    results: tyro.conf.Positional[Path],
    target_loss: float,
    model: str | None = None,
    budget_tokens: float | None = None,
    devices: int | None = None,
    tokens_per_second: float | None = None,
    device_batch_tokens: float = 0.0,
    start_batch_tokens: int | None = None,
    max_batch_tokens: int | None = None,
    ramp_fraction: float = 1.0,
    write_ramp: Path | None = None,
    extrapolate: bool = False,
    json: bool = False,
) -> None:
    """Batch size against steps, tokens, time and extra compute to one loss; the knee; a batch ramp.

    Example: scaling-jax advise results/demo --target-loss 2.2 --write-ramp ramp.json

    Args:
      results: a results folder with measurements.csv, or such a CSV.
      target_loss: nats per token.
      model: which one's steps; the one that got to the lowest loss unless given.
      budget_tokens: finds the largest batch that gets there within so many tokens.
      devices: that share each batch; with --tokens-per-second, for wall time.
      tokens_per_second: of one device.
      device_batch_tokens: tokens per step from which on a device is that fast.
      start_batch_tokens: of the ramp.
      max_batch_tokens: of the ramp.
      ramp_fraction: the ramp's batch stays below this share of B_crit; less takes more steps and fewer tokens.
      write_ramp: file for the ramp's stages, as JSON.
      extrapolate: allow losses outside of those measured.
      json: print it for machines.
    """
    from rich.console import Console

    from scaling_jax.advice import console
    from scaling_jax.advice.choices import Hardware
    from scaling_jax.analysis.plain import as_json
    from scaling_jax.training.buckets import working_copy

    if (devices is None) != (tokens_per_second is None):
        raise UserError("--devices and --tokens-per-second go together")
    hardware = None
    if devices is not None and tokens_per_second is not None:
        hardware = Hardware(devices, tokens_per_second, device_batch_tokens)
    advice = console.advise(
        working_copy(results),
        target_loss,
        model=model,
        budget_tokens=budget_tokens,
        hardware=hardware,
        start_batch_tokens=start_batch_tokens,
        max_batch_tokens=max_batch_tokens,
        fraction=ramp_fraction,
        extrapolate=extrapolate,
    )
    if write_ramp is not None:
        console.write_stages(write_ramp, advice.stages)
    if json:
        print(as_json(advice))
    else:
        Console().print(console.print_advice(advice), highlight=False)


def show(results: Path) -> None:
    """Fits a finished scan, draws it and says what came out."""
    from rich.console import Console

    from scaling_jax.analysis import analyse
    from scaling_jax.report import write_figures, write_report
    from scaling_jax.report.summary import summary
    from scaling_jax.training.buckets import address, in_bucket

    console = Console()
    analysis = analyse(results)
    figures = write_figures(analysis, results)
    console.print(summary(analysis, [path.name for path in figures], figures[0].parent), highlight=False)
    console.print(f"report: {write_report(analysis, results)}", highlight=False, markup=False, soft_wrap=True)
    if in_bucket(results):
        console.print(f"all of it is in {address(results)}", highlight=False, markup=False, soft_wrap=True)
