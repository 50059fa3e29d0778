"""Seesaw: a batch that grows where the learning rate of a schedule would fall.

Meterez et al. 2025 (arXiv 2510.14717): where the rate would fall by a factor k, let it fall by √k, and let the batch
grow by k. The run then takes the same tokens in fewer steps, to about the same loss, as long as the batch stays below
B_crit. Above the largest batch, the rate falls by all of k.
"""

import math
from collections.abc import Callable

from scaling_jax.io import UserError
from scaling_jax.training.stages import Stage

_LOOKS = 4_096  # places at which the schedule is checked to fall


def seesaw(
    rate: Callable[[float], float],
    max_tokens: int,
    *,
    batch_tokens: int,
    factor: int = 2,
    max_batch_tokens: float = math.inf,
) -> tuple[Stage, ...]:
    """The stages of a ramp that replaces a decaying learning rate.

    Args:
      rate: tokens -> learning rate, in any unit; after its peak it must not rise. A warm-up before the peak is the
        run's own.
      max_tokens: of the whole run.
      batch_tokens: of the first stage, which lasts until the rate has fallen by `factor`.
      factor: by which the batch grows from stage to stage; 2 in the paper.
      max_batch_tokens: largest batch, B_crit or below.

    Returns:
      The stages, for a run whose own rate is constant at the peak. Each starts after whole steps of the one before.

    Raises:
      UserError: if the rate rises after its peak or isn't positive before the end, or for values that aren't positive.
    """
    if batch_tokens < 1 or factor < 2 or max_tokens < batch_tokens or not max_batch_tokens >= batch_tokens:
        raise UserError(
            f"seesaw from {batch_tokens} to {max_batch_tokens} tokens by factors of {factor} over {max_tokens} tokens: "
            "batches must be positive, the largest not below the first, the factor 2 or more"
        )
    looks = [max_tokens * k / _LOOKS for k in range(_LOOKS)]
    rates = [rate(tokens) for tokens in looks]
    top = max(range(_LOOKS), key=rates.__getitem__)
    for k in range(top, _LOOKS):
        if not 0 < rates[k] < math.inf or (k > top and rates[k] > rates[k - 1] * (1 + 1e-9)):
            raise UserError(
                f"the learning rate is {rates[k]:g} at {looks[k]:,.0f} tokens: after its peak of {rates[top]:g} it "
                "must stay positive and not rise"
            )
    stages = [Stage(0, batch_tokens, 1.0)]
    level = rates[top]
    while True:
        level /= factor
        before = stages[-1]
        at = _first_below(rate, level, max(before.tokens, looks[top]), max_tokens)
        steps = max(math.ceil((at - before.tokens) / before.batch_tokens), 1)
        tokens = before.tokens + steps * before.batch_tokens
        grown = before.batch_tokens * factor
        batch, fall = (grown, math.sqrt(factor)) if grown <= max_batch_tokens else (before.batch_tokens, float(factor))
        if tokens + batch > max_tokens:
            return tuple(stages)
        stages.append(Stage(tokens, batch, before.learning_rate_factor / fall))


def _first_below(rate: Callable[[float], float], level: float, low: float, high: float) -> float:
    """Where a falling rate reaches a level, by bisection; `high` if it doesn't."""
    if rate(low) <= level:
        return low
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rate(middle) > level else (low, middle)
    return high
