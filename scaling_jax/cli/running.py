"""Commands that train."""

import dataclasses
import sys
from pathlib import Path
from typing import Literal

import tyro

from scaling_jax.cli import Folder, Overrides, Size, app
from scaling_jax.cli.results import show
from scaling_jax.io import UserError


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

    from scaling_jax.scanning.experiment import DEMO, QUICK

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
      executor: who trains: this machine, or a Ray cluster or SLURM queue that shares the results folder.
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

    from scaling_jax.cli.planned_run import with_other_halves
    from scaling_jax.io.config import with_overrides
    from scaling_jax.scanning.records import load_experiment

    loaded = with_overrides(load_experiment(experiment), with_other_halves(overrides))
    _scan(loaded, results, dry_run, tensorboard, wandb, executor, executor_options)


@app.command
def train(
    run_file: tyro.conf.Positional[Path | None] = None,
    overrides: Overrides = (),
    name: str | None = None,
    learning_rate: float | None = None,
    batch_tokens: Size | None = None,
    ramp: Path | None = None,
    model: str | None = None,
    text: str | None = None,
    tokenizer: str | None = None,
    context: Size | None = None,
    max_tokens: Size | None = None,
    max_steps: Size | None = None,
    target_loss: float | None = None,
    seed: int | None = None,
    results: Path = Path("results/train"),
    dry_run: bool = False,
    tensorboard: bool = False,
    wandb: str | None = None,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Train one run with its noise scale measured at every step; the same command continues it.

    Example: scaling-jax train --model 2x64 --batch-tokens 2Ki --learning-rate 2e-3 --max-tokens 4M

    Args:
      run_file: a Python file that defines RUN = Run(…), or RUNS by name, or an earlier run's config.json; flags change
        its values. Without it flags say all.
      overrides: any value of the run, such as model.compute_dtype=bfloat16 warmup_steps=500 microbatch_tokens=16Ki
        optimizer.name=adamw optimizer.weight_decay=0.1 optimizer.clip_norm=1 average_half_life_tokens=1e6
        live_ramp.threshold=0.5 live_ramp.max_batch_tokens=64Ki.
      name: which of RUNS.
      learning_rate: after warm-up, for the first batch size.
      batch_tokens: tokens per step; or give --ramp.
      ramp: a batch size that grows, as 'advise --write-ramp' writes it.
      model: layers x width, such as 2x64 (unless given), 4x256 or 12x768.
      text: 'python' (unless given), 'files:<glob>' or 'tfds:<name>'; see 'data prepare'.
      tokenizer: bytes (unless given), gpt2, or bpe:<vocabulary>.
      context: tokens per sequence; 64 unless given.
      max_tokens: where to end; or give --max-steps.
      max_steps: where to end.
      target_loss: ends the run once the test loss, nats per token, is below it.
      seed: of parameters and of the order of the text.
      results: where to keep the run: a folder that all processes see, or gs://bucket/folder.
      dry_run: print the run that would be trained, as JSON, and train nothing.
      tensorboard: write event files beside the run's metrics.
      wandb: the Weights & Biases project that the run is shown in.
      coordinator: host:port of the first of several processes that train the run together, where they don't find each
        other by themselves (on TPU pods, under SLURM and Open MPI they do).
      num_processes: how many there are.
      process_id: which this one is, from 0.
    """
    from scaling_jax.parallel import connect, is_first, together

    if not dry_run:
        connect(coordinator, num_processes, process_id)  # before JAX looks for devices

    from scaling_jax.cli.planned_run import planned_run, with_vocabulary

    flags = {
        "learning_rate": learning_rate,
        "batch_tokens": batch_tokens,
        "text": text,
        "tokenizer": tokenizer,
        "max_tokens": max_tokens,
        "max_steps": max_steps,
        "target_loss": target_loss,
        "seed": seed,
    }
    given = {key: value for key, value in flags.items() if value is not None}
    run = planned_run(given, overrides, run_file=run_file, name=name, ramp=ramp, model=model, context=context)
    if dry_run:
        from scaling_jax.io.files import as_json

        print(as_json(run))
        return

    from scaling_jax.console import commands
    from scaling_jax.console.dashboards import asked_for
    from scaling_jax.data import prepare
    from scaling_jax.io.stores import working_copy
    from scaling_jax.parallel.devices import share_cores

    corpus = prepare(run.text, run.model.context, run.tokenizer)
    if run_file is None:
        run = with_vocabulary(run, corpus.vocab_size, overrides)
    share_cores([run.batch_sequences, *(stage.batch_tokens // run.model.context for stage in run.ramp)])
    with together():
        results = working_copy(results, is_first())
    commands.train_on_console(run, results, corpus, asked_for(tensorboard, wandb))


@app.command
def branch(
    results: tyro.conf.Positional[Path],
    batch_tokens: Size,
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
    from scaling_jax.console import commands
    from scaling_jax.results import read_results

    found = read_results(results)
    models = [model] if model else [subject.model.name for subject in found.scan.subjects]
    commands.branch_on_console(found, models, batch_tokens, tolerance, most_points=points)
    show(found.folder)


def _scan(experiment, results, dry_run, tensorboard, wandb, executor="local", executor_options=()) -> None:
    from scaling_jax.console import commands
    from scaling_jax.console.dashboards import asked_for
    from scaling_jax.io.stores import working_copy
    from scaling_jax.parallel import is_first, together

    with together():
        results = working_copy(results or Path("results") / experiment.name, is_first())
    if dry_run:
        from rich.console import Console

        from scaling_jax.console.tables import plan_table
        from scaling_jax.scanning.plan import plan_scan

        Console().print(plan_table(plan_scan(experiment, results)), highlight=False)
        return
    engine = {"executor": executor, "executor_options": executor_options}
    commands.scan_on_console(experiment, results, asked_for(tensorboard, wandb), **engine)
    with together():
        if is_first():
            show(results)


@app.command(name="compile")
def compile_ahead(experiment: tyro.conf.Positional[Path], topology: str = "v5e:16x16") -> None:
    """Compile every batch size of an experiment for a TPU slice, without one; exit code 1 if something doesn't fit.

    Example: scaling-jax compile experiments/gpt_85m_ramp.py --topology v5p:4x4x8

    Args:
      experiment: a Python file that defines EXPERIMENT, or RUNS by name.
      topology: v4, v5e, v5p or v6e and the slice's shape, such as v5e:4x4 or v5p:4x4x8.
    """
    from rich.console import Console

    from scaling_jax.compile.ahead_of_time import compile_runs, planned_runs
    from scaling_jax.compile.topologies import topology as find_topology
    from scaling_jax.console.tables import print_compiled
    from scaling_jax.scanning.records import load_plan

    runs, slice_, console = planned_runs(load_plan(experiment)), find_topology(topology), Console()
    with console.status(f"compiling for {slice_.name}") as status:
        batches = []
        for batch in compile_runs(runs, slice_):
            batches.append(batch)
            status.update(f"compiling for {slice_.name}: {len(batches)} of {len(runs)} batch sizes done")
    console.print(print_compiled(batches, slice_), highlight=False)
    if not all(batch.fits for batch in batches):
        sys.exit(1)
