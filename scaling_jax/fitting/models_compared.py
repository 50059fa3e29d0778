"""Is B_crit a function of the loss alone, whatever the model? Compares the models of a scan at the same loss.

Kaplan et al. 2020 (arXiv 2001.08361, section 5.1) found that it hardly depends on the model size. Where it does, a law
through all models mixes their levels, and its exponent is neither model's own.
"""

from typing import NamedTuple

import numpy as np
from scipy import special

from scaling_jax.fitting.resampling import centred_slopes, degrees_of_freedom, fit_chain, run_errors
from scaling_jax.fitting.scan_table import ScanTable, covariance_of


class ModelRatio(NamedTuple):
    """B_crit of a model over that of the first model at the same loss."""

    model: str
    first: str
    ratio: float
    low: float
    high: float

    @property
    def differs(self) -> bool:
        """True if the interval leaves out 1."""
        return not self.low <= 1 <= self.high


class ModelsCompared(NamedTuple):
    """A law with a level for each model, B_crit ∝ L^exponent."""

    exponent: float
    exponent_interval: tuple[float, float]
    ratios: tuple[ModelRatio, ...]  # of each further model to the first; without models whose losses don't overlap


def compare_models(table: ScanTable, confidence: float = 0.95) -> ModelsCompared | None:
    """The law with a level for each model, and the ratio of each further model's B_crit to the first one's.

    Intervals come from the errors of whole runs (Student t). None for one model, or if runs are too few.
    """
    names = np.array(table.models)
    models = list(dict.fromkeys(table.models))
    freedom = np.unique(table.run_index[table.mask]).size - 2 * len(models)
    if len(models) < 2 or freedom < 1 or np.unique(table.losses).size < 3:
        return None
    fits, line = fit_chain(table)
    slopes = centred_slopes(table, fits)
    weights = np.maximum(fits.information, 1e-12)
    design = np.stack([*(names == model for model in models), np.log(table.losses) - float(line.centre)], axis=1)
    if np.linalg.matrix_rank(design) < design.shape[1]:  # one loss of each model
        return None
    on_line = np.linalg.solve(design.T @ (weights[:, None] * design), (weights[:, None] * design).T)
    levels = on_line @ fits.log_b_crit
    influence = on_line[:, :, None] * (slopes / weights[:, None])
    covariance = covariance_of(table, influence, run_errors(table, fits), degrees_of_freedom(table, slopes))
    t = special.stdtrit(freedom, 0.5 + confidence / 2)

    def interval(contrast) -> tuple[float, float, float]:
        value, reach = contrast @ levels, t * np.sqrt(contrast @ covariance @ contrast)
        return float(value), float(value - reach), float(value + reach)

    unit = np.eye(len(levels))
    exponent, *exponent_interval = interval(unit[-1])
    first = table.losses[names == models[0]]
    ratios = []
    for k, model in enumerate(models[1:], 1):
        own = table.losses[names == model]
        if own.min() <= first.max() and own.max() >= first.min():
            ratios.append(ModelRatio(model, models[0], *np.exp(interval(unit[k] - unit[0])).tolist()))
    return ModelsCompared(exponent, (exponent_interval[0], exponent_interval[1]), tuple(ratios))
