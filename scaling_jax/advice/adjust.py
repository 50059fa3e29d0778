"""A run at one batch size, as the run that another batch size would have made of it.

Kaplan et al. 2020 (arXiv 2001.08361), eq. 5.4 and 5.5.
"""

from typing import NamedTuple


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
