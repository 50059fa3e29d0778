"""Batch sizes that grow during a run: on a schedule, or as the measured noise scale grows (`live_ramp`).

When the batch grows k-fold, the learning rate grows by √k (Malladi et al. 2022, arXiv 2205.10287) and Adam's β become
β^k, which keeps their half-lives in tokens (Marek et al. 2025, arXiv 2507.07101).
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from scaling_jax.errors import UserError
from scaling_jax.io.config import from_dict

Metric = Literal["simple", "l1", "spectral", "curvature", "adam_half", "adam_full"]
METRICS: tuple[Metric, ...] = get_args(Metric)


@dataclasses.dataclass(frozen=True)
class Stage:
    """From `tokens` processed on, steps of `batch_tokens` at `learning_rate_factor` times the run's learning rate."""

    tokens: int
    batch_tokens: int
    learning_rate_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class LiveRamp:
    """The batch doubles once the noise scale is sure to exceed `threshold` times the doubled batch.

    Sure means the lower end of the noise scale's 95 % interval over the later half of what was measured since the last
    change: noise alone triggers nothing, and no further hysteresis is needed. The batch never shrinks. `simple`, tr(Σ)
    over |G|², comes with every training step; the other metrics (`live_metrics`) are measured at each look, and three
    looks are the fewest. In ℓ1 and the spectral norm sure means the lower of the two bounds.
    """

    threshold: float
    max_batch_tokens: int
    every_steps: int = 25  # between looks at the noise scale, the first after warm-up
    metric: Metric = "simple"
    sequences: int = 128  # that a measurement takes, besides those that are trained on

    def __post_init__(self):
        if self.metric not in METRICS:
            raise UserError(f"live_ramp.metric = {self.metric!r}: choose from {', '.join(METRICS)}")
        if not self.threshold > 0 or self.every_steps < 1:
            raise UserError(
                f"a live ramp's threshold = {self.threshold} and every_steps = {self.every_steps} are positive"
            )
        if self.sequences < 16 or self.sequences % 16:
            raise UserError(f"a live ramp's sequences = {self.sequences} make two halves of eight parts: 16, 32, 48 …")


def read_stages(path: Path) -> tuple[Stage, ...]:
    """Stages from a JSON list of them, as `scaling-jax advise --write-ramp` writes it; the first from 0 tokens on.

    Raises:
      UserError: if the file isn't there, or isn't such a list.
    """
    try:
        listed = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"can't read a ramp from {path}: {error}") from None
    if not isinstance(listed, list) or not listed or not all(isinstance(stage, dict) for stage in listed):
        raise UserError(f'{path} isn\'t a list of stages, such as [{{"tokens": 0, "batch_tokens": 128}}]')
    stages = tuple(from_dict(Stage, stage, where=f"{path}[{k}].") for k, stage in enumerate(listed))
    if stages[0].tokens != 0:
        raise UserError(f"the first stage of {path} must start at 0 tokens, not at {stages[0].tokens:,}")
    return stages


def check_stages(batch_tokens: int, stages: Sequence[Stage]) -> None:
    """Raises UserError unless stages start later and later, with larger and larger batches."""
    before = Stage(0, batch_tokens)
    for stage in stages:
        if (
            stage.tokens <= before.tokens
            or stage.batch_tokens <= before.batch_tokens
            or stage.learning_rate_factor <= 0
        ):
            raise UserError(f"a ramp's stages start later with larger batches each: {stage} can't follow {before}")
        before = stage


def stage_at(batch_tokens: int, stages: Sequence[Stage], tokens: int) -> Stage:
    """The stage in force once `tokens` were processed; the first is the run's own batch size."""
    return [s for s in (Stage(0, batch_tokens), *stages) if s.tokens <= tokens][-1]


def next_boundary(stages: Sequence[Stage], tokens: int) -> int | None:
    """Tokens at which the next stage starts; None in the last."""
    return min((s.tokens for s in stages if s.tokens > tokens), default=None)
