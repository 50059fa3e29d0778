"""Batch sizes side by side: steps, tokens, wall time and excess compute to one loss.

McCandlish et al. 2018 (arXiv 1812.06162), section 2.3. The knee of the trade-off is B_crit itself: there the product of
steps and tokens is smallest, and in log steps against log tokens the curve bends most.
"""

import dataclasses
import math
from typing import NamedTuple

from scaling_jax.advice.goal import Goal
from scaling_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Devices that share each batch."""

    devices: int
    tokens_per_second: float  # of one device
    device_batch_tokens: float = 0.0  # a device that is given fewer tokens a step takes no less time for them

    def __post_init__(self):
        if self.devices < 1 or not 0 < self.tokens_per_second < math.inf:
            raise UserError(
                f"{self.devices} devices at {self.tokens_per_second:g} tokens_per_second: both should be positive"
            )
        if not 0 <= self.device_batch_tokens < math.inf:
            raise UserError(f"device_batch_tokens = {self.device_batch_tokens} must be positive and finite, or 0")

    def seconds(self, batch_tokens: float, steps: float) -> float:
        """Wall time, without time lost to communication."""
        return steps * max(batch_tokens / self.devices, self.device_batch_tokens) / self.tokens_per_second


@dataclasses.dataclass(frozen=True)
class Choice:
    """One batch size on the way to a goal."""

    batch_tokens: float
    steps: float
    steps_interval: tuple[float, float]
    tokens: float
    excess_compute: float  # tokens over E_min, less 1: B/B_crit
    excess_steps: float  # steps over S_min, less 1: B_crit/B
    seconds: float | None  # None without hardware
    tested: bool  # False: smaller or larger than any batch that was run
    within_budget: bool  # tokens; True without a budget


def choices(to: Goal, batches, hardware: Hardware | None = None, budget_tokens: float = math.inf) -> tuple[Choice, ...]:
    """What each batch size, in tokens, costs."""
    rows = []
    for batch in batches:
        steps, tokens = float(to.steps(batch)), float(to.tokens(batch))
        low, high = to.steps_interval(batch)
        rows.append(
            Choice(
                batch_tokens=batch,
                steps=steps,
                steps_interval=(float(low), float(high)),
                tokens=tokens,
                excess_compute=batch / to.b_crit,
                excess_steps=to.b_crit / batch,
                seconds=None if hardware is None else hardware.seconds(batch, steps),
                tested=to.batch_range[0] * (1 - 1e-9) <= batch <= to.batch_range[1] * (1 + 1e-9),
                within_budget=tokens <= budget_tokens,
            )
        )
    return tuple(rows)


def powers_around(to: Goal) -> tuple[int, ...]:
    """Powers of two from an eighth of B_crit to eight times it."""
    middle = round(math.log2(to.b_crit))
    return tuple(2**k for k in range(max(middle - 3, 0), middle + 4))


def largest_within(to: Goal, budget_tokens: float) -> float:
    """Largest batch, in tokens, that reaches the goal within a budget of tokens: B_crit·(budget/E_min - 1).

    Raises:
      UserError: if no batch size does.
    """
    if not budget_tokens > to.e_min:
        raise UserError(
            f"model {to.model} needs more than {to.e_min:.3g} tokens to loss {to.loss:g} at any batch size; "
            f"the budget is {budget_tokens:.3g}"
        )
    return to.b_crit * (budget_tokens / to.e_min - 1.0)


def fastest(to: Goal, hardware: Hardware, budget_tokens: float = math.inf) -> float | None:
    """Batch in tokens with the least wall time; None if only the limit of small batches has it.

    Up to the batch that fills all devices a step's time is constant, so that fewer steps are faster; beyond it time
    goes with tokens, so that smaller batches are.
    """
    if hardware.device_batch_tokens == 0:
        return None
    return min(hardware.devices * hardware.device_batch_tokens, largest_within(to, budget_tokens))


class Adjusted(NamedTuple):
    """A value with the interval that it inherits from B_crit's."""

    value: float
    low: float
    high: float


def fewest_steps(steps, batch_tokens, b_crit, b_crit_interval=None) -> Adjusted:
    """S_min = S/(1 + B_crit/B): steps to the same loss if the batch were far above B_crit.

    Args:
      steps: of a run at `batch_tokens` tokens a step.
      b_crit, b_crit_interval: tokens, at the loss that the run reached; no interval is an interval of no width.
    """
    low, high = (b_crit, b_crit) if b_crit_interval is None else b_crit_interval
    value, at_low, at_high = (steps / (1.0 + b / batch_tokens) for b in (b_crit, low, high))
    return Adjusted(value, at_high, at_low)


def least_compute(compute, batch_tokens, b_crit, b_crit_interval=None) -> Adjusted:
    """C_min = C/(1 + B/B_crit): compute to the same loss if the batch were far below B_crit, in the unit of `compute`.

    Args:
      compute: of a run at `batch_tokens` tokens a step; tokens or FLOPs alike.
      b_crit, b_crit_interval: tokens, at the loss that the run reached; no interval is an interval of no width.
    """
    low, high = (b_crit, b_crit) if b_crit_interval is None else b_crit_interval
    # b/(b + B), not 1/(1 + B/b), so that an interval from 0 needs no division by it.
    value, at_low, at_high = (
        compute * (b / (b + batch_tokens) if b < float("inf") else 1.0) for b in (b_crit, low, high)
    )
    return Adjusted(value, at_low, at_high)
