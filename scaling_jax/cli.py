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
def fit(results: tyro.conf.Positional[Path]) -> None:
    """Fit a finished scan again: measurements.csv, noise_scale.csv, fit.json, figures.

    Args:
      results: the folder that a scan wrote.
    """
    _report(results)


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
    Console().print(summary(analysis, [str(path) for path in figures]), highlight=False)


if __name__ == "__main__":
    main()
