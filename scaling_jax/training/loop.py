"""One run, from its first step or its newest checkpoint to its result."""

import functools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from scaling_jax.data import Corpus, example_order, prepare
from scaling_jax.data.feeding import Feeder
from scaling_jax.parallel import Backend, replicate
from scaling_jax.training.attempt import Attempt, Interrupted, finished_result
from scaling_jax.training.course import next_call, span
from scaling_jax.training.evaluation import evaluator, held_out_rows
from scaling_jax.training.journal import Progress
from scaling_jax.training.live_metrics import measure
from scaling_jax.training.program import Program, TrainState, noise_scale_so_far, program_for
from scaling_jax.training.records import RunResult, Status, jsonable
from scaling_jax.training.run import Run


def train(
    run: Run,
    workdir: str | Path,
    *,
    corpus: Corpus | None = None,
    num_devices: int | None = None,
    backend: Backend = "pmap",
    keep_checkpoint: bool = True,
    checkpoint_seconds: float = 60.0,
    branch_of: Run | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> RunResult:
    """Trains a run in `workdir/runs/<run id>`, or continues it there, or returns its result if it is done.

    Args:
      corpus: what `data.prepare(run.text, run.model.context, run.tokenizer)` returns, to save reading it again.
      num_devices: all local ones unless given; the global batch is split over them.
      keep_checkpoint: whether the last state stays on disk once the run is done.
      branch_of: a finished run in `workdir` that is the same up to the first stage of this one's ramp, to start from
        the state that it kept there (`Run.snapshot_tokens`).
      should_stop: asked after every call to the device; True saves the state and raises `Interrupted`.

    Raises:
      UserError: if the batch doesn't fit the devices, the text the model, or the folder holds a run on other text.
      Interrupted: see `should_stop`.
    """
    corpus = corpus or prepare(run.text, run.model.context, run.tokenizer)
    done = finished_result(run, workdir, corpus)
    if done is not None:
        return done
    num_devices = num_devices or jax.local_device_count()
    programs = functools.partial(program_for, num_devices=num_devices, backend=backend)
    state = replicate(programs(run).init(run.seed), num_devices)
    attempt = Attempt(run, workdir, corpus, state, on_progress, branch_of)
    saved_at = time.monotonic()

    def between_calls(state: TrainState) -> None:
        nonlocal saved_at
        stop = should_stop()
        if stop or time.monotonic() - saved_at > checkpoint_seconds:
            attempt.save(state)
            saved_at = time.monotonic()
        if stop:
            raise Interrupted(run.run_id)

    try:
        with Feeder(corpus, run.seed, run.steps_per_call, num_devices) as feeder:
            state, status = _train_until_done(attempt, corpus, feeder, programs, between_calls)
        return attempt.finish(status, keep_checkpoint, state)
    finally:
        attempt.close()


def _train_until_done(
    attempt: Attempt,
    corpus: Corpus,
    feeder: Feeder,
    programs: Callable[[Run], Program],
    between_calls: Callable[[TrainState], None],
) -> tuple[TrainState, Status]:
    run, journal, state = attempt.run, attempt.journal, attempt.state
    held_out = held_out_rows(corpus.test_RxT1, run.eval_tokens)
    evaluate = evaluator(run.model)
    while True:
        here, call = journal.here, next_call(run, journal.here)
        program = programs(here.now)
        rows, order = feeder.batches(span(here, call))
        there = here.after(call.num_steps)
        feeder.expect(span(there, next_call(run, there)))
        state, series = program.steps(state, rows, order, here.now.learning_rate, run.steps_of_warmup)
        status = journal.write(
            call,
            series,
            program.small_batch_sequences,
            evaluate=functools.partial(_test_loss, evaluate, state, held_out),
            noise_scale=functools.partial(noise_scale_so_far, state.noise),
            **_live_measurement(run, state, corpus.train_RxT1, there.step),
        )
        if call.snapshot:
            attempt.keep_snapshot(state)
        if status is not None:
            return state, status
        between_calls(state)


def _test_loss(evaluate, state: TrainState, held_out) -> float:
    return float(evaluate(state.evaluated_params, held_out))


def _live_measurement(run: Run, state: TrainState, rows, step: int) -> dict[str, Any]:
    """What a live ramp's metric takes, at the steps where it looks; on sequences of its own."""
    live = run.live_ramp
    if live is None or live.metric == "simple" or step % live.every_steps:
        return {}
    count = live.sequences
    index = example_order(run.seed + 1_000_003, step // live.every_steps * count, count, len(rows))
    return {"live": [jsonable(x) for x in measure(run.model, live.metric, state, rows[index])]}
