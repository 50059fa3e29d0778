"""S_min at every model and loss, B_* and alpha_B from all runs at once.

Kaplan et al. 2020 (arXiv 2001.08361), eq. 1.4 and 5.3, put into McCandlish et al. 2018 (arXiv 1812.06162), eq. 2.11.
The two-stage fit (`fit_scan`) shows each B_crit and so where the law fails; this one takes the law for granted and uses
what single losses can't bound.
"""

import dataclasses

import numpy as np

from scaling_jax.fitting.joint import fit_joint_rows
from scaling_jax.fitting.joint_errors import joint_errors
from scaling_jax.fitting.resampling import LawFit, fit_chain
from scaling_jax.fitting.scan_table import ScanTable, scan_table
from scaling_jax.fitting.tradeoff import fit_tradeoffs


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class JointFit(LawFit):
    """One law, and S_min of each model and target loss under it."""

    models: tuple[str, ...]  # of each S_min
    losses: np.ndarray  # of each S_min, nats per token
    s_min: np.ndarray  # steps; NaN without a law
    residual_scale: float  # root mean square of log(steps measured/steps fitted)


def fit_joint(
    model,
    batch_tokens,
    target_loss,
    steps,
    *,
    run=None,
    steps_tried=None,
    confidence: float = 0.95,
    resamples: int = 4_000,
    seed: int = 0,
) -> JointFit:
    """Fits the columns of `fit_scan` with one law; runs that ended above a target enter as bounds, too.

    Raises:
      ValueError: as `fit_scan` does.
    """
    table = reached_by(scan_table(model, batch_tokens, target_loss, steps, run, steps_tried), 3)
    law = errors = None
    s_min, residual_scale = np.full(table.losses.shape, np.nan), np.nan
    if shows_both_sides(table, confidence):
        line = fit_chain(table).line
        x = np.log(table.losses) - line.centre
        fit = fit_joint_rows(table, x, table.log_steps, (line.level, line.slope))
        errors = joint_errors(table, x, float(line.centre), fit, resamples, seed)
        law = errors.law(confidence, table.losses)
        s_min = np.exp(fit.log_s_min)
        residual_scale = float(np.sqrt(np.mean(fit.residuals[table.mask] ** 2)))
    return JointFit(
        law=law,
        models=table.models,
        losses=table.losses,
        s_min=s_min,
        residual_scale=residual_scale,
        confidence=confidence,
        errors=errors,
    )


def reached_by(table: ScanTable, count: int) -> ScanTable:
    """The fits that at least so many batch sizes have measured steps for."""
    sizes = [np.unique(row[mask]).size for row, mask in zip(table.log_batch, table.mask, strict=True)]
    return table.select(np.array(sizes) >= count)


def shows_both_sides(table: ScanTable, confidence: float) -> bool:
    """Whether batches lie on both sides of B_crit at three losses or more."""
    if not table.models:
        return False
    fits = fit_tradeoffs(table.log_batch, table.log_steps, table.mask, confidence, table.bound)
    return len({float(loss) for loss, fit in zip(table.losses, fits, strict=True) if not fit.one_sided}) >= 3
