"""One run, from its first step or its newest checkpoint to its result."""

import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from scaling_jax.config import to_dict
from scaling_jax.data import Corpus, example_order, prepare
from scaling_jax.errors import UserError
from scaling_jax.parallel import Backend, replicate
from scaling_jax.training.evaluation import evaluator, held_out_rows
from scaling_jax.training.program import Program, StepMetrics, noise_scale_so_far, program_for
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
from scaling_jax.training.run import Run, calls

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
      corpus: what `data.prepare(run.text, run.model.context)` returns, to save reading it again.
      num_devices: all local ones unless given; the global batch is split over them.
      keep_checkpoint: whether the last state stays on disk once the run is done.
      should_stop: asked after every call to the device; True saves the state and raises `Interrupted`.

    Raises:
      UserError: if the batch doesn't fit the devices, the text the model, or the folder holds a run on other text.
      Interrupted: see `should_stop`.
    """
    folder = Path(workdir) / "runs" / run.run_id
    corpus = corpus or prepare(run.text, run.model.context)
    _check_corpus(run, corpus)
    done = read_result(folder)
    if done is not None:
        if done.corpus_sha256 != corpus.manifest["sha256"]:
            raise UserError(f"{folder} holds a run on other text ({run.text} has changed since): use another folder")
        return done

    num_devices = num_devices or jax.local_device_count()
    program = program_for(run, num_devices, backend)
    write_json(folder / "config.json", {"run": to_dict(run), "corpus": corpus.manifest})

    from scaling_jax.training.checkpoints import Checkpoints  # Orbax takes seconds to import

    checkpoints = Checkpoints(folder / "checkpoints")
    state = replicate(program.init(run.seed), num_devices)
    state = checkpoints.restore(state) or state
    keep_metrics_until(folder, int(state.step))
    try:
        state, status = _train_until_done(
            run, program, corpus, folder, state, checkpoints.save, checkpoint_seconds, should_stop, on_progress
        )
        if keep_checkpoint:
            checkpoints.save(state)
    finally:
        checkpoints.close()
    if not keep_checkpoint:
        shutil.rmtree(folder / "checkpoints", ignore_errors=True)

    steps = int(state.step)
    result = RunResult(
        run_id=run.run_id,
        status=status,
        steps=steps,
        tokens=steps * run.batch_tokens,
        test_loss=read_metrics(folder)[-1]["test_loss"],
        corpus_sha256=corpus.manifest["sha256"],
    )
    write_result(folder, result)
    return result


def _train_until_done(run, program: Program, corpus, folder, state, save, checkpoint_seconds, should_stop, on_progress):
    rows = _resident_rows(corpus, program.num_devices)
    held_out = held_out_rows(corpus.test_RxT1, run.eval_tokens)
    evaluate = evaluator(run.model)
    losses = [line["test_loss"] for line in read_metrics(folder) if "test_loss" in line]
    step, saved_at = int(state.step), time.monotonic()
    evaluated_step, evaluated_at = step, time.monotonic()
    for call in calls(run.last_step, run.eval_growth, run.steps_per_call):
        if call.last_step <= step:
            continue
        num_steps = call.last_step - step
        order = example_order(run.seed, step * run.batch_sequences, num_steps * run.batch_sequences, len(rows))
        state, series = program.steps(state, rows, order.reshape(num_steps, -1), run.learning_rate, run.warmup_steps)
        step = call.last_step
        line = _metrics_line(run, program, len(rows), step, series)
        diverged = not np.all(np.isfinite(series.loss))
        if call.evaluate or diverged:
            losses.append(jsonable(float(evaluate(state.params, held_out))))
            line["test_loss"] = losses[-1]
            seconds = time.monotonic() - evaluated_at
            on_progress(
                Progress(
                    run_id=run.run_id,
                    step=step,
                    last_step=run.last_step,
                    tokens=step * run.batch_tokens,
                    test_loss=math.nan if losses[-1] is None else losses[-1],
                    tokens_per_second=(step - evaluated_step) * run.batch_tokens / seconds,
                    noise_scale_tokens=noise_scale_so_far(state) * run.model.context,
                )
            )
            evaluated_step, evaluated_at = step, time.monotonic()
        append_metrics(folder, line)
        if diverged or (call.evaluate and losses[-1] is None):
            return state, "diverged"
        if call.evaluate and _reached(run, losses):
            return state, "reached"
        if call.evaluate and any(losses[-1] > late.loss for late in run.deadlines if step > late.step):
            return state, "given up"
        if step >= run.last_step:
            return state, "exhausted"
        stop = should_stop()
        if stop or time.monotonic() - saved_at > checkpoint_seconds:
            save(state)
            saved_at = time.monotonic()
        if stop:
            raise Interrupted(run.run_id)
    raise AssertionError("a run ends at its last step")


def _reached(run: Run, losses: list[float | None]) -> bool:
    if run.target_loss is None or len(losses) < EVALUATIONS_BELOW_TARGET:
        return False
    return all(loss is not None and loss < run.target_loss for loss in losses[-EVALUATIONS_BELOW_TARGET:])


def _metrics_line(run, program, num_rows, step, series: StepMetrics):
    return {
        "step": step,
        "tokens": step * run.batch_tokens,
        "epoch": round(step * program.batch_sequences / num_rows, 6),
        "small_batch_tokens": program.small_batch_sequences * run.model.context,
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


_resident: dict[tuple[str, int, int], jax.Array] = {}


def _resident_rows(corpus: Corpus, num_devices: int) -> jax.Array:
    """The corpus on the devices, placed once a process."""
    key = (corpus.manifest["sha256"], corpus.train_RxT1.shape[1], num_devices)
    if key not in _resident:
        _resident[key] = replicate(np.asarray(corpus.train_RxT1), num_devices)
    return _resident[key]
