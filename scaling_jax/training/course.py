"""Where a run stands, what it does next and how it ends: functions of the run and its metrics lines so far.

They depend on nothing else, so that a resumed run makes the same calls as an undisturbed one.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

from scaling_jax.data.feeding import Span
from scaling_jax.training.ramp import next_boundary, next_stage
from scaling_jax.training.records import Status
from scaling_jax.training.run import Run, next_evaluation

EVALUATIONS_BELOW_TARGET = 2  # in a row: one could be luck


class Position(NamedTuple):
    """After some steps of a run."""

    step: int
    tokens: int
    now: Run  # as it is in the stage of its ramp that the next step is in

    def after(self, num_steps: int) -> "Position":
        """Further on in the same stage."""
        return Position(self.step + num_steps, self.tokens + num_steps * self.now.batch_tokens, self.now)


class Call(NamedTuple):
    """Steps taken in one go, with a metrics line at their end."""

    num_steps: int
    evaluate: bool
    snapshot: bool


def position(run: Run, lines: Sequence[dict]) -> Position:
    step, tokens = (lines[-1]["step"], lines[-1]["tokens"]) if lines else (0, 0)
    return Position(
        step, tokens, run.at(next_stage(run.batch_tokens, run.ramp, run.live_ramp, lines, run.steps_of_warmup))
    )


def next_call(run: Run, here: Position) -> Call:
    """The next call of the compiled program.

    It ends at the first of: an evaluation, a snapshot, a stage's end, a look at the noise scale, the run's end,
    `steps_per_call`.
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
    if run.live_ramp is not None:
        ends.append(run.live_ramp.every_steps - here.step % run.live_ramp.every_steps)
    num_steps = int(min(ends))
    return Call(num_steps, num_steps == evaluation, num_steps == snapshot)


def span(here: Position, call: Call) -> Span:
    """What the call's steps train on."""
    return Span(here.tokens // here.now.model.context, call.num_steps, here.now.batch_sequences)


def steps_left(run: Run, here: Position) -> int:
    return run.steps_left(here.step, here.tokens, here.now.batch_tokens)


def ending(run: Run, lines: Sequence[dict]) -> Status | None:
    """How the run ended with its last line; None if it goes on."""
    last = lines[-1]
    if any(loss is None for loss in last["train_loss"]) or last.get("test_loss", math.inf) is None:
        return "diverged"
    if "test_loss" in last:
        losses = [line["test_loss"] for line in lines if "test_loss" in line][-EVALUATIONS_BELOW_TARGET:]
        if run.target_loss is not None and len(losses) == EVALUATIONS_BELOW_TARGET and max(losses) < run.target_loss:
            return "reached"
        if any(losses[-1] > late.loss for late in run.deadlines if last["step"] > late.step):
            return "given up"
    return "exhausted" if steps_left(run, position(run, lines)) < 1 else None
