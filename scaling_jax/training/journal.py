"""A run's metrics.jsonl while it trains: every call of the compiled program leaves a line."""

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaling_jax.data import Corpus, bits_per_byte
from scaling_jax.parallel import from_first, is_first
from scaling_jax.training.course import Call, Position, ending, position, steps_left
from scaling_jax.training.program import StepMetrics
from scaling_jax.training.records import Status, append_clock, append_metrics, jsonable, read_metrics
from scaling_jax.training.run import Run


class Progress(NamedTuple):
    """Where a run stands after an evaluation."""

    run_id: str
    step: int
    last_step: int
    tokens: int
    test_loss: float
    tokens_per_second: float
    noise_scale_tokens: float  # smoothed over the last tens of steps; NaN where |G|² isn't positive


class Journal:
    """A run's lines so far and the run's place in them; `folder` holds those of an earlier attempt."""

    def __init__(self, run: Run, folder: Path, corpus: Corpus, on_progress: Callable[[Progress], None]):
        self.run, self.folder, self.lines = run, folder, from_first(read_metrics(folder))
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
        """Adds the line of a call; returns how the run ended, or None if it goes on.

        Args:
          series: of the call's steps.
          evaluate: measures the test loss.
          noise_scale: in examples, for display.
          extra: what else was measured.
        """
        run, now, context = self.run, self.here.now, self.run.model.context
        reached = self.here.after(call.num_steps)
        line = {
            "step": reached.step,
            "tokens": reached.tokens,
            "epoch": round(reached.tokens / (len(self._corpus.train_RxT1) * context), 6),
            "batch_tokens": now.batch_tokens,
            "small_batch_tokens": small_batch_sequences * context,
            "train_loss": [jsonable(x) for x in series.loss],
            "small_sq_norm": [jsonable(x) for x in series.small_sq_norm],
            "big_sq_norm": [jsonable(x) for x in series.big_sq_norm],
            "small_sq_norm_by_layer": _mean_over_steps(series.small_sq_norm_by_layer),
            "big_sq_norm_by_layer": _mean_over_steps(series.big_sq_norm_by_layer),
            **extra,
        }
        self.lines.append(line)
        self.here = position(run, self.lines)
        left = steps_left(run, self.here)
        if call.evaluate or left < 1 or not np.all(np.isfinite(series.loss)):
            line["test_loss"] = from_first(jsonable(evaluate()))  # how long the run is depends on it
            if line["test_loss"] is not None and (bits := bits_per_byte(line["test_loss"], self._corpus.manifest)):
                line["test_bits_per_byte"] = jsonable(bits)
            if is_first():
                self._report(left, noise_scale() * context)
                append_clock(self.folder, line["step"])
        if is_first():
            append_metrics(self.folder, line)
        return ending(run, self.lines)

    def _report(self, left: int, noise_scale_tokens: float) -> None:
        line, (tokens, at), now = self.lines[-1], self._last_evaluation, time.monotonic()
        self._last_evaluation = line["tokens"], now
        self._on_progress(
            Progress(
                run_id=self.run.run_id,
                step=line["step"],
                last_step=line["step"] + left,
                tokens=line["tokens"],
                test_loss=math.nan if line["test_loss"] is None else line["test_loss"],
                tokens_per_second=(line["tokens"] - tokens) / max(now - at, 1e-9),
                noise_scale_tokens=noise_scale_tokens,
            )
        )


def _mean_over_steps(norms_SxP: Any) -> list[float | None]:
    """Enough for the noise scale of each part, as a line has one batch size; every step's would make lines long."""
    return [jsonable(x) for x in norms_SxP.mean(0, dtype=np.float64)]
