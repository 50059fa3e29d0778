"""The journal of a run: its position, its next call of the compiled program, its metrics lines, and how it ends.

All decisions are functions of the run and its metrics lines so far. So a resumed run makes the same calls as one that
was never interrupted.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaling_jax.data import bits_per_byte
from scaling_jax.data.examples import count
from scaling_jax.data.feeding import Span
from scaling_jax.parallel import from_first, is_first
from scaling_jax.training.examples import Data
from scaling_jax.training.integrity import LinesHash
from scaling_jax.training.live_ramp import next_stage
from scaling_jax.training.metrics import MetricsLine, jsonable
from scaling_jax.training.program import StepMetrics
from scaling_jax.training.records import Status, append_clock, append_metrics, read_metrics
from scaling_jax.training.run import Run, next_evaluation
from scaling_jax.training.stages import next_boundary, stage_at

EVALUATIONS_BELOW_TARGET = 2  # in a row, because one could be chance


class Position(NamedTuple):
    """A point between two steps of a run."""

    step: int  # steps taken
    tokens: int  # tokens processed
    now: Run  # the run with the batch size and learning rate of the next step's stage

    def after(self, num_steps: int) -> "Position":
        """The position after `num_steps` more steps, in the same stage."""
        return Position(self.step + num_steps, self.tokens + num_steps * self.now.batch_tokens, self.now)


class Call(NamedTuple):
    """One call of the compiled program; it ends with a metrics line."""

    num_steps: int
    evaluate: bool
    snapshot: bool


def position(run: Run, lines: Sequence[MetricsLine]) -> Position:
    """The position after the last line."""
    step, tokens = (lines[-1].step, lines[-1].tokens) if lines else (0, 0)
    return Position(
        step, tokens, run.at(next_stage(run.batch_tokens, run.ramp, run.live_ramp, lines, run.steps_of_warmup))
    )


def next_call(run: Run, here: Position) -> Call:
    """The next call of the compiled program.

    It ends at whichever comes first: an evaluation, a snapshot, a skip, the end of a stage, a look of the live ramp,
    the end of the run, or `steps_per_call` steps.
    """

    def until(tokens: int | None) -> float:
        return math.inf if tokens is None else math.ceil((tokens - here.tokens) / here.now.batch_tokens)

    evaluation: float = next_evaluation(here.step, run.eval_growth) - here.step
    if run.eval_every_tokens is not None:
        evaluation = min(evaluation, until((here.tokens // run.eval_every_tokens + 1) * run.eval_every_tokens))
    snapshot = until(min((t for t in run.snapshot_tokens if t > here.tokens), default=None))
    ends = [
        run.steps_per_call,
        steps_left(run, here),
        evaluation,
        snapshot,
        until(next_boundary(run.ramp, here.tokens)),
    ]
    if run.skip is not None and here.tokens < run.skip.at_tokens:
        ends.append(until(run.skip.at_tokens))
    if run.live_ramp is not None:
        ends.append(run.live_ramp.every_steps - here.step % run.live_ramp.every_steps)
    num_steps = int(min(ends))
    return Call(num_steps, num_steps == evaluation, num_steps == snapshot)


def expected(run: Run, here: Position, call: Call) -> Position:
    """The position after a call, if a live ramp doesn't grow there."""
    there = here.after(call.num_steps)
    if not run.ramp:
        return there
    return there._replace(now=run.at(stage_at(run.batch_tokens, run.ramp, there.tokens)))


def span(here: Position, call: Call) -> Span:
    """The call's steps as a span of training examples."""
    return Span(here.now.text_read(here.tokens) // here.now.model.context, call.num_steps, here.now.batch_sequences)


def rates_of_steps(here: Position, call: Call) -> np.ndarray:
    """The learning rate of each of the call's steps, without warm-up."""
    rates = np.full(call.num_steps, here.now.learning_rate)
    if here.now.schedule is not None:
        rates *= here.now.schedule.factor(here.tokens + here.now.batch_tokens * np.arange(call.num_steps))
    return rates


def steps_left(run: Run, here: Position) -> int:
    """Number of steps until `max_steps` or `max_tokens`, at the present batch size."""
    return run.steps_left(here.step, here.tokens, here.now.batch_tokens)


def last_step(run: Run, here: Position) -> int:
    """The run's last step, through all stages of its ramp. With a `live_ramp`: the last one if the batch stays."""
    step, tokens, batch_tokens = here.step, here.tokens, here.now.batch_tokens
    while True:
        left = run.steps_left(step, tokens, batch_tokens)
        boundary = next_boundary(run.ramp, tokens)
        if boundary is None or (in_stage := math.ceil((boundary - tokens) / batch_tokens)) >= left:
            return step + max(left, 0)
        step, tokens = step + in_stage, tokens + in_stage * batch_tokens
        batch_tokens = stage_at(run.batch_tokens, run.ramp, tokens).batch_tokens


def ending(run: Run, lines: Sequence[MetricsLine]) -> Status | None:
    """The status with which the run ended at its last line; None if it goes on."""
    last = lines[-1]
    if not np.all(np.isfinite(last.train_loss)) or (last.evaluated and not math.isfinite(last.test_loss)):
        return "diverged"
    if last.evaluated:
        losses = [line.test_loss for line in lines if line.evaluated][-EVALUATIONS_BELOW_TARGET:]
        if run.target_loss is not None and len(losses) == EVALUATIONS_BELOW_TARGET and max(losses) < run.target_loss:
            return "reached"
        if any(losses[-1] > late.loss for late in run.deadlines if last.step > late.step):
            return "given up"
    return "exhausted" if steps_left(run, position(run, lines)) < 1 else None


@dataclasses.dataclass(frozen=True)
class Progress:
    """Progress of a run after an evaluation."""

    model: str
    batch_tokens: int  # of the first step
    learning_rate: float
    seed: int
    run_id: str
    step: int
    last_step: int  # if the run trains to its end; see `last_step`
    tokens: int
    test_loss: float
    tokens_per_second: float
    noise_scale_tokens: float  # average over the last tens of steps; NaN if |G|² isn't positive


class Journal:
    """A run's metrics lines so far, and its position after them. Starts with the lines in `folder`."""

    def __init__(self, run: Run, folder: Path, corpus: Data, on_progress: Callable[[Progress], None]):
        self.run, self.folder = run, folder
        found = from_first([line.json() for line in read_metrics(folder)] if is_first() else [])
        self.lines = [MetricsLine.read(values) for values in found]
        self.written = LinesHash(self.lines)
        self.here: Position = position(run, self.lines)
        self._corpus, self._on_progress = corpus, on_progress
        self._last_evaluation = self.here.tokens, time.monotonic()

    def write(
        self,
        call: Call,
        series: StepMetrics,
        small_batch_sequences: int,
        evaluate: Callable[[], float],
        noise_scale: Callable[[], float],
        **extra: Any,
    ) -> Status | None:
        """Adds the line of a call. Returns the status if the run ends with it, or None if it goes on.

        Args:
          series: metrics of the call's steps.
          evaluate: returns the test loss.
          noise_scale: returns the noise scale in examples, for display.
          extra: more values for the line.
        """
        run, now, context = self.run, self.here.now, self.run.model.context
        reached = self.here.after(call.num_steps)
        values: dict[str, Any] = {
            "step": reached.step,
            "tokens": reached.tokens,
            "epoch": round(reached.tokens / (count(self._corpus.train) * context), 6),
            "batch_tokens": now.batch_tokens,
            "small_batch_tokens": small_batch_sequences * context,
            "train_loss": [jsonable(x) for x in series.loss],
            "small_sq_norm": [jsonable(x) for x in series.small_sq_norm],
            "big_sq_norm": [jsonable(x) for x in series.big_sq_norm],
            "small_sq_norm_by_layer": _mean_over_steps(series.small_sq_norm_by_layer),
            "big_sq_norm_by_layer": _mean_over_steps(series.big_sq_norm_by_layer),
            **extra,
        }
        last = steps_left(run, position(run, [*self.lines, MetricsLine.read(values)])) < 1
        evaluated = call.evaluate or last or not np.all(np.isfinite(series.loss))
        if evaluated:
            loss = values["test_loss"] = from_first(jsonable(evaluate()))  # the same everywhere: it may end the run
            if loss is not None and (bits := bits_per_byte(loss, self._corpus.manifest)):
                values["test_bits_per_byte"] = jsonable(bits)
        self.lines.append(MetricsLine.read(values))  # rounded, exactly as a resumed run will read it
        self.written.add(self.lines[-1])
        self.here = position(run, self.lines)
        if is_first():
            if evaluated:
                self._report(noise_scale() * context)
                append_clock(self.folder, reached.step)
            append_metrics(self.folder, self.lines[-1])
        return ending(run, self.lines)

    def _report(self, noise_scale_tokens: float) -> None:
        run, line, (tokens, at), now = self.run, self.lines[-1], self._last_evaluation, time.monotonic()
        self._last_evaluation = line.tokens, now
        self._on_progress(
            Progress(
                model=run.model.name,
                batch_tokens=run.batch_tokens,
                learning_rate=run.learning_rate,
                seed=run.seed,
                run_id=self.folder.name,
                step=line.step,
                last_step=last_step(run, self.here),
                tokens=line.tokens,
                test_loss=line.test_loss,
                tokens_per_second=(line.tokens - tokens) / max(now - at, 1e-9),
                noise_scale_tokens=noise_scale_tokens,
            )
        )


def _mean_over_steps(norms_SxP: Any) -> list[float | None]:
    """Mean norms of each part. Means keep lines short, and are enough: all steps of a line have one batch size."""
    return [jsonable(x) for x in norms_SxP.mean(0, dtype=np.float64)]
