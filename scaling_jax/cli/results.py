"""The commands that read results: status, fit, report, advise."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from scaling_jax.cli import Size, app
from scaling_jax.cli.budgets import fit_budgets, refuse_budget_scan, table_of
from scaling_jax.io import UserError

if TYPE_CHECKING:
    from scaling_jax.advice.choices import Hardware


@app.command
def status(results: tyro.conf.Positional[Path], json: bool = False) -> None:
    """Show how far the scan or the runs in a folder are, with their newest losses. Also works during training.

    Example: scaling-jax status results/demo

    Args:
      results: a folder that a scan or `train` writes, or gs://bucket/folder.
      json: print JSON.
    """
    from scaling_jax.console.tables import status_table
    from scaling_jax.console.terminal import Terminal, Working
    from scaling_jax.io.files import as_json
    from scaling_jax.results.status import read_status

    with Working("reading runs") as working:
        found = read_status(results, working.count)
    if json:
        print(as_json(found))
    else:
        Terminal(_in_unit_of(results)).print(status_table(found))


@app.command
def fit(
    results: tyro.conf.Positional[Path],
    above_minimum: bool = False,
    to_steps: bool = False,
    penalty: str | None = None,
    json: bool = False,
    latex: Path | None = None,
) -> None:
    """Fit critical batch sizes and their law to a finished scan, or to your own table.

    A table of losses at fixed numbers of tokens, with columns model, batch_tokens, tokens, loss and perhaps
    learning_rate and seed, gives the best batch at each budget instead, and figures. Writes fit.json into the folder of
    a scan, or <table>.fit.json beside a table.

    Example: scaling-jax fit mine.csv

    Args:
      results: the folder of a finished scan or budget scan, or a CSV with columns model, batch_tokens, target_loss,
        steps.
      above_minimum: where a table's tokens are U-shaped over batch sizes, fit the batches above the minimum.
      to_steps: turn losses at several budgets into steps to a loss, by interpolation, and fit those.
      penalty: tell the largest batch whose loss is this far above that of the best one, in nats per token or as a share
        of the loss, such as 1%; by default 0.01.
      json: print what is written instead of a table.
      latex: also write the table to this file, for LaTeX.
    """
    from scaling_jax.console.tables import print_fit, summary
    from scaling_jax.console.terminal import Terminal, Working
    from scaling_jax.io.stores import working_copy
    from scaling_jax.results import analyse, read_results
    from scaling_jax.results.budget_table import is_budget_table
    from scaling_jax.results.table import fit_table, write_fit

    results = table_of(working_copy(results))
    if results.suffix == ".csv" and not results.exists():
        raise UserError(f"there is no table {results}: give the path of a CSV file")
    budgets = results.is_file() and is_budget_table(results)
    if budgets and not to_steps:
        for given, flag in ((above_minimum, "--above-minimum"), (latex, "--latex")):
            if given:
                raise UserError(f"{flag} is for steps to a loss: give --to-steps too, or leave it out")
        fit_budgets(results, penalty or "0.01", json)
        return
    if (to_steps or penalty) and not (budgets and to_steps and not penalty):
        raise UserError(
            "--penalty goes without --to-steps, as it is for budgets"
            if budgets
            else "--to-steps and --penalty are for a table of losses at fixed tokens: model,batch_tokens,tokens,loss"
        )
    if results.is_file():
        if to_steps:
            from scaling_jax.results.budget_table import interpolated_note, write_steps

            results = write_steps(results)
        with Working("fitting the table"):
            found = fit_table(results, above_minimum=above_minimum)
            if to_steps:
                found = dataclasses.replace(found, notes=(interpolated_note(results), *found.notes))
        written, fitted = write_fit(found), found.fit
        table = print_fit(found, written)
    else:
        if above_minimum:
            raise UserError(f"--above-minimum is for tables: give {results / 'measurements.csv'}")
        with Working("reading runs") as working:
            runs = read_results(results, on_run=working.count)
            working.say("fitting")
            analysis = analyse(runs)
        written, fitted = results / "fit.json", analysis.fit
        table = summary(analysis, written=written)
    said = _in_unit_of(results)
    if latex is not None:
        from scaling_jax.io.files import write_whole
        from scaling_jax.report.latex import latex_table

        write_whole(latex, said(latex_table(fitted)))
    if json:
        print(written.read_text(), end="")
    else:
        Terminal(said).print(table)


@app.command
def report(results: tyro.conf.Positional[Path], tensorboard: bool = False, wandb: str | None = None) -> None:
    """Write report.html and figures. For a finished scan, fit it first; single runs get a report without a fit.

    Example: scaling-jax report results/demo --tensorboard

    Args:
      results: a folder that a scan or `train` wrote, or gs://bucket/folder.
      tensorboard: also write TensorBoard event files next to each run's metrics.
      wandb: also send the runs to this Weights & Biases project.
    """
    from scaling_jax.console.dashboards import Follower, asked_for
    from scaling_jax.io.stores import working_copy

    results = working_copy(results)
    refuse_budget_scan(results, "report")
    for writer in asked_for(tensorboard, wandb):
        with Follower(results, writer):
            pass
    show(results)


@app.command
def advise(
    results: tyro.conf.Positional[Path],
    target_loss: float | None = None,
    tokens: Size | None = None,
    flops: float | None = None,
    params: Size | None = None,
    weight_decay: float | None = None,
    model: str | None = None,
    budget_tokens: Size | None = None,
    devices: int | None = None,
    tokens_per_second: float | None = None,
    device_batch_tokens: float = 0.0,
    start_batch_tokens: Size | None = None,
    max_batch_tokens: Size | None = None,
    ramp_fraction: float = 1.0,
    late_switch: float | None = None,
    reference_batch_tokens: Size | None = None,
    write_ramp: Path | None = None,
    format: str = "json",
    context: int | None = None,
    drop_rates: bool = False,
    extrapolate: bool = False,
    json: bool = False,
) -> None:
    """Show steps, tokens, compute, wall time and learning rate to one loss for each batch size; B_crit; a batch ramp.

    Or, for a number of tokens in place of a loss: the best batch, its steps, learning rate, weight decay and wall time.
    Then the folder may also be that of one run, which may still train: its noise scale is carried to the horizon.

    Example: scaling-jax advise results/demo --target-loss 2.2 --write-ramp ramp.json

    Args:
      results: the folder of a scan after `fit`, or of a budget scan, or a CSV table as `fit` takes; with --tokens also
        that of a single run.
      target_loss: loss to reach, in nats per token.
      tokens: tokens of the whole run, in place of a loss; 1e13 are ten trillion.
      flops: its compute, in place of tokens, with --params.
      params: the model's number of parameters.
      weight_decay: AdamW's of the runs; with --tokens, the one that keeps its timescale is shown.
      model: model to advise on; by default the model with the lowest loss, or with --tokens all models.
      budget_tokens: show the largest batch size that reaches the loss within this many tokens.
      devices: number of devices over which each batch is split; with --tokens-per-second it gives wall time.
      tokens_per_second: speed of one device.
      device_batch_tokens: batch size (tokens per device) at which the device reaches full speed.
      start_batch_tokens: first batch size of the ramp.
      max_batch_tokens: largest batch size of the ramp.
      ramp_fraction: the ramp's batch size stays below this fraction of the local B_crit; a smaller fraction needs more
        steps and fewer tokens.
      late_switch: instead, a ramp of one switch to --max-batch-tokens, as early as this share of tokens above those of
        the first batch alone allows, such as 0.1.
      reference_batch_tokens: CBS20 is 20 % over linear scaling from this batch size (Zhang et al. 2024 take 256
        sequences); by default the smallest batch size of the runs.
      write_ramp: write the ramp's stages to this file.
      format: of the ramp: json, megatron, megatron-rampup, olmo-core or maxtext (docs/running.md).
      context: tokens of a sequence, for the formats that count sequences; by default that of the model.
      drop_rates: leave out the ramp's learning rates where the format has none.
      extrapolate: allow a loss outside the measured range.
      json: print JSON.
    """
    from scaling_jax.advice import advise as advice_on
    from scaling_jax.advice.horizon import advise_tokens, tokens_of
    from scaling_jax.advice.live_run import advise_run, run_folder_of
    from scaling_jax.console.advice import advice_table
    from scaling_jax.console.horizon import horizon_table
    from scaling_jax.console.terminal import Terminal
    from scaling_jax.io.files import as_json
    from scaling_jax.io.stores import working_copy

    if tokens is not None or flops is not None or target_loss is None:
        if (tokens is None) == (flops is None) or target_loss is not None:
            raise UserError("give one of --target-loss, --tokens and --flops")
        for value, flag in ((budget_tokens, "--budget-tokens"), (write_ramp, "--write-ramp")):
            if value is not None:
                raise UserError(f"{flag} goes with --target-loss, not with --tokens or --flops")
        wanted = tokens if tokens is not None else tokens_of(flops or 0.0, params)
        folder = working_copy(results)
        options: dict[str, Any] = {
            "model": model,
            "hardware": _hardware(devices, tokens_per_second, device_batch_tokens),
            "weight_decay": weight_decay,
        }
        single_run = run_folder_of(folder)
        if single_run is None:
            found = advise_tokens(table_of(folder), wanted, **options)
        else:
            found = advise_run(single_run, wanted, **options)
        if json:
            print(as_json(found))
        else:
            Terminal(_in_unit_of(results)).print(horizon_table(found))
        return
    maxtext = write_ramp is not None and format == "maxtext" and tokens_per_second is None
    hardware = None if maxtext else _hardware(devices, tokens_per_second, device_batch_tokens)
    advice = advice_on.advise(
        working_copy(results),
        target_loss,
        model=model,
        budget_tokens=budget_tokens,
        hardware=hardware,
        start_batch_tokens=start_batch_tokens,
        max_batch_tokens=max_batch_tokens,
        fraction=ramp_fraction,
        extra_tokens=late_switch,
        reference_batch_tokens=reference_batch_tokens,
        extrapolate=extrapolate,
    )
    if write_ramp is not None:
        advice_on.write_stages(
            write_ramp,
            advice.stages,
            format,
            context=context or advice.context,
            devices=devices,
            drop_rates=drop_rates,
        )
    if json:
        print(as_json(advice))
    else:
        Terminal(_in_unit_of(results)).print(advice_table(advice))


def _hardware(devices: int | None, tokens_per_second: float | None, device_batch_tokens: float) -> "Hardware | None":
    from scaling_jax.advice.choices import Hardware

    if (devices is None) != (tokens_per_second is None):
        raise UserError("give both --devices and --tokens-per-second, or neither")
    if devices is None or tokens_per_second is None:
        return None
    return Hardware(devices, tokens_per_second, device_batch_tokens)


def show(folder: Path) -> None:
    """Fits a finished scan, prints its summary, and writes figures and a report. Single runs only get a report."""
    from scaling_jax.console.tables import summary
    from scaling_jax.console.terminal import Terminal, Working
    from scaling_jax.io.stores import address, in_bucket
    from scaling_jax.report import write_figures, write_report, write_runs_report
    from scaling_jax.results import analyse, read_results

    console = Terminal(_in_unit_of(folder))
    with Working("reading runs") as working:
        results = read_results(folder, on_run=working.count)
        if results.experiment is None:
            working.say("writing the report")
            report = write_runs_report(results)
        else:
            working.say("fitting")
            analysis = analyse(results)
            working.say("drawing figures")
            figures = write_figures(analysis)
    if results.experiment is not None:
        console.print(summary(analysis, figures))
        with Working("writing the report"):
            report = write_report(analysis)
    console.print(f"report: {report}", soft_wrap=True)
    if in_bucket(results.folder):
        console.print(f"all files are in {address(results.folder)}", soft_wrap=True)


def _in_unit_of(results: Path) -> Callable[[str], str]:
    """How to say a text on results: with the unit that their models count."""
    from scaling_jax.io.stores import working_copy
    from scaling_jax.report.units import in_unit
    from scaling_jax.scanning.budget_records import is_budget_scan, read_budget_scan
    from scaling_jax.scanning.records import read_experiment

    folder, unit = working_copy(results), "tokens"
    if (folder / "experiment.json").exists():
        unit = read_experiment(folder).unit
    elif is_budget_scan(folder):
        unit = read_budget_scan(folder).unit
    return functools.partial(in_unit, unit=unit)
