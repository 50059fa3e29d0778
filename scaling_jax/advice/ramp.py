"""Batch ramps that double the batch as B_crit grows, and the cost of a ramp in steps and tokens.

Merrill et al. 2025 (arXiv 2505.23971): start with a small batch. When B_crit exceeds twice the batch, double the batch
and multiply the learning rate by √2. McCandlish et al. 2018 (arXiv 1812.06162), appendix D: for a small fall of the
loss, a batch B needs dS = dS_min + dE_min/B steps, so dE = B·dS_min + dE_min tokens. S_min and E_min are functions of
the loss.
"""

import math
from typing import NamedTuple

import numpy as np

from scaling_jax.advice.goal import goal, losses_of, models_of
from scaling_jax.fitting import ScanFit
from scaling_jax.io import UserError
from scaling_jax.training.run import Stage

GRID = 2_000  # losses between the highest measured one and the target


class Descent(NamedTuple):
    """S_min, E_min and B_crit along falling losses, `[losses]` each; steps and tokens count from the first step."""

    losses: np.ndarray  # nats per token, falling
    s_min: np.ndarray  # steps
    e_min: np.ndarray  # tokens
    b_crit: np.ndarray  # tokens, by the law; never decreases


class Cost(NamedTuple):
    """Steps and tokens that a schedule needs to the last loss."""

    steps: float
    tokens: float


def descent(fit: ScanFit, target_loss: float, model: str | None = None) -> Descent:
    """S_min, E_min and B_crit of a model from its highest measured loss to the target.

    Raises:
      UserError: if the target is outside the measured range, or the model has no usable trade-off.
    """
    model = model or next(iter(models_of(fit)), "")
    _, first = losses_of(fit, model)
    losses = np.geomspace(first, goal(fit, target_loss, model).loss, GRID)
    goals = _on_grid(fit, model, losses)
    # S_min and E_min can't fall as the loss falls, though neighbouring fits may show this.
    log_s_min, log_e_min = (np.maximum.accumulate(x) for x in goals)
    b_crit = fit.law(losses) if fit.law else np.exp(log_e_min - log_s_min)
    return Descent(losses, np.exp(log_s_min), np.exp(log_e_min), np.maximum.accumulate(b_crit))


def ramp(
    fit: ScanFit,
    target_loss: float,
    *,
    start_batch_tokens: int,
    max_batch_tokens: int | None = None,
    model: str | None = None,
    fraction: float = 1.0,
) -> tuple[Stage, ...]:
    """A ramp that keeps the batch between half of `fraction`·B_crit(L) and all of it.

    Args:
      fit: of a scan.
      target_loss: nats per token, inside the measured range.
      start_batch_tokens: batch of the first stage; later batches are this times a power of two.
      max_batch_tokens: largest batch; None sets no limit.
      model: its S_min and E_min give the tokens of the stages; None takes the model with the lowest loss.
      fraction: below 1, the run needs more steps and fewer tokens.

    Returns:
      The stages. The first starts at 0 tokens; each later one after a whole number of steps of the stage before. Before
      the highest measured loss the batch doesn't grow, because the law is untested there.

    Raises:
      UserError: for a batch or fraction that isn't positive, or a target outside the measured range.
    """
    if start_batch_tokens < 1 or (max_batch_tokens or math.inf) < start_batch_tokens or not fraction > 0:
        raise UserError(
            f"a ramp from {start_batch_tokens} to {max_batch_tokens} tokens at {fraction:g}·B_crit: the batches must "
            "be positive, the second not below the first, and the fraction positive"
        )
    way = descent(fit, target_loss, model)
    largest = max_batch_tokens or math.inf
    stages = [Stage(0, start_batch_tokens, 1.0)]
    for k in range(GRID - 1):
        batch = stages[-1].batch_tokens
        while 2 * batch <= min(largest, fraction * way.b_crit[k]):
            batch *= 2
        if batch > stages[-1].batch_tokens:
            tokens = cost(Descent(*(x[: k + 1] for x in way)), tuple(stages)).tokens
            before = stages[-1]
            whole = before.tokens + math.ceil((tokens - before.tokens) / before.batch_tokens) * before.batch_tokens
            stages.append(Stage(whole, batch, math.sqrt(batch / start_batch_tokens)))
    return tuple(stages)


def cost(way: Descent, stages: tuple[Stage, ...]) -> Cost:
    """Steps and tokens to the last loss of `way` with a schedule of batches. One stage is a constant batch."""
    steps = tokens = 0.0
    starts = [stage.tokens for stage in stages] + [math.inf]
    k = 0
    s_before = e_before = 0.0
    for s_min, e_min in zip(way.s_min.tolist(), way.e_min.tolist(), strict=True):
        more_steps, more_tokens = s_min - s_before, e_min - e_before
        s_before, e_before = s_min, e_min
        while True:
            batch = stages[k].batch_tokens
            needed = batch * more_steps + more_tokens
            left = starts[k + 1] - tokens
            if needed <= left:
                steps, tokens = steps + needed / batch, tokens + needed
                break
            done = left / needed  # part of this fall of the loss that comes before the next stage
            steps, tokens = steps + left / batch, tokens + left
            more_steps, more_tokens = more_steps * (1 - done), more_tokens * (1 - done)
            k += 1
    return Cost(steps, tokens)


def _on_grid(fit: ScanFit, model: str, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    points = sorted(
        (p.loss, p.tradeoff.s_min, p.tradeoff.e_min)
        for p in fit.points
        if p.model == model and p.identified and not p.tradeoff.one_sided
    )
    log_loss, log_s_min, log_e_min = np.log(np.array(points)).T
    return np.interp(np.log(losses), log_loss, log_s_min), np.interp(np.log(losses), log_loss, log_e_min)
