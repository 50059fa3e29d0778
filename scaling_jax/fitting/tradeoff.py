"""The trade-off between optimizer steps and tokens at one loss, and its turning point, B_crit.

McCandlish et al. 2018 (arXiv 1812.06162), eq. 2.11; Kaplan et al. 2020 (arXiv 2001.08361), eq. 5.1 to 5.3.
"""

import dataclasses

import numpy as np

from scaling_jax.fitting.hyperbolas import fit_hyperbolas, one_sided, profile_intervals


@dataclasses.dataclass(frozen=True, eq=False)
class Tradeoff:
    """(S/S_min - 1)(E/E_min - 1) = 1 with E = B·S: steps in optimizer steps, batches and E in tokens."""

    s_min: float
    e_min: float
    b_crit: float  # E_min/S_min: twice the least steps, twice the least tokens
    b_crit_interval: tuple[float, float]  # ends are 0 or infinity where the data reject no smaller or no larger B_crit
    one_sided: bool  # the data don't show batches on both sides of B_crit: read the interval, not the number
    confidence: float
    batch_tokens: np.ndarray = dataclasses.field(repr=False)
    steps: np.ndarray = dataclasses.field(repr=False)
    residuals: np.ndarray = dataclasses.field(repr=False)  # log(steps measured/steps fitted)

    def steps_at(self, batch_tokens):
        """Steps to the loss at a batch size in tokens, S_min·(1 + B_crit/B)."""
        return self.s_min * (1.0 + self.b_crit / np.asarray(batch_tokens, float))

    def tokens_at(self, batch_tokens):
        """Tokens to the loss at a batch size in tokens, E_min·(1 + B/B_crit)."""
        return self.e_min * (1.0 + np.asarray(batch_tokens, float) / self.b_crit)

    def batch_at_overhead(self, overhead: float) -> float:
        """Batch size in tokens that needs (1 + overhead)·E_min tokens; overhead 1 is B_crit itself."""
        return overhead * self.b_crit

    @property
    def cbs20(self) -> float:
        """Batch size in tokens at 20 % over linear scaling (Zhang et al. 2024, arXiv 2410.21676): not B_crit.

        Read off this hyperbola, whose linear scaling is the limit of small batches; Zhang et al. start from the best
        small batch that they ran.
        """
        return self.batch_at_overhead(0.2)


def fit_tradeoff(batch_tokens, steps, *, confidence: float = 0.95) -> Tradeoff:
    """Fits S_min and E_min to the steps that runs at several batch sizes took to one loss, robustly in log space.

    Args:
      batch_tokens: `[n]`, tokens per step; a batch size may repeat (seeds).
      steps: `[n]`, optimizer steps to the loss.
      confidence: of `b_crit_interval`, the set of B_crit that an F test on Huber's loss doesn't reject.

    Raises:
      ValueError: for values that aren't positive and finite, unequal lengths, or fewer than three distinct batch sizes.
    """
    batch_tokens, steps = _checked(batch_tokens, steps)
    mask = np.ones((1, steps.size), bool)
    return fit_tradeoffs(np.log(batch_tokens)[None], np.log(steps)[None], mask, confidence)[0]


def fit_tradeoffs(log_batch, log_steps, mask, confidence: float) -> list[Tradeoff]:
    """One fit for each row of `[rows, n]` natural logs, of the points where `mask` is True; nothing is checked."""
    fits = fit_hyperbolas(log_batch, log_steps, mask)
    lows, highs = profile_intervals(fits, log_batch, log_steps, mask, confidence)
    flags = one_sided(fits, log_batch, log_steps, mask)
    return [
        Tradeoff(
            s_min=float(np.exp(log_s_min)),
            e_min=float(np.exp(log_s_min + log_b_crit)),
            b_crit=float(np.exp(log_b_crit)),
            b_crit_interval=(float(np.exp(low)), float(np.exp(high))),
            one_sided=bool(flag),
            confidence=confidence,
            batch_tokens=np.exp(log_batch[row, mask[row]]),
            steps=np.exp(log_steps[row, mask[row]]),
            residuals=fits.residuals[row, mask[row]],
        )
        for row, (log_b_crit, log_s_min, low, high, flag) in enumerate(
            zip(fits.log_b_crit, fits.log_s_min, lows, highs, flags, strict=True)
        )
    ]


def _checked(batch_tokens, steps) -> tuple[np.ndarray, np.ndarray]:
    batch_tokens, steps = np.asarray(batch_tokens, float), np.asarray(steps, float)
    if batch_tokens.ndim != 1 or batch_tokens.shape != steps.shape:
        raise ValueError(f"batch_tokens {batch_tokens.shape} and steps {steps.shape} should be two lists of one length")
    for name, values in (("batch_tokens", batch_tokens), ("steps", steps)):
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if bad.size:
            raise ValueError(
                f"{name}[{bad[0]}] is {values[bad[0]]:g}; should be positive and finite (leave out misses)"
            )
    distinct = np.unique(batch_tokens).size
    if distinct < 3:
        raise ValueError(f"{distinct} distinct batch sizes can't show a trade-off of two parameters: give at least 3")
    return batch_tokens, steps
