"""The commands that train or compile: demo, scan, train, branch, compile."""

import dataclasses
import functools
import sys
from pathlib import Path
from typing import Literal

import tyro

from scaling_jax.cli import Folder, Overrides, Size, app
from scaling_jax.cli.budgets import refuse_budget_scan, scan_at_budgets
from scaling_jax.cli.results import show
from scaling_jax.io import UserError
from scaling_jax.io.config import check_positive


@app.command
def demo(
    quick: bool = False,
    results: Folder = None,
    text: str = "python",
    dry_run: bool = False,
    tensorboard: bool = False,
    wandb: str | None = None,
) -> None:
    """Measure the critical batch size of two small models on this machine. Writes figures and a report.

    You can interrupt it at any time. Run the same command again to continue.

    Example: scaling-jax demo --quick

    Args:
      quick: use smaller models and higher losses; takes two to three minutes.
      results: folder for runs, tables and figures; by default results/demo, or results/quick-demo with --quick.
      text: 'python' (sources of the standard library), or 'files:<glob>' for your own text.
      dry_run: time some steps, show what the demo needs, probably and at most, and train nothing.
      tensorboard: also write TensorBoard event files next to each run's metrics.
      wandb: also send the runs to this Weights & Biases project.
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
    minutes: float | None = None,
    tokens: Size | None = None,
    min_batch_tokens: Size | None = None,
    max_batch_tokens: Size | None = None,
    executor: Literal["local", "ray", "slurm"] = "local",
    executor_options: tuple[str, ...] = (),
    command: str | None = None,
    jobs: int = 1,
    retries: int = 2,
    silent_minutes: float = 30.0,
    tensorboard: bool = False,
    wandb: str | None = None,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Train all runs of an experiment, fit them, and write figures and a report. Continues an interrupted scan.

    An EXPERIMENT that is a BudgetScan, as in experiments/horizon.py, gives losses of decayed runs at several horizons,
    the table annealed.csv, and its fit.

    Example: scaling-jax scan experiments/demo.py --set max_tokens=2e6 --results results/short

    Args:
      experiment: a Python file that defines EXPERIMENT, such as experiments/demo.py, or a scan's experiment.json.
      overrides: values to change, such as max_tokens=2e6 seeds=[0,1] optimizer.beta2=0.95.
      results: folder for runs, tables and figures, or gs://bucket/folder; by default results/<name of the experiment>.
      dry_run: time some steps, show what the scan needs, probably and at most, and train nothing.
      minutes: stop after so many minutes, and fit the models and batch sizes that are done; the middle ones come first.
      tokens: the same after so many tokens of training, such as 1e9.
      min_batch_tokens: go on with half the smallest batch, down to this, until steps are in proportion to 1/B there.
      max_batch_tokens: go on with twice the largest batch, up to this, until steps hardly fall any more there.
      executor: train on this machine (local), or on a Ray cluster or SLURM queue that shares the results folder;
        also for --command.
      executor_options: options for Ray or SLURM, such as num_gpus=1 (Ray) or slurm_partition=gpu (SLURM).
      command: train by your own program, such as 'python train.py --batch {batch} --lr {learning_rate} --out {curve}',
        for an experiment with OtherModels. It writes a line with step and loss to {curve} at each evaluation. Start the
        scan on several machines to share the work, or give --executor. See docs/your_model.md.
      jobs: number of commands that run at a time: on this machine, or as jobs of Ray or SLURM.
      retries: times that a command that failed is started again.
      silent_minutes: a command that writes no evaluation for so long has failed.
      tensorboard: also write TensorBoard event files next to each run's metrics.
      wandb: also send the runs to this Weights & Biases project.
      coordinator: host:port of process 0, if several processes train each run together; see 'train'.
      num_processes: number of these processes.
      process_id: number of this process, from 0.
    """
    from scaling_jax.parallel import connect

    for name, value in (
        ("--minutes", minutes),
        ("--tokens", tokens),
        ("--min-batch-tokens", min_batch_tokens),
        ("--max-batch-tokens", max_batch_tokens),
    ):
        if value is not None:
            check_positive(name, value)
    limited = minutes is not None or tokens is not None
    if limited and (coordinator is not None or command is not None):
        raise UserError("--minutes and --tokens work in one process that trains models of this package: leave them out")
    ends = min_batch_tokens, max_batch_tokens
    if ends != (None, None) and (limited or command is not None):
        raise UserError(
            "--min-batch-tokens and --max-batch-tokens go with none of --minutes, --tokens and --command: run the scan "
            "without these first"
        )
    if executor != "local" and coordinator is not None:
        raise UserError(f"--coordinator works only with --executor local, not with --executor {executor}")
    if executor == "local" and not dry_run:
        connect(coordinator, num_processes, process_id)  # before JAX looks for devices

    from scaling_jax.cli.planned_run import with_other_halves
    from scaling_jax.io.config import with_overrides
    from scaling_jax.scanning.budget_scan import BudgetScan
    from scaling_jax.scanning.records import load_scan

    given = load_scan(experiment)
    changed = with_other_halves(given, overrides)
    if isinstance(given, BudgetScan):
        if command is not None or executor != "local" or limited or ends != (None, None):
            raise UserError(
                "a budget scan trains all of its runs, on this machine: leave out --command, --executor, --minutes, "
                "--tokens, --min-batch-tokens and --max-batch-tokens"
            )
        scan_at_budgets(with_overrides(given, changed).with_tasks_of(given), results, dry_run, tensorboard, wandb)
        return
    loaded = with_overrides(given, changed).with_tasks_of(given)
    if command is None:
        engine = {"executor": executor, "executor_options": executor_options}
        _scan(loaded, results, dry_run, tensorboard, wandb, ends, minutes=minutes, tokens=tokens, **engine)
        return
    if coordinator is not None or tensorboard or wandb:
        raise UserError(
            "--command goes with none of --coordinator, --tensorboard and --wandb: give --executor, or start the same "
            "scan on each machine that shall help"
        )
    from scaling_jax.console.by_command import scan_by_command
    from scaling_jax.scanning.by_command import Limits

    folder = results or Path("results") / loaded.name
    limits = Limits(jobs, retries, silent_minutes)
    if scan_by_command(loaded, folder, command, limits, dry_run, executor, executor_options):
        show(folder)


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
    sharding: Literal["replicated", "fsdp"] = "replicated",
    dry_run: bool = False,
    tensorboard: bool = False,
    wandb: str | None = None,
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Train one run, and measure its noise scale at every step. Run the same command again to continue it.

    Example: scaling-jax train --model 2x64 --batch-tokens 2Ki --learning-rate 2e-3 --max-tokens 4M

    Args:
      run_file: a Python file that defines RUN = Run(…) or RUNS, or the config.json of an earlier run; flags change its
        values. Without a file, give the run by flags.
      overrides: any value of the run, such as model.compute_dtype=bfloat16 warmup_steps=500 microbatch_tokens=16Ki
        optimizer.name=adamw optimizer.weight_decay=0.1 optimizer.clip_norm=1 average_half_life_tokens=1e6
        live_ramp.threshold=0.5 live_ramp.max_batch_tokens=64Ki.
      name: the name of the run, if the file defines RUNS.
      learning_rate: learning rate after warm-up, for the first batch size.
      batch_tokens: batch size in tokens; or give --ramp.
      ramp: a file with a growing batch size, written by 'advise --write-ramp'.
      model: layers x width, such as 2x64 (default) or 12x768; llama-4x256 and llama-4x256-8e2: see docs/models.md.
      text: 'python' (default), 'files:<glob>', 'tfds:<name>' or 'tokens:<glob>'; see 'data prepare'.
      tokenizer: bytes (default), gpt2, bpe:<vocabulary>, or the path of a file; see 'data prepare'.
      context: tokens per sequence; 64 by default.
      max_tokens: end the run after this many tokens; or give --max-steps.
      max_steps: end the run after this many steps.
      target_loss: also end the run once its test loss (nats per token) is below this.
      seed: seed for the parameters and for the order of the text, from 0 to 2^31 - 1.
      results: folder for the run, which all processes see, or gs://bucket/folder.
      sharding: replicated keeps a copy of the model on each device; fsdp gives each device a part of it, for models
        that don't fit otherwise. It may change when a run continues: it isn't part of what the run is.
      dry_run: check that the text and the vocabulary fit, print the run as JSON, and train nothing.
      tensorboard: also write TensorBoard event files next to the run's metrics.
      wandb: also send the run to this Weights & Biases project.
      coordinator: host:port of process 0, if several processes train the run together. On TPU pods, under SLURM and
        under Open MPI, processes find each other without it.
      num_processes: number of these processes.
      process_id: number of this process, from 0.
    """
    from scaling_jax.parallel import connect, is_first, together

    if not dry_run:
        connect(coordinator, num_processes, process_id)  # before JAX looks for devices

    from scaling_jax.cli.planned_run import check_text, planned_run, with_vocabulary

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

        check_text(run)
        print(as_json(run))
        return

    from scaling_jax.console import commands
    from scaling_jax.console.dashboards import asked_for
    from scaling_jax.data import Corpus
    from scaling_jax.io.stores import working_copy
    from scaling_jax.parallel.devices import share_cores
    from scaling_jax.training.examples import data_of

    corpus = data_of(run)
    if run_file is None and isinstance(corpus, Corpus):
        run = with_vocabulary(run, corpus.vocab_size, overrides)
    share_cores([run.batch_sequences, *(stage.batch_tokens // run.model.context for stage in run.ramp)])
    with together():
        results = working_copy(results, is_first())
    commands.train_on_console(run, results, corpus, asked_for(tensorboard, wandb), sharding)


@app.command
def branch(
    results: tyro.conf.Positional[Path],
    batch_tokens: Size,
    model: str | None = None,
    tolerance: float = 0.01,
    points: int = 8,
    replicates: int = 4,
    betas: Literal["run", "half-life"] = "run",
    experiment: Path | None = None,
) -> None:
    """Measure the critical batch size along runs of a scan, by branches with larger batches (Merrill et al. 2025).

    Writes branches.csv. The report then shows it beside the scan and the noise scale. Training takes about as many runs
    as points times replicates times 5; the first line says how many tokens they need.

    Example: scaling-jax branch results/demo --batch-tokens 512

    Args:
      results: the folder of a finished scan.
      batch_tokens: branch the best runs with this batch size; choose one well below the critical batch size.
      model: branch only this model; by default all models of the scan.
      tolerance: a branch keeps up if its loss is at most this much (nats per token) above the loss of the run.
      points: largest number of points per run at which branches start.
      replicates: times that each branch, and the run itself, is trained from a point on, each time on other text; at
        least 2. Intervals come from the spread between replicates.
      betas: Adam's β in a branch with k times the batch. run keeps those of the run; half-life takes β^k, which keeps
        half-lives in tokens (Marek et al. 2025).
      experiment: the Python file of a scan of your own tasks, which defines them.
    """
    from scaling_jax.console import commands
    from scaling_jax.results import read_results
    from scaling_jax.scanning.records import load_experiment

    refuse_budget_scan(results, "branch")
    found = read_results(results)
    models = [model] if model else [subject.model.name for subject in found.scan.subjects]
    commands.branch_on_console(
        found,
        models,
        batch_tokens,
        tolerance,
        None if experiment is None else load_experiment(experiment),
        most_points=points,
        replicates=replicates,
        betas=betas,
    )
    show(found.folder)


def _scan(experiment, results, dry_run, tensorboard, wandb, ends=(None, None), **options) -> None:
    from scaling_jax.console.commands import scan_and_widen
    from scaling_jax.console.dashboards import asked_for
    from scaling_jax.io.stores import working_copy
    from scaling_jax.parallel import is_first, together
    from scaling_jax.scanning.widening import widest

    at_most = widest(experiment, *ends)
    with together():
        results = working_copy(results or Path("results") / experiment.name, is_first())
    if dry_run:
        from scaling_jax.console.tables import plan_table
        from scaling_jax.console.terminal import Terminal
        from scaling_jax.report.units import in_unit
        from scaling_jax.scanning.plan import plan_scan

        console = Terminal(functools.partial(in_unit, unit=experiment.unit))
        console.print(plan_table(plan_scan(experiment, results)))
        if at_most is not experiment:
            console.print(
                f"\nwith all batch sizes up to {max(at_most.batch_tokens):,} and down to "
                f"{min(at_most.batch_tokens):,} tokens, if both limits of the trade-off don't show before:"
            )
            console.print(plan_table(plan_scan(at_most, results)))
        return
    complete = scan_and_widen(experiment, results, *ends, writers=asked_for(tensorboard, wandb), **options)
    with together():
        if complete and is_first():
            show(results)


@app.command(name="compile")
def compile_ahead(
    experiment: tyro.conf.Positional[Path],
    topology: str = "v5e:16x16",
    sharding: Literal["replicated", "fsdp"] = "replicated",
) -> None:
    """Compile every batch size of an experiment for a TPU slice, without a TPU. Exit code 1 if a program doesn't fit.

    Example: scaling-jax compile experiments/gpt_85m_ramp.py --topology v5p:4x4x8

    Args:
      experiment: a Python file that defines EXPERIMENT or RUNS.
      topology: the slice: v4, v5e, v5p or v6e, and a shape, such as v5e:4x4 or v5p:4x4x8.
      sharding: as for train; fsdp divides the model over the chips.
    """
    from scaling_jax.compile.ahead_of_time import compile_runs, planned_runs
    from scaling_jax.compile.topologies import topology as find_topology
    from scaling_jax.console.tables import print_compiled
    from scaling_jax.console.terminal import Terminal
    from scaling_jax.scanning.records import load_plan

    runs, slice_, console = planned_runs(load_plan(experiment)), find_topology(topology), Terminal()
    with console.status(f"compiling for {slice_.name}") as status:
        batches = []
        for batch in compile_runs(runs, slice_, sharding):
            batches.append(batch)
            status.update(f"compiling for {slice_.name}: {len(batches)} of {len(runs)} batch sizes done")
    console.print(print_compiled(batches, slice_))
    if not all(batch.fits for batch in batches):
        sys.exit(1)
