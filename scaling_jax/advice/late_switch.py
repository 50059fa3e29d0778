"""One late switch from a small to a large batch: few steps for a stated share of extra tokens.

Wang et al. 2026 (arXiv 2602.14208) find that a run may keep a small batch for most of training and switch to a large
one late, because the noise that the small batch has added is soon forgotten. Their schedule rests on the exponents of a
functional scaling law, which a batch-size scan doesn't measure. The rule here is ours, from the trade-off of steps and
tokens; it knows no such forgetting.

Between two losses a batch B takes (1 + B_c/B)·dS_min steps and (B + B_c)·dS_min tokens, where B_c is the local B_crit
(McCandlish et al. 2018, arXiv 1812.06162, appendix D). In place of a batch b, a larger B takes (B − b)·dS_min more
tokens and (1/b − 1/B)·B_c·dS_min fewer steps: a saved step costs b·B/B_c tokens. B_c grows as the loss falls, so steps
are saved most cheaply at the end. Of all schedules of these two batches with the same tokens, one switch from b to B
takes the fewest steps. Up to the loss L* it takes (B − b)·(S_min(L*) − S_min(L_s)) more tokens than b alone, if it
switches at L_s.
"""

import math

import numpy as np

from scaling_jax.advice.ramp import descent
from scaling_jax.fitting import ScanFit
from scaling_jax.io import UserError
from scaling_jax.training.stages import Stage

_ROUNDING = 1e-12


def late_switch(
    fit: ScanFit,
    target_loss: float,
    *,
    start_batch_tokens: int,
    max_batch_tokens: int,
    extra_tokens: float = 0.1,
    model: str | None = None,
) -> tuple[Stage, ...]:
    """A ramp of two stages that switches as early as its share of extra tokens allows.

    Args:
      fit: of a scan; its trade-offs may have any shape.
      target_loss: nats per token, inside the measured range.
      start_batch_tokens: batch before the switch.
      max_batch_tokens: batch after it.
      extra_tokens: share of tokens above those that the first batch alone takes to the target.
      model: its steps give the tokens of the switch; None takes the model with the lowest loss.

    Returns:
      The stages. The second starts after whole steps of the first, not before the highest measured loss, because
      nothing was measured there; its learning rate is √(B/b) times the first one's. One stage, if less than a step of
      the large batch is left to the target.

    Raises:
      UserError: for batches that don't grow or a share below 0, or a target outside the measured range.
    """
    small, large = start_batch_tokens, max_batch_tokens
    if not 1 <= small < large or not 0 <= extra_tokens < math.inf:
        raise UserError(
            f"a late switch from {small:,} to {large:,} tokens for {extra_tokens:g} of extra tokens: the second batch "
            "must be the larger one, and the share 0 or more"
        )
    way = descent(fit, target_loss, model)
    before, after = small * way.steps_at(small), large * way.steps_at(large)  # tokens to each loss
    whole = before + after[-1] - after  # of a run that switches there
    at = int(np.argmax(whole <= (1 + extra_tokens) * before[-1] * (1 + _ROUNDING)))  # the last loss always fits
    tokens = math.ceil(before[at] / small) * small
    first = Stage(0, small)
    if after[-1] - after[at] < large:
        return (first,)
    return first, Stage(tokens, large, math.sqrt(large / small))
