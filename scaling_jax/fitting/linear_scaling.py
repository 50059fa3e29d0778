"""CBS20: the batch size up to which steps scale almost linearly. It is another quantity than B_crit.

Zhang et al. 2024 (arXiv 2410.21676) count from a reference batch B_ref, which is 256 sequences: a run at CBS20 needs
20 % more tokens than a run at B_ref. On a hyperbola this is B_crit/5 + 1.2·B_ref. Counted from the limit of small
batches, E_min, it is B_crit/5. A trade-off with another shape has no such limit: with ever smaller batches, its tokens
go to 0 or to infinity.
"""

import math
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
from scipy import optimize

from scaling_jax.fitting.scan_fit import CriticalBatch
from scaling_jax.fitting.tradeoff import Tradeoff

OVERHEAD = 0.2


class HasSteps(Protocol):
    """A trade-off: a `Tradeoff`, its `shape`, or a `CriticalBatch`."""

    def steps_at(self, batch_tokens: Any) -> Any:
        """Steps to the loss at a batch size in tokens."""


def cbs20(tradeoff: HasSteps, reference_batch_tokens: float | None = None) -> float:
    """The largest batch size in tokens at which a run needs at most 20 % more tokens than at a reference batch.

    Args:
      tradeoff: a Tradeoff, its `shape`, a CriticalBatch, or another object with `steps_at`.
      reference_batch_tokens: B_ref in tokens; None counts from the limit of small batches, which only hyperbolas have.

    Raises:
      ValueError: if the reference batch isn't positive and finite, or is None and the trade-off is no hyperbola.
    """
    if reference_batch_tokens is None:
        if isinstance(tradeoff, CriticalBatch) and not tradeoff.free_shape:
            tradeoff = tradeoff.tradeoff
        if not isinstance(tradeoff, Tradeoff):
            raise ValueError("this trade-off is no hyperbola, so its tokens have no minimum: give a reference batch")
        return tradeoff.cbs20
    if not 0 < reference_batch_tokens < math.inf:
        raise ValueError(f"reference_batch_tokens is {reference_batch_tokens}; must be positive and finite")
    tokens = (1 + OVERHEAD) * reference_batch_tokens * float(tradeoff.steps_at(reference_batch_tokens))
    return largest_batch_of(tradeoff.steps_at, tokens, reference_batch_tokens)


def largest_batch_of(steps_at: Callable[[Any], Any], tokens: float, smaller_batch_tokens: float) -> float:
    """The largest batch size in tokens at which a run needs at most `tokens` tokens.

    Args:
      steps_at: batch size in tokens -> steps.
      tokens: more than a run needs with `smaller_batch_tokens`.
      smaller_batch_tokens: somewhere below; in between, tokens may fall and then rise.
    """
    log_most = math.log(tokens / float(steps_at(np.inf))) + 1e-9  # as no run has fewer steps

    def excess(log_batch: float) -> float:
        return float(np.log(steps_at(math.exp(log_batch)))) + log_batch - math.log(tokens)

    return math.exp(optimize.brentq(excess, math.log(smaller_batch_tokens), log_most, xtol=1e-13, rtol=1e-13))
