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

_NORMS = ("small_sq_norm", "big_sq_norm")


@dataclasses.dataclass(frozen=True)
class Stage:
    """From `tokens` processed on, steps of `batch_tokens` at `learning_rate_factor` times the run's learning rate."""

    tokens: int
    batch_tokens: int
    learning_rate_factor: float = 1.0


@dataclasses.dataclass(frozen=True)
class LiveRamp:
    """The batch doubles once the noise scale is sure to exceed `threshold` times the doubled batch.

    Sure means the lower end of the noise scale's 95 % interval over the later half of the steps since the last change:
    noise alone triggers nothing, and no further hysteresis is needed. The batch never shrinks.
    """

    threshold: float
    max_batch_tokens: int
    every_steps: int = 25  # between looks at the noise scale, the first after warm-up
    metric: Literal["simple", "l1"] = "simple"
    l1_sequences: int = 128  # that an ℓ1 measurement takes, in eight parts; they are not trained on

    def __post_init__(self):
        if not self.threshold > 0 or self.every_steps < 1:
            raise UserError(
                f"a live ramp's threshold = {self.threshold} and every_steps = {self.every_steps} are positive"
            )


def read_stages(path: Path) -> tuple[Stage, ...]:
    """Stages from a JSON list of them, as `scaling-jax advise --write-ramp` writes it; the first from 0 tokens on.

    Raises:
      UserError: if the file isn't there, or isn't such a list.
    """
    try:
        listed = json.loads(path.read_text())
    except (OSError, ValueError) as error:
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


def next_stage(batch_tokens: int, stages: Sequence[Stage], live: LiveRamp | None, lines: Sequence[dict]) -> Stage:
    """The stage that a run's next step is in: a pure function of its metrics so far, so that resuming repeats it.

    Args:
      batch_tokens: the run's first.
      lines: of `metrics.jsonl`.
    """
    tokens = lines[-1]["tokens"] if lines else 0
    if live is None:
        return stage_at(batch_tokens, stages, tokens)
    batch = lines[-1]["batch_tokens"] if lines else batch_tokens
    if lines and lines[-1]["step"] % live.every_steps == 0 and _should_double(live, batch, lines):
        batch *= 2
    return Stage(tokens, batch, math.sqrt(batch / batch_tokens))


def recent_moments(lines: Sequence[dict]) -> tuple[np.ndarray, np.ndarray]:
    """Unbiased |G|² and tr(Σ) of the later half of the steps at the last batch size, so that they follow the loss.

    Batches count in tokens, and so does tr(Σ).
    """
    since = [line for line in lines if line["batch_tokens"] == lines[-1]["batch_tokens"]]
    small, big = (np.concatenate([np.array(line[name], float) for line in since]) for name in _NORMS)
    later = slice(len(small) // 2, None)
    return unbiased(Moments(small[later], big[later], since[-1]["small_batch_tokens"], since[-1]["batch_tokens"]))


def _should_double(live: LiveRamp, batch_tokens: int, lines: Sequence[dict]) -> bool:
    if 2 * batch_tokens > live.max_batch_tokens:
        return False
    if live.metric == "l1":
        measured = [line["l1"] for line in lines if line["batch_tokens"] == batch_tokens and "l1" in line]
        measured = measured[len(measured) // 2 :]
        if len(measured) < 3:
            return False
        noise_scale_at_least, _ = geometries.bounds(geometries.NormBounds(*np.array(measured, float).T))
    else:
        noise_scale_at_least = estimate(*recent_moments(lines)).low
    return noise_scale_at_least > live.threshold * 2 * batch_tokens
