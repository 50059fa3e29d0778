"""`scaling-jax …`: parse, call, print."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import tyro

from scaling_jax.errors import UserError

app = tyro.extras.SubcommandApp()
Folder = Annotated[Path | None, tyro.conf.arg(metavar="FOLDER")]


@app.command
def demo(quick: bool = False, results: Folder = None, text: str = "python") -> None:
    """Measure the critical batch size of two small models on this machine, and draw it.

    Interrupt it as you like: the same command continues.

    Args:
      quick: smaller models and higher losses, under two minutes.
      results: where to keep runs, tables and figures; results/demo unless given.
      text: 'python' (the standard library's sources) or 'files:<glob>' for text of your own.
    """
    from scaling_jax.scanning.demo import DEMO, QUICK

    experiment = dataclasses.replace(QUICK if quick else DEMO, text=text)
    _scan_and_report(experiment, results or Path("results") / experiment.name)


@app.command
def scan(experiment: tyro.conf.Positional[Path], results: Folder = None) -> None:
    """Train every run of an experiment file, fit and draw; continues what was interrupted.

    Args:
      experiment: a Python file that defines EXPERIMENT, such as experiments/demo.py.
      results: where to keep runs, tables and figures; results/<experiment's name> unless given.
    """
    from scaling_jax.scanning.files import load_experiment

    loaded = load_experiment(experiment)
    _scan_and_report(loaded, results or Path("results") / loaded.name)


@app.command
def train(
    learning_rate: float,
    batch_tokens: int | None = None,
    ramp: Path | None = None,
    model: str = "2x64",
    text: str = "python",
    tokenizer: str = "bytes",
    context: int = 64,
    max_tokens: int | None = None,
    max_steps: int | None = None,
    target_loss: float | None = None,
    seed: int = 0,
    results: Path = Path("results/train"),
) -> None:
    """Train one run with its noise scale measured at every step; the same command continues it.

    Args:
      learning_rate: after warm-up, for the first batch size; Adam's.
      batch_tokens: tokens per step; or give --ramp.
      ramp: a batch size that grows, as 'advise --write-ramp' writes it.
      model: layers x width, such as 2x64, 4x256 or 12x768.
      text: 'python', 'files:<glob>' or 'tfds:<name>'; see 'data prepare'.
      tokenizer: bytes, gpt2, or bpe:<vocabulary>.
      context: tokens per sequence.
      max_tokens: where to end; or give --max-steps.
      max_steps: where to end.
      target_loss: ends the run once the test loss, nats per token, is below it.
      seed: of parameters and of the order of the text.
      results: where to keep the run.
    """
    from scaling_jax import live
    from scaling_jax.data import prepare
    from scaling_jax.models import model_config
    from scaling_jax.training import Run
    from scaling_jax.training.ramp import read_stages

    if (batch_tokens is None) == (ramp is None):
        raise UserError("give exactly one of --batch-tokens and --ramp")
    stages = read_stages(ramp) if ramp else ()
    corpus = prepare(text, context, tokenizer)
    run = Run(
        model=model_config(model, context=context, vocab_size=corpus.vocab_size),
        batch_tokens=stages[0].batch_tokens if stages else batch_tokens or 0,
        learning_rate=learning_rate,
        ramp=stages[1:],
        seed=seed,
        text=text,
        tokenizer=tokenizer,
        target_loss=target_loss,
        max_steps=max_steps,
        max_tokens=max_tokens,
    )
    live.train_on_console(run, results, corpus)


@app.command
def fit(results: tyro.conf.Positional[Path]) -> None:
    """Fit a finished scan again, or a table of your own: critical batch sizes and their law, fit.json.

    Args:
      results: the folder that a scan wrote, or a CSV with columns model, batch_tokens, target_loss, steps.
    """
    if not results.is_file():
        _report(results)
        return
    from rich.console import Console

    from scaling_jax.analysis.table_fit import fit_table, print_fit, write_fit

    found = fit_table(results)
    Console().print(print_fit(found, write_fit(found)), highlight=False)


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
) -> None:
    """Batch size against steps, tokens, time and extra compute to one loss; the knee; a batch ramp.

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
    """
    from rich.console import Console

    from scaling_jax.advice import console
    from scaling_jax.advice.choices import Hardware

    if (devices is None) != (tokens_per_second is None):
        raise UserError("--devices and --tokens-per-second go together")
    hardware = Hardware(devices, tokens_per_second, device_batch_tokens) if devices and tokens_per_second else None
    advice = console.advise(
        results,
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
    Console().print(console.print_advice(advice), highlight=False)


data = tyro.extras.SubcommandApp()
app.command(data, name="data", help="Pack text into token rows once, and look at them.")


@data.command(name="prepare")
def prepare_data(
    source: tyro.conf.Positional[str],
    tokenizer: str = "bytes",
    context: int = 64,
    workers: int | None = None,
    check: bool = False,
) -> None:
    """Pack text into token rows, once; training and scans on the same text then use them.

    Interrupt it as you like: the same command continues.

    Args:
      source: 'python', 'files:<glob>[#field]' (text, .jsonl[.gz|.zst]) or 'tfds:<name>[/<config>][#field]'.
      tokenizer: bytes, gpt2, or bpe:<vocabulary>, trained on the source's train split.
      context: tokens per row; one packing serves any.
      workers: processes; one a core unless given.
      check: compare all checksums of what was packed before.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    from scaling_jax.data import prepare
    from scaling_jax.data.inspection import summary

    console = Console()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(f"reading {source}", total=None)
        corpus = prepare(
            source,
            context,
            tokenizer,
            workers=workers,
            check=check,
            on_progress=lambda p: progress.update(task, description=p.phase, completed=p.done, total=p.total),
        )
    console.print("\n".join(summary(corpus)), highlight=False, markup=False, soft_wrap=True)


@data.command(name="inspect")
def inspect_data(source: tyro.conf.Positional[str], tokenizer: str = "bytes", context: int = 64, rows: int = 3) -> None:
    """Check packed text against its manifest, show its counts and a few rows as text.

    Args:
      source: as for prepare.
      tokenizer: as for prepare.
      context: tokens per row.
      rows: shown of each split.
    """
    from scaling_jax.data.inspection import inspect

    print(inspect(source, context, tokenizer, rows))


def main() -> None:
    """Exit codes: 0 done, 2 it could not be done and one line says why, 130 interrupted."""
    try:
        app.cli(
            prog="scaling-jax", description="Measure, fit and plan the critical batch size of language-model training."
        )
    except UserError as error:
        print(f"scaling-jax: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; the same command continues where it was", file=sys.stderr)
        sys.exit(130)


def _scan_and_report(experiment, results: Path) -> None:
    from rich.console import Console

    from scaling_jax.live import ScanDisplay
    from scaling_jax.scanning import scan

    console = Console()
    console.print(f"{experiment.name}: results in {results}", highlight=False)
    with ScanDisplay(experiment, console) as display:
        scan(experiment, results, on_event=display.on_event)
    _report(results)


def _report(results: Path) -> None:
    from rich.console import Console

    from scaling_jax.analysis import analyse
    from scaling_jax.report import write_figures
    from scaling_jax.report.summary import summary

    analysis = analyse(results)
    figures = write_figures(analysis, results)
    Console().print(summary(analysis, [path.name for path in figures], figures[0].parent), highlight=False)


if __name__ == "__main__":
    main()
