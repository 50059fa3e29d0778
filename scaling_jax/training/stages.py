"""The stages of batch ramps."""

import dataclasses
import json
import math
from collections.abc import Sequence

from scaling_jax.io import UserError


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of a batch ramp."""

    tokens: int  # the stage starts at the first step that has processed this many tokens
    batch_tokens: int
    learning_rate_factor: float = 1.0  # times the run's learning rate


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
