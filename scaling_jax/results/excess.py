"""How far branches with larger batches are behind their run, and the batch size at which that reaches a tolerance.

Replicates of a branch are independent given the state that they start from; evaluations of one replicate aren't.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95


class Excess(NamedTuple):
    """Test loss of a branch minus that of the run after the same number of tokens, in nats per token; 95 % interval.

    All are inf if a replicate of the branch diverged. The interval is unbounded if there is one replicate.
    """

    batch_tokens: int
    mean: float
    low: float
    high: float


def excess(batch_tokens: int, differences: Sequence[np.ndarray]) -> Excess:
    """How far the branches with one batch size are behind the run, with Student's t over replicates.

    Evaluations of one replicate depend on each other. So each replicate counts once, with its mean.

    Args:
      differences: of each replicate [evaluations], its test losses minus those of the run; inf if it diverged.
    """
    means = np.array([np.mean(one) for one in differences])
    if not np.all(np.isfinite(means)):
        return Excess(batch_tokens, math.inf, math.inf, math.inf)
    mean, half = float(means.mean()), math.inf
    if len(means) > 1:
        half = float(stdtrit(len(means) - 1, (1 + CONFIDENCE) / 2) * means.std(ddof=1) / math.sqrt(len(means)))
    return Excess(batch_tokens, mean, mean - half, mean + half)


def largest_within(batch_tokens: int, branches: Sequence[Excess], tolerance: float) -> tuple[float, float, float]:
    """(b_crit, low, high): the batch size at which the excess reaches the tolerance, with its interval.

    The excess is linear in log batch size between branches, and 0 at the run's own batch size. The interval holds every
    batch size at which the excess may be the tolerance. It goes from where the upper end of the excess first exceeds
    the tolerance to where the lower end does so for good. If the mean excess never exceeds the tolerance, b_crit is inf
    and `low` at most the largest batch size of a branch. A branch that diverged ends the range: b_crit is below it.

    Args:
      batch_tokens: of the run.
      branches: by increasing batch size.
    """
    known = [Excess(batch_tokens, 0.0, 0.0, 0.0)]
    most = math.inf
    for branch in branches:
        if math.isinf(branch.mean):
            most = float(branch.batch_tokens)
            break
        known.append(branch)
    largest = float(known[-1].batch_tokens)
    sizes = np.array([branch.batch_tokens for branch in known], float)
    middle, lower, upper = (
        np.array([getattr(branch, end) for branch in known]) - tolerance for end in ("mean", "low", "high")
    )
    low = _first_above(sizes, upper, otherwise=largest)
    b_crit = _first_above(sizes, middle, otherwise=largest if most < math.inf else math.inf)
    last = int(np.flatnonzero(lower <= 0)[-1])
    high = most if last == len(known) - 1 else _crossing(sizes, lower, last)
    return b_crit, low, high


def _first_above(sizes: np.ndarray, values: np.ndarray, otherwise: float) -> float:
    """Batch size at which the values, which start below 0, first exceed 0."""
    above = np.flatnonzero(values > 0)
    return _crossing(sizes, values, int(above[0]) - 1) if len(above) else otherwise


def _crossing(sizes: np.ndarray, values: np.ndarray, before: int) -> float:
    """Batch size of value 0 between an entry at or below 0 and the next one, which is above; linear in its log."""
    here, after = values[before], values[before + 1]
    share = float(np.isinf(here)) if np.isinf(here) or np.isinf(after) else -here / (after - here)
    return float(sizes[before] * (sizes[before + 1] / sizes[before]) ** share)
