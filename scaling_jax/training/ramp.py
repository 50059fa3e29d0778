"""Batch sizes that grow during a run: on a schedule, or as the measured noise scale grows.

When the batch grows k-fold, the learning rate grows by √k (Malladi et al. 2022, arXiv 2205.10287) and Adam's β become
β^k, which keeps their half-lives in tokens (Marek et al. 2025, arXiv 2507.07101).
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from scaling_jax.config import from_dict
from scaling_jax.errors import UserError
from scaling_jax.noise_scale import Moments, estimate, geometries, unbiased

Metric = Literal["simple", "l1", "spectral", "curvature", "adam_half", "adam_full"]
_BOUNDS_IN_A_NORM = ("l1", "spectral")  # measured as `NormBounds`, the others as `Moments`
_NORMS = ("small_sq_norm", "big_sq_norm")
_FEWEST_LOOKS = 3


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
        raise UserError(f"{path} isn't a list of stages, such as [{{'tokens': 0, 'batch_tokens': 128}}]")
    stages = tuple(from_dict(Stage, stage, where=f"{path}[{k}].") for k, stage in enumerate(listed))
    if stages[0].tokens != 0:
        raise UserError(f"the first stage of {path} starts at {stages[0].tokens:,} tokens: it should at 0")
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


def next_stage(
    batch_tokens: int, stages: Sequence[Stage], live: LiveRamp | None, lines: Sequence[dict], warmup_steps: int = 0
) -> Stage:
    """The stage that a run's next step is in: a pure function of its metrics so far, so that resuming repeats it.

    Args:
      batch_tokens: the run's first.
      lines: of `metrics.jsonl`; those of measured metrics hold what `live_metrics.measure` returned, as "live".
      warmup_steps: during which a live ramp doesn't look.
    """
    tokens = lines[-1]["tokens"] if lines else 0
    if live is None:
        return stage_at(batch_tokens, stages, tokens)
    batch = lines[-1]["batch_tokens"] if lines else batch_tokens
    looks = bool(lines) and lines[-1]["step"] % live.every_steps == 0 and lines[-1]["step"] > warmup_steps
    if looks and 2 * batch <= live.max_batch_tokens and _at_least(live.metric, lines) > live.threshold * 2 * batch:
        batch *= 2
    return Stage(tokens, batch, math.sqrt(batch / batch_tokens))


def _at_least(metric: Metric, lines: Sequence[dict]) -> float:
    """What the noise scale is sure to exceed, in tokens, by what was measured at the last batch size."""
    since = [line for line in lines if line["batch_tokens"] == lines[-1]["batch_tokens"]]
    if metric == "simple":
        return estimate(*_of_training_steps(since)).low
    measured = [line["live"] for line in since if "live" in line]
    measured = measured[len(measured) // 2 :]
    if len(measured) < _FEWEST_LOOKS:
        return 0.0
    columns = np.array(measured, float).T
    if metric in _BOUNDS_IN_A_NORM:
        return geometries.bounds(geometries.NormBounds(*columns))[0]
    return estimate(*unbiased(Moments(*columns))).low


def _of_training_steps(lines: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Unbiased |G|² and tr(Σ), in tokens, of the later half of the steps, so that they follow the loss."""
    small, big = (np.concatenate([np.array(line[name], float) for line in lines]) for name in _NORMS)
    later = slice(len(small) // 2, None)
    return unbiased(Moments(small[later], big[later], lines[-1]["small_batch_tokens"], lines[-1]["batch_tokens"]))
