"""What batch sizes cost to reach a goal: steps, tokens, wall time, learning rate; and which one to choose."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from scaling_jax.advice.goal import Goal
from scaling_jax.advice.rates import Rates
from scaling_jax.fitting.linear_scaling import largest_batch_of
from scaling_jax.io import UserError


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Devices over which each batch is split."""

    devices: int
    tokens_per_second: float  # of one device at full speed
    device_batch_tokens: float = 0.0  # tokens per step at which a device reaches full speed; fewer take the same time

    def __post_init__(self):
        if self.devices < 1 or not 0 < self.tokens_per_second < math.inf:
            raise UserError(
                f"{self.devices} devices at {self.tokens_per_second:g} tokens_per_second: both must be positive"
            )
        if self.device_batch_tokens != 0 and not 1 <= self.device_batch_tokens < math.inf:
            raise UserError(f"device_batch_tokens = {self.device_batch_tokens} must be 0, or at least 1 and finite")

    def seconds(self, batch_tokens: float, steps: float) -> float:
        """Wall time of a run, without communication."""
        return steps * max(batch_tokens / self.devices, self.device_batch_tokens) / self.tokens_per_second


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one batch size costs to reach a goal."""

    batch_tokens: float
    steps: float
    steps_interval: tuple[float, float]
    tokens: float
    excess_compute: float  # tokens over `least_tokens`, minus 1
    excess_steps: float  # steps over S_min, minus 1
    seconds: float | None  # None without hardware
    tested: bool  # True if the batch size lies in the range of the runs
    within_budget: bool  # True also without a budget
    learning_rate: float | None = None  # None if the runs' rates are unknown
    learning_rate_source: str | None = None  # "tuned", "edge", "between" or "rule"; see `Rates`


class Adjusted(NamedTuple):
    """A value, and its interval from the interval of B_crit."""

    value: float
    low: float
    high: float


def least_tokens(to: Goal, reference_batch_tokens: float | None = None) -> float:
    """The tokens that `excess_compute` counts from: E_min, or with a free shape those at a reference batch.

    A free shape has no E_min. None takes the smallest batch of the runs.
    """
    if to.hyperbolas:
        return to.e_min
    return float(to.tokens(to.batch_range[0] if reference_batch_tokens is None else reference_batch_tokens))


def choices(
    to: Goal,
    batches,
    hardware: Hardware | None = None,
    budget_tokens: float = math.inf,
    rates: Rates | None = None,
    reference_batch_tokens: float | None = None,
) -> tuple[Choice, ...]:
    """The cost of each batch size (in tokens)."""
    rows = []
    least = least_tokens(to, reference_batch_tokens)
    for batch in batches:
        steps, tokens = float(to.steps(batch)), float(to.tokens(batch))
        low, high = to.steps_interval(batch)
        rate = None if rates is None else rates.at(batch)
        rows.append(
            Choice(
                batch_tokens=batch,
                steps=steps,
                steps_interval=(float(low), float(high)),
                tokens=tokens,
                excess_compute=tokens / least - 1,
                excess_steps=steps / to.s_min - 1,
                seconds=None if hardware is None else hardware.seconds(batch, steps),
                tested=to.batch_range[0] * (1 - 1e-9) <= batch <= to.batch_range[1] * (1 + 1e-9),
                within_budget=tokens <= budget_tokens,
                learning_rate=None if rate is None else rate.learning_rate,
                learning_rate_source=None if rate is None else rate.source,
            )
        )
    return tuple(rows)


def powers_around(to: Goal) -> tuple[int, ...]:
    """Powers of two from an eighth of B_crit to eight times it."""
    middle = round(math.log2(to.b_crit))
    return tuple(2**k for k in range(max(middle - 3, 0), middle + 4))


def largest_within(to: Goal, budget_tokens: float) -> float:
    """Largest batch in tokens that reaches the goal within a budget of tokens.

    Raises:
      UserError: if no batch size does; with a free shape, if no batch size in the range of the runs does.
    """
    if budget_tokens == math.inf:
        return math.inf
    if to.hyperbolas:
        smallest, least, where = 1e-9 * to.b_crit, to.e_min, "at any batch size"
    else:  # outside of the runs its tokens may go to 0
        tested = np.geomspace(*to.batch_range, 200)
        smallest = float(tested[np.argmin(to.tokens(tested))])
        least, where = float(to.tokens(smallest)), "at any batch size of the runs"
    if not budget_tokens > least * (1 + 1e-8):
        raise UserError(
            f"model {to.model} needs more than {least:,.0f} tokens to loss {to.loss:g} {where}, but the "
            f"budget is {budget_tokens:,.0f}: give a larger budget or a higher loss"
        )
    return largest_batch_of(to.steps, budget_tokens, smallest)


def fastest(to: Goal, hardware: Hardware, budget_tokens: float = math.inf) -> float | None:
    """Batch in tokens with the least wall time; None if the smallest batch is the fastest.

    Up to the batch at which all devices reach full speed, each step takes the same time, so larger batches are faster.
    Above it, time is proportional to tokens, so smaller batches are faster.
    """
    if hardware.device_batch_tokens == 0:
        return None
    return min(hardware.devices * hardware.device_batch_tokens, largest_within(to, budget_tokens))


def fewest_steps(steps, batch_tokens, b_crit, b_crit_interval=None) -> Adjusted:
    """S_min = S/(1 + B_crit/B): steps to the same loss with a batch far above B_crit.

    Args:
      steps: of a run with `batch_tokens` tokens per step.
      b_crit, b_crit_interval: in tokens, at the loss that the run reached; without an interval, b_crit is exact.
    """
    low, high = (b_crit, b_crit) if b_crit_interval is None else b_crit_interval
    value, at_low, at_high = (steps / (1.0 + b / batch_tokens) for b in (b_crit, low, high))
    return Adjusted(value, at_high, at_low)


def least_compute(compute, batch_tokens, b_crit, b_crit_interval=None) -> Adjusted:
    """C_min = C/(1 + B/B_crit): compute to the same loss with a batch far below B_crit.

    Args:
      compute: of a run with `batch_tokens` tokens per step; in tokens or FLOPs, and so is the result.
      b_crit, b_crit_interval: in tokens, at the loss that the run reached; without an interval, b_crit is exact.
    """
    low, high = (b_crit, b_crit) if b_crit_interval is None else b_crit_interval
    # b/(b + B) instead of 1/(1 + B/b), because the interval may start at 0.
    value, at_low, at_high = (
        compute * (b / (b + batch_tokens) if b < float("inf") else 1.0) for b in (b_crit, low, high)
    )
    return Adjusted(value, at_low, at_high)
