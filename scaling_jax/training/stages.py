"""Batch ramps: stages, each with a larger batch than the one before; their file."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

from scaling_jax.io import UserError
from scaling_jax.io.config import from_dict
from scaling_jax.io.files import read_whole


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a batch ramp."""

    tokens: int  # the stage starts at the first step that has processed this many tokens
    batch_tokens: int
    learning_rate_factor: float = 1.0  # times the run's learning rate


def read_stages(path: Path) -> tuple[Stage, ...]:
    """The stages in a JSON file that `scaling-jax advise --write-ramp` wrote. The first stage starts at 0 tokens.

    Raises:
      UserError: if the file isn't there, or isn't a list of stages.
    """
    try:
        listed = json.loads(read_whole(path))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"can't read a ramp from {path} ({error}): make one with scaling-jax advise --write-ramp"
        ) from None
    if not isinstance(listed, list) or not listed or not all(isinstance(stage, dict) for stage in listed):
        raise UserError(f'{path} isn\'t a list of stages, such as [{{"tokens": 0, "batch_tokens": 128}}]')
    stages = tuple(from_dict(Stage, stage, where=f"{path}[{k}].") for k, stage in enumerate(listed))
    if stages[0].tokens != 0:
        raise UserError(f"the first stage of {path} must start at 0 tokens, not at {stages[0].tokens:,}")
    return stages


def check_stages(batch_tokens: int, stages: Sequence[Stage]) -> None:
    """Raises UserError unless each stage starts later than the one before, with a larger batch."""
    before = Stage(0, batch_tokens)
    for stage in stages:
        if (
            stage.tokens <= before.tokens
            or stage.batch_tokens <= before.batch_tokens
            or not 0 < stage.learning_rate_factor < math.inf
        ):
            raise UserError(
                "each stage of a ramp must start later, with a larger batch and a positive learning rate: "
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
