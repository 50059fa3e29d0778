"""The two-stage fit of a batch-size scan: B_crit at each model and loss, then the power law through them.

First stage: McCandlish et al. 2018 (arXiv 1812.06162), eq. 2.11. Second stage: Kaplan et al. 2020 (arXiv 2001.08361),
eq. 1.4. Intervals of the law come from resampled runs.
"""

import dataclasses

import numpy as np

from scaling_jax.fitting.resampling import LawFit, law_errors, resamples_for
from scaling_jax.fitting.scan_table import ScanTable, scan_table
from scaling_jax.fitting.tradeoff import Tradeoff, fit_tradeoffs


@dataclasses.dataclass(frozen=True, eq=False)
class CriticalBatch:
    """One point of B_crit(L)."""

    model: str
    loss: float  # target loss, nats per token
    tradeoff: Tradeoff
    not_reached: int  # number of the model's runs that didn't reach the target
    bounds: int  # number of these that entered the fit as a bound: more steps than they had
    in_law: bool  # False if the interval of B_crit is open on a side, so the law can't use the point


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ScanFit(LawFit):
    """The trade-off at every model and target loss, and one law through their B_crit."""

    points: tuple[CriticalBatch, ...]  # by model in order of appearance, then by falling loss
    notes: tuple[str, ...]  # what was left out, and why


def fit_scan(
    model,
    batch_tokens,
    target_loss,
    steps,
    *,
    run=None,
    steps_tried=None,
    confidence: float = 0.95,
    resamples: int | None = None,
    seed: int = 0,
) -> ScanFit:
    """Fits a whole scan. The arguments are the columns of a table with one row for each run and target loss.

    Args:
      model: `[rows]`, names.
      batch_tokens: `[rows]`, tokens per step.
      target_loss: `[rows]`, nats per token.
      steps: `[rows]`, optimizer steps to the target; NaN if the run didn't reach it.
      run: `[rows]`, names that tell apart runs of one model and batch size (seeds); None if there is one run of each.
      steps_tried: `[rows]`, total steps of a run that didn't reach the target. The fit then knows that the target needs
        more steps. Used only where `steps` is NaN; None or NaN if unknown.
      confidence: of all intervals.
      resamples: number of resamples for the law's intervals; None takes 4,000, and down to 1,000 for large tables.
      seed: of the resamples; the same seed gives the same result.

    Raises:
      ValueError: for values out of range, columns of unequal length, or two rows for one run and target. Names the row.
    """
    table = scan_table(model, batch_tokens, target_loss, steps, run, steps_tried)
    notes = []
    num_batches = np.array([np.unique(row[mask]).size for row, mask in zip(table.log_batch, table.mask, strict=True)])
    for few in np.flatnonzero(num_batches < 3):
        notes.append(f"{_place(table, few)}: {num_batches[few]} batch sizes reached it, too few to fit")
    table = table.select(num_batches >= 3)

    tradeoffs = (
        fit_tradeoffs(table.log_batch, table.log_steps, table.mask, confidence, table.bound) if table.models else []
    )
    identified = np.array(
        [np.isfinite(tradeoff.b_crit_interval[1]) and tradeoff.b_crit_interval[0] > 0 for tradeoff in tradeoffs], bool
    )
    points = []
    for g, tradeoff in enumerate(tradeoffs):
        low, high = tradeoff.b_crit_interval
        if not identified[g]:
            notes.append(f"{_place(table, g)}: B_crit is in [{low:.3g}, {high:.3g}] tokens, left out of the law")
        elif tradeoff.one_sided:
            notes.append(
                f"{_place(table, g)}: too uncertain to be sure of batches on both sides of {tradeoff.b_crit:.3g}"
            )
        points.append(
            CriticalBatch(
                model=table.models[g],
                loss=float(table.losses[g]),
                tradeoff=tradeoff,
                not_reached=int(table.not_reached[g]),
                bounds=int(table.bound[g].sum()),
                in_law=bool(identified[g]),
            )
        )

    # Of 95 % intervals, some are bounded by chance, even at many losses at once, as losses share runs. So a law also
    # takes `one_sided`, a stricter test.
    both_sides = {point.loss for point in points if point.in_law and not point.tradeoff.one_sided}
    law = errors = None
    if len(both_sides) < 3:
        notes.append(f"no law: batches lie on both sides of B_crit at {len(both_sides)} losses, and a law takes 3")
    else:
        used = table.select(identified)
        errors = law_errors(used, resamples or resamples_for(used), seed)
        law = errors.law(confidence, used.losses)
    return ScanFit(points=tuple(points), law=law, notes=tuple(notes), confidence=confidence, errors=errors)


def _place(table: ScanTable, g) -> str:
    return f"model {table.models[g]} at loss {table.losses[g]:g}"
