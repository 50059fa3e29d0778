"""How far a law moves when a part of its data is left out: its systematic spread, which no resampling of runs shows.

If the trade-off isn't quite a hyperbola, or the law not quite a power, each range of losses and of batches gives
another exponent. The spread over such ranges belongs beside the interval.
"""

from typing import NamedTuple

import numpy as np

from scaling_jax.fitting.loss_law import Refit
from scaling_jax.fitting.resampling import fit_chain
from scaling_jax.fitting.scan_table import ScanTable
from scaling_jax.fitting.shape_law import fit_shape_law

FEWEST_LOSSES = 3  # of a law
FEWEST_BATCHES = 4  # at every loss, once the ends are left out
MOST_ERROR = 3.5  # standard error of a part's exponent, over the whole's; half of the losses has about 2.8


def refits(table: ScanTable, free_shape: bool) -> tuple[Refit, ...]:
    """The law of the lower and the upper half of the losses, of each model, and without one or two of the end batches.

    Args:
      table: what the law was fitted to.
      free_shape: whether it was the law of `shape_law`; else it is that of hyperbolas.
    """
    whole = _line(table, free_shape)
    if whole is None:
        return ()
    losses, batches = np.unique(table.losses), np.unique(np.round(table.log_batch[table.mask], 9))
    middle = np.sqrt(losses[0] * losses[-1])
    below = table.losses <= np.median(losses)
    parts = {
        f"losses up to {np.median(losses):.3g}": table.select(below),
        f"losses from {np.median(losses):.3g}": table.select(table.losses >= np.median(losses)),
    }
    models = list(dict.fromkeys(table.models))
    if len(models) > 1:
        parts |= {f"{model} alone": table.select(np.array(table.models) == model) for model in models}
    for count, many in ((1, "batch"), (2, "2 batches")):
        if len(batches) >= FEWEST_BATCHES + count:
            parts[f"without the smallest {many}"] = table.between(batches[count], np.inf)
            parts[f"without the largest {many}"] = table.between(-np.inf, batches[-1 - count])
    found = []
    for kept, part in parts.items():
        part = part.select(part.num_batches >= FEWEST_BATCHES)
        num_losses = np.unique(part.losses).size
        line = _line(part, free_shape) if num_losses >= FEWEST_LOSSES else None
        if line is not None and line.error <= MOST_ERROR * whole.error:
            log_b_crit = line.level + line.slope * (np.log(middle) - line.centre)
            found.append(Refit(kept, line.slope, float(np.exp(log_b_crit)), num_losses))
    return tuple(found)


class _Line(NamedTuple):
    centre: float
    level: float
    slope: float
    error: float  # of the slope


def _line(table: ScanTable, free_shape: bool) -> _Line | None:
    if free_shape:
        law = fit_shape_law(table)
        if law is None:
            return None
        return _Line(law.centre, law.level, law.slope, float(np.sqrt(law.covariance[1, 1])))
    line = fit_chain(table).line
    return _Line(float(line.centre), float(line.level), float(line.slope), float(line.slope_error))
