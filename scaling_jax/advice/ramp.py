"""A batch that doubles as B_crit grows, and how far a schedule of batches gets in steps and tokens.

Merrill et al. 2025 (arXiv 2505.23971): start small, double the batch when the critical one has passed twice it, and the
learning rate times √2. McCandlish et al. 2018 (arXiv 1812.06162), appendix D: while the loss falls a little, a batch B
takes dS = dS_min + dE_min/B steps and so dE = B·dS_min + dE_min tokens, with S_min and E_min as functions of the loss.
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
    """S_min and E_min along falling losses, `[losses]` each; before the first loss nothing is known but their sums."""

    losses: np.ndarray  # nats per token, falling
    s_min: np.ndarray  # steps
    e_min: np.ndarray  # tokens
    b_crit: np.ndarray  # tokens, by the law, never falling


class Cost(NamedTuple):
    """Steps and tokens that a schedule takes to the last loss."""

    steps: float
    tokens: float


def descent(fit: ScanFit, target_loss: float, model: str | None = None) -> Descent:
    """What the model needs on its way from the highest loss measured down to the target.

    Raises:
      UserError: if the target lies outside of the losses measured, or nothing is known about the model.
    """
    model = model or next(iter(models_of(fit)), "")
    _, first = losses_of(fit, model)
    losses = np.geomspace(first, goal(fit, target_loss, model).loss, GRID)
    goals = _on_grid(fit, model, losses)
    # Where neighbouring fits are a little out of order nothing is gained by waiting.
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
    """Stages that keep the batch between half of `fraction`·B_crit(L) and all of it.

    Args:
      fit: of a scan.
      target_loss: nats per token, inside the range measured.
      start_batch_tokens: of the first stage; every later batch is it times a power of two.
      max_batch_tokens: never exceeded; None leaves it open.
      model: whose progress the tokens are of; by default the one that got to the lowest loss.
      fraction: below 1 trades steps for tokens.

    Returns:
      the first stage from 0 tokens on; each later one starts where a whole number of steps of the stage before ends.
      The batch isn't raised before the highest loss measured: the law is untested there.

    Raises:
      UserError: for a batch or fraction that isn't positive, or a target outside of the losses measured.
    """
    if start_batch_tokens < 1 or (max_batch_tokens or math.inf) < start_batch_tokens or not fraction > 0:
        raise UserError(
            f"a ramp from {start_batch_tokens} to {max_batch_tokens} tokens at {fraction:g}·B_crit: batches should be "
            "positive and rising, and the fraction positive"
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
    """Steps and tokens to the last loss of `way` under a schedule; one stage is a constant batch."""
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
            done = left / needed  # of this stretch, before the next stage begins
            steps, tokens = steps + left / batch, tokens + left
            more_steps, more_tokens = more_steps * (1 - done), more_tokens * (1 - done)
            k += 1
    return Cost(steps, tokens)


def _on_grid(fit: ScanFit, model: str, losses: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    points = sorted(
        (p.loss, p.tradeoff.s_min, p.tradeoff.e_min)
        for p in fit.points
        if p.model == model and p.in_law and not p.tradeoff.one_sided
    )
    log_loss, log_s_min, log_e_min = np.log(np.array(points)).T
    return np.interp(np.log(losses), log_loss, log_s_min), np.interp(np.log(losses), log_loss, log_e_min)
