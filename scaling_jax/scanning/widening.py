"""Batch sizes beyond those of a scan, where they don't show both limits of the trade-off.

Small batches need steps in proportion to 1/B, so d log S/d log B is -1; large ones need S_min steps, so it is 0. B_crit
lies between. Where a scan ends before a limit is near, its B_crit rests on the form that is fitted.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from scaling_jax.fitting import ScanFit
from scaling_jax.fitting.shapes import LINEAR, SATURATED
from scaling_jax.io import UserError
from scaling_jax.scanning.experiment import Experiment


class Wider(NamedTuple):
    """An experiment with more batch sizes, and the models that need them."""

    experiment: Experiment
    not_linear: tuple[str, ...]  # models whose steps at the smallest batch don't scale with it yet
    not_saturated: tuple[str, ...]  # models whose steps at the largest batch still fall with it


def wider(experiment: Experiment, fit: ScanFit, least: int | None, most: int | None) -> Wider | None:
    """The experiment with half its smallest batch, twice its largest, or both; None if both limits are seen.

    A limit is seen if the slope at that end is near it at every loss, by a standard error: below -2/3 or above -1/3, as
    those of a hyperbola at B_crit/2 and at 2·B_crit.

    Args:
      least, most: batch sizes in tokens to which the ends may go; None: not beyond the experiment's own.
    """
    small, large = min(experiment.batch_tokens), max(experiment.batch_tokens)
    not_linear, not_saturated = [], []
    for model in dict.fromkeys(point.model for point in fit.points):
        shapes = [point.tradeoff.shape for point in fit.points if point.model == model]
        low, high = np.array([shape.end_slopes for shape in shapes]).T
        low_error, high_error = np.array([shape.end_slope_errors for shape in shapes]).T  # NaN with three batches
        if not (low + low_error < LINEAR).all():
            not_linear.append(model)
        if not (high - high_error > SATURATED).all():
            not_saturated.append(model)
    down = bool(not_linear) and least is not None and small // 2 >= least
    up = bool(not_saturated) and most is not None and 2 * large <= most
    if not down and not up:
        return None
    batches = (*([small // 2] * down), *experiment.batch_tokens, *([2 * large] * up))
    return Wider(
        dataclasses.replace(experiment, batch_tokens=batches), tuple(not_linear * down), tuple(not_saturated * up)
    )


def widest(experiment: Experiment, least: int | None, most: int | None) -> Experiment:
    """The experiment with its ends as far as they may go.

    Raises:
      UserError: if a limit lies inside the experiment's batch sizes, or a batch size can't be trained.
    """
    batches = sorted(experiment.batch_tokens)
    small, large = batches[0], batches[-1]
    if least is not None and least > small:
        raise UserError(f"--min-batch-tokens {least:,} is above the smallest batch size of the scan, {small:,}")
    if most is not None and most < large:
        raise UserError(f"--max-batch-tokens {most:,} is below the largest batch size of the scan, {large:,}")
    while least is not None and batches[0] // 2 >= max(least, 1):
        batches.insert(0, batches[0] // 2)
    while most is not None and 2 * batches[-1] <= most:
        batches.append(2 * batches[-1])
    more = [batch for batch in batches if not small <= batch <= large]
    return dataclasses.replace(experiment, batch_tokens=(*experiment.batch_tokens, *more)) if more else experiment
