"""Commands that train."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from scaling_jax.cli.app import Folder, app
from scaling_jax.cli.results import show
from scaling_jax.errors import UserError

Overrides = Annotated[tuple[str, ...], tyro.conf.arg(name="set", metavar="KEY=VALUE")]


@app.command
def demo(
    quick: bool = False,
    results: Folder = None,
    text: str = "python",
    dry_run: bool = False,
    tensorboard: bool = False,
    wandb: str | None = None,
) -> None:
    """Measure the critical batch size of two small models on this machine, and draw it.

    Interrupt it as you like: the same command continues.

    Example: scaling-jax demo --quick

    Args:
      quick: smaller models and higher losses, two to three minutes.
      results: where to keep runs, tables and figures; results/demo unless given.
      text: 'python' (the standard library's sources) or 'files:<glob>' for text of your own.
      dry_run: say what it would take, and train nothing.
      tensorboard: write event files beside each run's metrics.
      wandb: the Weights & Biases project that runs are shown in.
    """
    from scaling_jax.parallel import connect

    if not dry_run:
        connect()  # before JAX looks for devices

    from scaling_jax.scanning.demo import DEMO, QUICK

    experiment = dataclasses.replace(QUICK if quick else DEMO, text=text)
    _scan(experiment, results, dry_run, tensorboard, wandb)


@app.command
def scan(
    experiment: tyro.conf.Positional[Path],
    overrides: Overrides = (),
    results: Folder = None,
    dry_run: bool = False,
    executor: Literal["local", "ray", "slurm"] = "local",
    executor_options: tuple[str, ...] = (),
    tensorboard: bool = False,
    wandb: str | None = None,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Train every run of an experiment file, fit and draw; continues what was interrupted.

    Example: scaling-jax scan experiments/demo.py --set max_tokens=2e6 --results results/short

    Args:
      experiment: a Python file that defines EXPERIMENT, such as experiments/demo.py.
      overrides: values that differ from the file's, such as max_tokens=2e6 seeds=[0,1] optimizer.beta2=0.95.
      results: where to keep runs, tables and figures, also gs://bucket/folder; results/<experiment's name> unless
        given.
      dry_run: say what it would take, and train nothing.
      executor: who runs the groups: this machine, or a Ray cluster or SLURM queue that shares the results folder.
      executor_options: the engine's own, such as num_gpus=1 (Ray) or slurm_partition=gpu (SLURM).
      tensorboard: write event files beside each run's metrics.
      wandb: the Weights & Biases project that runs are shown in.
      coordinator: host:port of the first of several processes that train each run together; see `train`.
      num_processes: how many there are.
      process_id: which this one is, from 0.
    """
    from scaling_jax.parallel import connect

    if executor != "local" and coordinator is not None:
        raise UserError("--coordinator joins processes that train each run together, which --executor local does")
    if executor == "local" and not dry_run:
        connect(coordinator, num_processes, process_id)  # before JAX looks for devices

    from scaling_jax.config import with_overrides
    from scaling_jax.scanning.files import load_experiment

    loaded = with_overrides(load_experiment(experiment), overrides)
    _scan(loaded, results, dry_run, tensorboard, wandb, executor, executor_options)


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
    tensorboard: bool = False,
    wandb: str | None = None,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Train one run with its noise scale measured at every step; the same command continues it.

    Example: scaling-jax train --model 2x64 --batch-tokens 2048 --learning-rate 2e-3 --max-tokens 4000000

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
      results: where to keep the run: a folder that all processes see, or gs://bucket/folder.
      tensorboard: write event files beside the run's metrics.
      wandb: the Weights & Biases project that the run is shown in.
      coordinator: host:port of the first of several processes that train the run together, where they don't find each
        other by themselves (on TPU pods, under SLURM and Open MPI they do).
      num_processes: how many there are.
      process_id: which this one is, from 0.
    """
    from scaling_jax.parallel import connect, together

    connect(coordinator, num_processes, process_id)  # before JAX looks for devices

    from scaling_jax import live
    from scaling_jax.data import prepare
    from scaling_jax.models import model_config
    from scaling_jax.parallel.placement import share_cores
    from scaling_jax.trackers import asked_for
    from scaling_jax.training import Run
    from scaling_jax.training.buckets import working_copy
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
    share_cores([stage.batch_tokens // context for stage in stages] or [run.batch_sequences])
    with together():
        results = working_copy(results)
    live.train_on_console(run, results, corpus, asked_for(tensorboard, wandb))


@app.command
def branch(
    results: tyro.conf.Positional[Path],
    batch_tokens: int,
    model: str | None = None,
    tolerance: float = 0.01,
    points: int = 8,
) -> None:
    """Measure the critical batch size along a scan's runs by branches at larger batches (Merrill et al. 2025).

    Writes branches.csv, which the report then shows beside the scan and the noise scale.

    Example: scaling-jax branch results/demo --batch-tokens 512

    Args:
      results: the folder of a finished scan.
      batch_tokens: whose best runs are branched; well below the critical batch size.
      model: all of the scan's unless given.
      tolerance: nats per token by which a branch may fall behind and still keep up.
      points: places along each run, at most.
    """
    from scaling_jax import live
    from scaling_jax.analysis import read_experiment
    from scaling_jax.training.buckets import working_copy

    results = working_copy(results)
    experiment = read_experiment(results)
    models = [model] if model else [subject.model.name for subject in experiment.subjects]
    live.branch_on_console(experiment, results, models, batch_tokens, tolerance, most_points=points)
    show(results)


def _scan(experiment, results, dry_run, tensorboard, wandb, executor="local", executor_options=()) -> None:
    from scaling_jax import live
    from scaling_jax.parallel import is_first, together
    from scaling_jax.trackers import asked_for
    from scaling_jax.training.buckets import working_copy

    with together():
        results = working_copy(results or Path("results") / experiment.name)
    if dry_run:
        from rich.console import Console

        from scaling_jax.report.plan_table import plan_table
        from scaling_jax.scanning.plan import plan_scan

        Console().print(plan_table(plan_scan(experiment, results)), highlight=False)
        return
    engine = {"executor": executor, "executor_options": executor_options}
    live.scan_on_console(experiment, results, asked_for(tensorboard, wandb), **engine)
    with together():
        if is_first():
            show(results)
