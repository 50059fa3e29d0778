"""The stages of batch ramps, planned or by the noise scale."""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Literal, get_args

from scaling_jax.io import UserError
from scaling_jax.io.config import check_positive

Metric = Literal["simple", "l1", "spectral", "curvature", "adam_half", "adam_full"]
METRICS: tuple[Metric, ...] = get_args(Metric)

_MOST_EXTRA_SEQUENCES = 65_536


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a batch ramp."""

    tokens: int  # the stage starts at the first step that has processed this many tokens
    batch_tokens: int
    learning_rate_factor: float = 1.0  # times the run's learning rate


@dataclasses.dataclass(frozen=True)
class LiveRamp:
    """A ramp that follows the noise scale: the batch doubles once the noise scale exceeds a threshold.

    It doubles when the lower end of the noise scale's interval exceeds `threshold` times the doubled batch. With a
    larger `factor` it grows in fewer, later stages; with one that takes it to `max_batch_tokens`, in one late switch.
    The interval is over the later half of what was measured since the last change. Its confidence rises with the number
    of looks, from 98 %. So noise alone seldom doubles the batch: at each batch size, in less than 5 % of runs whose
    noise scale stays exactly at the threshold, if |G|² isn't strongly skewed (docs/noise_scale.md). The batch never
    shrinks.

    The metric "simple", tr(Σ)/|G|², comes from every training step. The other metrics (`training/live_ramp.py`) are
    measured at each look; they need at least five looks. For "l1" and "spectral", the lower of their two bounds counts;
    it has no interval.
    """

    threshold: float
    max_batch_tokens: int
    every_steps: int = 25  # steps between looks at the noise scale; the first look is after warm-up
    metric: Metric = "simple"
    sequences: int = 128  # extra sequences per measurement; "simple" needs none
    factor: int = 2  # by which the batch grows at a time

    def __post_init__(self):
        if self.metric not in METRICS:
            # Norm layers are a cheap sample of the parameters for tr(Σ)/|G|², not a metric of their own.
            hint = "; norm layers are a way to measure simple, in your own loop" if self.metric == "norm_layers" else ""
            raise UserError(f"live_ramp.metric = {self.metric!r}: choose from {', '.join(METRICS)}{hint}")
        if not self.threshold > 0 or self.every_steps < 1:
            raise UserError(
                f"live_ramp.threshold = {self.threshold} and every_steps = {self.every_steps} must be positive"
            )
        check_positive("live_ramp.max_batch_tokens", self.max_batch_tokens)
        if self.factor < 2:
            raise UserError(f"live_ramp.factor = {self.factor} must be a whole number from 2 on")
        if not 16 <= self.sequences <= _MOST_EXTRA_SEQUENCES or self.sequences % 16:
            raise UserError(
                f"live_ramp.sequences = {self.sequences} must be a multiple of 16: 16, 32, 48 … "
                f"{_MOST_EXTRA_SEQUENCES:,}"
            )


def check_stages(batch_tokens: int, stages: Sequence[Stage]) -> None:
    """Raises UserError unless each stage starts later than the one before, with another batch or learning rate."""
    before = Stage(0, batch_tokens)
    for stage in stages:
        if (
            stage.tokens <= before.tokens
            or stage.batch_tokens < 1
            or not 0 < stage.learning_rate_factor < math.inf
            or (stage.batch_tokens, stage.learning_rate_factor) == (before.batch_tokens, before.learning_rate_factor)
        ):
            raise UserError(
                "each stage of a ramp must start later, with another batch or learning rate, both positive: "
                f"{_as_json(stage)} can't follow {_as_json(before)}"
            )
        before = stage


def _as_json(stage: Stage) -> str:
    """As in the file of a ramp."""
    return json.dumps(dataclasses.asdict(stage))


def stage_at(batch_tokens: int, stages: Sequence[Stage], tokens: int) -> Stage:
    """The stage after `tokens` processed tokens. Before the first stage, it is the run's own batch size."""
    return [s for s in (Stage(0, batch_tokens), *stages) if s.tokens <= tokens][-1]


def next_boundary(stages: Sequence[Stage], tokens: int) -> int | None:
    """Tokens at which the next stage starts; None in the last stage."""
    return min((s.tokens for s in stages if s.tokens > tokens), default=None)
