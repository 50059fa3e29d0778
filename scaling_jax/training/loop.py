"""One run, from its first step or its newest checkpoint to its result."""

import functools
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from scaling_jax.config import to_dict
from scaling_jax.data import Corpus, bits_per_byte, example_order, prepare
from scaling_jax.data.feeding import Feeder, Span
from scaling_jax.errors import UserError
from scaling_jax.parallel import Backend, replicate
from scaling_jax.training.evaluation import evaluator, held_out_rows
from scaling_jax.training.program import Program, StepMetrics, l1_bounds, noise_scale_so_far, program_for
from scaling_jax.training.ramp import LiveRamp, next_boundary, next_stage
from scaling_jax.training.records import (
    RunResult,
    append_metrics,
    jsonable,
    keep_metrics_until,
    read_metrics,
    read_result,
    write_json,
    write_result,
)
from scaling_jax.training.run import Run, next_evaluation

EVALUATIONS_BELOW_TARGET = 2  # in a row: one could be luck


class Interrupted(Exception):
    """Training stopped when asked to, with its state saved; the same call continues it."""


class Progress(NamedTuple):
    """Where a run stands after an evaluation."""

    run_id: str
    step: int
    last_step: int
    tokens: int
    test_loss: float
    tokens_per_second: float
    noise_scale_tokens: float  # smoothed over the last tens of steps; NaN where |G|² isn't positive


def train(
    run: Run,
    workdir: str | Path,
    *,
    corpus: Corpus | None = None,
    num_devices: int | None = None,
    backend: Backend = "pmap",
    keep_checkpoint: bool = True,
    checkpoint_seconds: float = 60.0,
    should_stop: Callable[[], bool] = lambda: False,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> RunResult:
    """Trains a run in `workdir/runs/<run id>`, or continues it there, or returns its result if it is done.

    Args:
      corpus: what `data.prepare(run.text, run.model.context, run.tokenizer)` returns, to save reading it again.
      num_devices: all local ones unless given; the global batch is split over them.
      keep_checkpoint: whether the last state stays on disk once the run is done.
      should_stop: asked after every call to the device; True saves the state and raises `Interrupted`.

    Raises:
      UserError: if the batch doesn't fit the devices, the text the model, or the folder holds a run on other text.
      Interrupted: see `should_stop`.
    """
    folder = Path(workdir) / "runs" / run.run_id
    corpus = corpus or prepare(run.text, run.model.context, run.tokenizer)
    _check_corpus(run, corpus)
    done = read_result(folder)
    if done is not None:
        if done.corpus_sha256 != corpus.manifest["sha256"]:
            raise UserError(f"{folder} holds a run on other text ({run.text} has changed since): use another folder")
        return done

    num_devices = num_devices or jax.local_device_count()
    programs = functools.partial(program_for, num_devices=num_devices, backend=backend)
    program = programs(run)
    write_json(folder / "config.json", {"run": to_dict(run), "corpus": corpus.manifest})

    from scaling_jax.training.checkpoints import Checkpoints  # Orbax takes seconds to import

    checkpoints = Checkpoints(folder / "checkpoints")
    state = replicate(program.init(run.seed), num_devices)
    state = checkpoints.restore(state) or state
    keep_metrics_until(folder, int(state.step))
    try:
        with Feeder(corpus, run.seed, run.steps_per_call, num_devices) as feeder:
            state, status = _train_until_done(
                run,
                programs,
                corpus,
                feeder,
                folder,
                state,
                checkpoints.save,
                checkpoint_seconds,
                should_stop,
                on_progress,
            )
        if keep_checkpoint:
            checkpoints.save(state)
    finally:
        checkpoints.close()
    if not keep_checkpoint:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    last = read_metrics(folder)[-1]
    result = RunResult(
        run_id=run.run_id,
        status=status,
        steps=last["step"],
        tokens=last["tokens"],
        test_loss=last["test_loss"],
        corpus_sha256=corpus.manifest["sha256"],
    )
    write_result(folder, result)
    return result


def _train_until_done(run, programs, corpus, feeder, folder, state, save, checkpoint_seconds, should_stop, on_progress):
    lines = read_metrics(folder)
    num_rows = len(corpus.train_RxT1)
    held_out = held_out_rows(corpus.test_RxT1, run.eval_tokens)
    evaluate = evaluator(run.model)
    losses = [line["test_loss"] for line in lines if "test_loss" in line]
    step, tokens = int(state.step), lines[-1]["tokens"] if lines else 0
    evaluated_tokens, evaluated_at, saved_at = tokens, time.monotonic(), time.monotonic()
    stage = next_stage(run.batch_tokens, run.ramp, run.live_ramp, lines)
    while True:
        now = run.at(stage)
        program = programs(now)
        call = _next_call(run, step, tokens, now.batch_tokens)
        rows, order = feeder.batches(_span(run, now, step, tokens, call))
        step, tokens = call.last_step, tokens + (call.last_step - step) * now.batch_tokens
        feeder.expect(_span(run, now, step, tokens, _next_call(run, step, tokens, now.batch_tokens)))
        state, series = program.steps(state, rows, order, now.learning_rate, run.warmup_steps)
        line = _metrics_line(now, program, num_rows, step, tokens, series)
        live = run.live_ramp
        if live and live.metric == "l1" and step % live.every_steps == 0:
            line["l1"] = _measure_l1(run, live, state, corpus.train_RxT1, step)
        lines.append(line)
        stage = next_stage(run.batch_tokens, run.ramp, run.live_ramp, lines)
        steps_left = run.steps_left(step, tokens, stage.batch_tokens)
        diverged = not np.all(np.isfinite(series.loss))
        evaluated = call.evaluate or diverged or steps_left < 1
        if evaluated:
            losses.append(jsonable(float(evaluate(state.params, held_out))))
            line["test_loss"] = losses[-1]
            if losses[-1] is not None and (bits := bits_per_byte(losses[-1], corpus.manifest)) is not None:
                line["test_bits_per_byte"] = jsonable(bits)
            on_progress(
                Progress(
                    run_id=run.run_id,
                    step=step,
                    last_step=step + steps_left,
                    tokens=tokens,
                    test_loss=math.nan if losses[-1] is None else losses[-1],
                    tokens_per_second=(tokens - evaluated_tokens) / (time.monotonic() - evaluated_at),
                    noise_scale_tokens=noise_scale_so_far(state) * run.model.context,
                )
            )
            evaluated_tokens, evaluated_at = tokens, time.monotonic()
        append_metrics(folder, line)
        if diverged or (evaluated and losses[-1] is None):
            return state, "diverged"
        if evaluated and _reached(run, losses):
            return state, "reached"
        if evaluated and any(losses[-1] > late.loss for late in run.deadlines if step > late.step):
            return state, "given up"
        if steps_left < 1:
            return state, "exhausted"
        stop = should_stop()
        if stop or time.monotonic() - saved_at > checkpoint_seconds:
            save(state)
            saved_at = time.monotonic()
        if stop:
            raise Interrupted(run.run_id)


class _Call(NamedTuple):
    last_step: int
    evaluate: bool


def _next_call(run: Run, step: int, tokens: int, batch_tokens: int) -> _Call:
    """The next call of the compiled program.

    It ends at the first of: an evaluation, a stage's end, a look at the noise scale, the run's end, `steps_per_call`.
    It depends on nothing else, so that a resumed run makes the same calls.
    """
    evaluation = next_evaluation(step, run.eval_growth)
    ends = [step + run.steps_per_call, step + run.steps_left(step, tokens, batch_tokens), evaluation]
    boundary = next_boundary(run.ramp, tokens)
    if boundary is not None:
        ends.append(step + math.ceil((boundary - tokens) / batch_tokens))
    if run.live_ramp is not None:
        ends.append((step // run.live_ramp.every_steps + 1) * run.live_ramp.every_steps)
    return _Call(min(ends), min(ends) == evaluation)


def _span(run: Run, now: Run, step: int, tokens: int, call: _Call) -> Span:
    return Span(tokens // run.model.context, call.last_step - step, now.batch_sequences)


def _measure_l1(run: Run, live: LiveRamp, state, rows, step: int) -> list[float | None]:
    """‖σ‖₁, ‖G‖₁ at least and at most, so that their noise scale counts in tokens; on sequences of its own."""
    count = live.l1_sequences
    index = example_order(run.seed + 1_000_003, step // live.every_steps * count, count, len(rows))
    noise, low, high = l1_bounds(run.model, state, rows[index])
    return [jsonable(x) for x in (noise * math.sqrt(run.model.context), low, high)]


def _reached(run: Run, losses: list[float | None]) -> bool:
    if run.target_loss is None or len(losses) < EVALUATIONS_BELOW_TARGET:
        return False
    return all(loss is not None and loss < run.target_loss for loss in losses[-EVALUATIONS_BELOW_TARGET:])


def _metrics_line(now: Run, program: Program, num_rows: int, step: int, tokens: int, series: StepMetrics):
    return {
        "step": step,
        "tokens": tokens,
        "epoch": round(tokens / (num_rows * now.model.context), 6),
        "batch_tokens": now.batch_tokens,
        "small_batch_tokens": program.small_batch_sequences * now.model.context,
        "train_loss": [jsonable(x) for x in series.loss],
        "small_sq_norm": [jsonable(x) for x in series.small_sq_norm],
        "big_sq_norm": [jsonable(x) for x in series.big_sq_norm],
    }


def _check_corpus(run: Run, corpus: Corpus) -> None:
    if corpus.vocab_size > run.model.vocab_size:
        raise UserError(
            f"the tokenizer has {corpus.vocab_size:,} tokens but the model's vocab_size is {run.model.vocab_size:,}"
        )
    if corpus.train_RxT1.shape[1] != run.model.context + 1:
        raise UserError(
            f"rows of {corpus.train_RxT1.shape[1] - 1} tokens don't fit the model's context of {run.model.context}"
        )
