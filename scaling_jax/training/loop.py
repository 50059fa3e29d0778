"""Trains one run, from its first step or its newest checkpoint to its result."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from scaling_jax.data import example_order
from scaling_jax.data.examples import count as num_examples
from scaling_jax.data.examples import take
from scaling_jax.data.feeding import Feeder
from scaling_jax.io import UserError
from scaling_jax.io.stores import working_copy
from scaling_jax.parallel import Backend, Sharding, agree, from_first, is_first, leave_if_one_is_gone, together
from scaling_jax.tasks import Model
from scaling_jax.training.ahead import Ahead, program_to_come
from scaling_jax.training.attempt import Attempt, Interrupted, find_place
from scaling_jax.training.examples import Data, data_of, held_out
from scaling_jax.training.journal import Progress, expected, next_call, rates_of_steps, span
from scaling_jax.training.live_ramp import measure
from scaling_jax.training.metrics import jsonable
from scaling_jax.training.program import Program, TrainState, check_memory, noise_scale_so_far, program_for
from scaling_jax.training.records import RunResult, Status
from scaling_jax.training.run import Run


def train(
    run: Run,
    workdir: str | Path,
    *,
    corpus: Data | None = None,
    num_devices: int | None = None,
    backend: Backend = "pmap",
    sharding: Sharding = "replicated",
    keep_checkpoint: bool = True,
    checkpoint_seconds: float = 60.0,
    compile_ahead: bool = True,
    branch_of: Run | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> RunResult:
    """Trains a run in `workdir/runs/<run id>` and returns its result. Continues a run that was interrupted.

    If the run is already done, only returns its result.

    Args:
      workdir: a folder that all processes see, or gs://bucket/folder.
      corpus: what `data.prepare(run.text, run.model.context, run.tokenizer)` returns, or a task's own examples; None
        prepares it here.
      num_devices: the devices over which each batch is split; None takes all devices of all processes.
      backend: how the devices run the training step if the state is replicated.
      sharding: where the state lies. "replicated": all of it on each device. "fsdp": each device holds a part of every
        large array, by `jax.jit` over sharded arrays, for models that don't fit otherwise. It doesn't change what the
        run is: a run may be continued with another sharding, and then differs by rounding only.
      keep_checkpoint: keep the last state on disk when the run is done.
      checkpoint_seconds: time between checkpoints.
      compile_ahead: compile the program of a ramp's next stage, or of a live ramp's larger batch, while the present
        one trains. Several processes don't. It changes no result. A program of yours that ends meanwhile waits for the
        compilation; the command line doesn't.
      branch_of: a finished run in `workdir` that is the same up to the first stage of this run's ramp, or its skip.
        Training starts from the state that it kept there (`Run.snapshot_tokens`).
      should_stop: called after every call of the compiled program, and while the run waits for a compilation that
        was begun ahead. If it returns True in any process, all processes
        save the state and raise `Interrupted`.
      on_progress: called after each evaluation, in the first process only.

    Raises:
      UserError: if the batch doesn't fit the devices, or the text doesn't fit the model; if the folder holds this run
        on other text, or another process trains it; if the processes have different runs.
      Interrupted: see `should_stop`.
    """
    corpus = corpus or data_of(run)
    process = jax.process_index(), jax.process_count()
    num_devices = num_devices or jax.device_count()
    own_devices = num_devices // jax.process_count()
    programs = functools.partial(program_for, num_devices=num_devices, backend=backend, sharding=sharding)
    with leave_if_one_is_gone():
        _check_processes(run, corpus, num_devices, backend, sharding)
        with together():
            workdir = working_copy(workdir, is_first())
        folder, done, next_stages = find_place(run, workdir, corpus)
        if done is not None:
            return done
        check_memory(
            run.model if isinstance(run.model, Model) else run.trainable,
            num_devices if sharding == "fsdp" and jax.default_backend() != "cpu" else 1,
        )
        # Refuses a batch that doesn't divide; batches of stages that are over needn't divide over today's devices.
        to_come = [programs(run.at(stage)) for stage in next_stages]
        attempt = Attempt(run, folder, corpus, to_come[0].first_state(run.seed), on_progress, branch_of)
    saved_at = time.monotonic()

    def between_calls(state: TrainState) -> None:
        nonlocal saved_at
        stop, due = agree(should_stop(), time.monotonic() - saved_at > checkpoint_seconds)
        if stop or due:
            attempt.save(state)
            saved_at = time.monotonic()
        if stop:
            raise Interrupted(run.run_id)

    try:
        with leave_if_one_is_gone():
            with Feeder(corpus, run.seed, run.steps_per_call, own_devices, *process) as feeder:
                state, status = _train_until_done(
                    attempt, corpus, feeder, programs, Ahead(compile_ahead), between_calls
                )
            return attempt.finish(status, keep_checkpoint, state)
    finally:
        attempt.close()


def _train_until_done(
    attempt: Attempt,
    corpus: Data,
    feeder: Feeder,
    programs: Callable[[Run], Program],
    ahead: Ahead,
    between_calls: Callable[[TrainState], None],
) -> tuple[TrainState, Status]:
    run, journal, state = attempt.run, attempt.journal, attempt.state
    if attempt.ended is not None:
        return state, attempt.ended
    examples, evaluated = held_out(run, corpus), False
    while True:
        here, call = journal.here, next_call(run, journal.here)
        program = programs(here.now)
        ahead.wait(program, functools.partial(between_calls, state))
        rows, order, own_rows = feeder.batches(span(here, call))
        there = expected(run, here, call)
        feeder.expect(span(there, next_call(run, there)))
        state, series = program.steps(state, rows, order, rates_of_steps(here, call), run.steps_of_warmup, own_rows)
        status = journal.write(
            call,
            series,
            program.small_batch_sequences,
            evaluate=functools.partial(program.test_loss, state, examples),
            noise_scale=functools.partial(noise_scale_so_far, state.noise),
            **from_first(_live_measurement(run, state, corpus.train, there.step)),
        )
        evaluated = evaluated or call.evaluate
        if evaluated and status is None:
            ahead.expect(program_to_come(run, here, programs), state, rows, own_rows)
        if call.snapshot:
            attempt.keep_snapshot(state)
        if status is not None:
            return state, status
        between_calls(state)


def _check_processes(run: Run, corpus: Data, num_devices: int, backend: Backend, sharding: Sharding) -> None:
    if jax.process_count() == 1:
        return
    if backend == "vmap" or num_devices != jax.device_count():
        raise UserError(
            f"{jax.process_count()} processes must train one run with pmap or shard_map on all of their "
            f"{jax.device_count()} devices, not with {backend} on {num_devices}"
        )
    here = [run.run_id, corpus.manifest["sha256"], sharding]
    others = here != from_first(here)
    if agree(others)[0]:
        raise UserError(
            f"the processes of this run differ: at least one has another command or another text than {run.run_id}; "
            "start all with the same"
        )


def _live_measurement(run: Run, state: TrainState, rows, step: int) -> dict[str, Any]:
    """{"live": measured values} at a look of the live ramp, on extra training sequences; else {}."""
    live = run.live_ramp
    if live is None or live.metric == "simple" or step % live.every_steps:
        return {}
    count = live.sequences
    index = example_order(run.seed + 1_000_003, step // live.every_steps * count, count, num_examples(rows))
    return {"live": [jsonable(x) for x in measure(run.trainable, live.metric, state, take(rows, index))]}
