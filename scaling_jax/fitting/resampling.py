"""What a scan's law would have come out as, had its runs' errors fallen otherwise.

Points of B_crit(L) at neighbouring losses come from the same runs, so their errors move together. The errors of a run
(log steps measured over fitted, one entry per target loss) are taken as one draw from a normal law whose covariance
along the run is estimated from all runs. A resample draws such a vector for every run and fits the whole chain again.

Intervals are studentised (bootstrap-t; Efron and Tibshirani 1993, section 12.5): with two parameters on seven batch
sizes, residuals are smaller than errors, and a run that bends the law also shows in the residuals of other losses. Each
resample's shift is therefore measured in units of the standard error that the same resample would have reported.
In 500 planted scans of 7 batches and 2 sizes (tests/fitting/test_scan_fit.py) they covered 95 to 97 % for the exponent
and 95 to 96 % for the law's band at the ends of its range, for each of four kinds of noise.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from scaling_jax.fitting.hyperbolas import Hyperbolas, log_overhead
from scaling_jax.fitting.loss_law import Lines, LossLaw, fit_lines
from scaling_jax.fitting.scan_table import ScanTable
from scaling_jax.fitting.tradeoff import fit_rows

CHUNK = 500  # resamples fitted at once; keeps the arrays within a core's cache
MOST_POINTS = 1_000_000  # in all that is fitted at once, which bounds the memory of large tables


class Chain(NamedTuple):
    """One pass through the chain, or a batch of them."""

    hyperbolas: Hyperbolas
    line: Lines  # log B_crit against log L, weighted by what each fit knows of its B_crit


class LawErrors(NamedTuple):
    """Shifts of the law and what each resample takes for their variance, by `1, x`, x = log L - centre."""

    centre: float
    level: float
    slope: float
    variance: np.ndarray  # `[3]`, of level, of slope, and covariance
    shifts: np.ndarray  # `[resamples, 2]`, of level and slope
    variances: np.ndarray  # `[resamples, 3]`

    def interval(self, at, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Value, low and high of u·level + v·slope for `at = (u, v)`, each `[...]`."""
        u, v = (np.asarray(x, float)[..., None] for x in at)
        here = (u * self.level + v * self.slope)[..., 0]
        error = np.sqrt(quadratic(self.variance, u, v))[..., 0]
        pivots = np.abs(u * self.shifts[:, 0] + v * self.shifts[:, 1]) / np.sqrt(quadratic(self.variances.T, u, v))
        # Of n resamples and the truth, each rank is as likely: the (n + 1)·confidence-th leaves just the rest outside.
        half = np.quantile(pivots, confidence, axis=-1, method="weibull") * error
        return here, here - half, here + half

    def law(self, confidence: float, losses: np.ndarray) -> LossLaw:
        """The law with its intervals, valid over the range of `losses`."""
        exponent, *exponent_interval = self.interval((0.0, 1.0), confidence)
        log_b_star, *log_b_star_interval = self.interval((1.0, -self.centre), confidence)
        return LossLaw(
            b_star=float(np.exp(log_b_star)),
            exponent=float(exponent),
            exponent_interval=(float(exponent_interval[0]), float(exponent_interval[1])),
            b_star_interval=(float(np.exp(log_b_star_interval[0])), float(np.exp(log_b_star_interval[1]))),
            loss_range=(float(losses.min()), float(losses.max())),
            confidence=confidence,
        )

    def band(self, loss, confidence: float) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of the law's interval at each loss, tokens."""
        x = np.log(np.asarray(loss, float)) - self.centre
        _, low, high = self.interval((np.ones_like(x), x), confidence)
        return np.exp(low), np.exp(high)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LawFit:
    """The law that a scan shows, and how sure it is; what the two-stage and the joint fit have in common."""

    law: LossLaw | None  # None unless batches lie on both sides of B_crit at three losses or more
    confidence: float
    errors: LawErrors | None = dataclasses.field(repr=False)

    def band(self, loss) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of the law's interval at each loss, tokens.

        Raises:
          ValueError: if there is no law.
        """
        if self.errors is None:
            raise ValueError("no band without a law: batches lie on both sides of B_crit at fewer than three losses")
        return self.errors.band(loss, self.confidence)


def fit_chain(table: ScanTable, log_steps=None, start=None, num_rounds=3, num_iterations=6) -> Chain:
    """Trade-offs `[..., G]` of steps `[..., G, n]` (the table's own by default), and the law through them `[...]`."""
    log_steps = table.log_steps if log_steps is None else log_steps
    fits = fit_rows(table.log_batch, log_steps, table.mask, table.bound, start, num_rounds, num_iterations)
    log_loss = np.broadcast_to(np.log(table.losses), fits.log_b_crit.shape)
    weights = np.maximum(fits.information, 1e-12)
    return Chain(fits, fit_lines(log_loss, fits.log_b_crit, weights, np.ones(log_loss.shape, bool)))


def chunk_of(table: ScanTable) -> int:
    """How many resamples of a table are fitted at once; their numbers don't depend on it."""
    return max(1, min(CHUNK, MOST_POINTS // table.mask.size))


def resamples_for(table: ScanTable) -> int:
    """How many resamples a table is worth: more than a thousand only where they take little time."""
    return max(1_000, min(4_000, 6 * MOST_POINTS // table.mask.size))


def law_errors(table: ScanTable, resamples: int, seed: int) -> LawErrors:
    """Fits the chain to the table and to resamples of its runs' errors."""
    chain = fit_chain(table)
    fits, line = chain
    slopes = _centred_slopes(table, fits)
    freedom = _degrees_of_freedom(table, slopes)
    errors = _run_errors(table, fits)
    root = square_root(errors.T @ errors / np.maximum(freedom, 1.0))
    # Per unit of error in run r at target t, the law moves by influence[:, r, t]; by it errors become a variance.
    influence = _influence(table, fits, slopes, line.centre)
    forms = np.stack([influence[i].T @ influence[j] for i, j in ((0, 0), (1, 1), (0, 1))]) / np.maximum(freedom, 1.0)

    generator = np.random.default_rng(seed)
    fitted = table.log_steps - fits.residuals  # bounds have no residual and stay
    shifts, variances = [], []
    chunk = chunk_of(table)
    for first in range(0, resamples, chunk):
        count = min(chunk, resamples - first)
        drawn = generator.standard_normal((count, *errors.shape)) @ root.T
        # A bound stays what it is: that the run had so many steps is known, and no error moves it.
        log_steps = fitted + np.where(table.bound, 0.0, drawn[:, table.run_index, table.target_index[:, None]])
        start = np.broadcast_to(fits.log_b_crit, (count, len(table.losses)))
        again = fit_chain(table, log_steps, start, num_rounds=2, num_iterations=4)
        level = again.line.level + again.line.slope * (line.centre - again.line.centre)
        shifts.append(np.stack([level - line.level, again.line.slope - line.slope], axis=-1))
        variances.append(_variance(forms, _run_errors(table, again.hyperbolas)))
    return LawErrors(
        centre=float(line.centre),
        level=float(line.level),
        slope=float(line.slope),
        variance=_variance(forms, errors),
        shifts=np.concatenate(shifts),
        variances=np.concatenate(variances),
    )


def _run_errors(table, fits):
    """`[..., R, T]`: residuals by run and target, held back like the fit does; zero where there is none."""
    num_runs, num_targets = table.run_index.max() + 1, table.target_index.max() + 1
    inside = (table.mask & (np.abs(fits.residuals) <= fits.limit)).sum(-1) / table.mask.sum(-1)
    pull = np.clip(fits.residuals, -fits.limit, fits.limit) / np.maximum(inside, 0.5)[..., None]
    errors = np.zeros((*pull.shape[:-2], num_runs, num_targets))
    g, i = np.nonzero(table.mask)
    errors[..., table.run_index[g, i], table.target_index[g]] = pull[..., g, i]
    return errors


def _centred_slopes(table, fits):
    points = fits.weights
    _, slopes = log_overhead(fits.log_b_crit[:, None], table.log_batch)
    return table.mask * (slopes - (points * slopes).sum(-1, keepdims=True) / points.sum(-1, keepdims=True))


def _degrees_of_freedom(table, slopes):
    """`[T, T]`: expected sum over runs of products of residuals at two targets, per unit of error covariance."""
    num_runs, num_targets = table.run_index.max() + 1, table.target_index.max() + 1
    leftover = np.zeros((num_targets, num_runs, num_runs))  # residuals are this projection of the errors
    for g, t in enumerate(table.target_index):
        mask = table.mask[g]
        runs, slope = table.run_index[g, mask], slopes[g, mask]
        leftover[t][np.ix_(runs, runs)] += np.eye(len(runs)) - 1 / len(runs) - np.outer(slope, slope) / (slope @ slope)
    flat = leftover.reshape(num_targets, -1)
    return flat @ flat.T


def _influence(table, fits, slopes, centre):
    num_runs, num_targets = table.run_index.max() + 1, table.target_index.max() + 1
    weights = np.maximum(fits.information, 1e-12)
    x = np.log(table.losses) - centre
    on_line = np.stack([weights / weights.sum(), weights * x / (weights * x**2).sum()])
    on_point = slopes / np.maximum(fits.information, 1e-12)[..., None]
    influence = np.zeros((2, num_runs, num_targets))
    g, i = np.nonzero(table.mask)
    influence[:, table.run_index[g, i], table.target_index[g]] = on_line[:, g] * on_point[g, i]
    return influence


def _variance(forms, errors):
    return np.stack([((errors @ form) * errors).sum((-2, -1)) for form in forms], axis=-1)


def quadratic(variance, u, v):
    return np.maximum(u**2 * variance[0] + v**2 * variance[1] + 2 * u * v * variance[2], 1e-24)


def square_root(covariance):
    # Missing entries and unequal degrees of freedom can leave small negative eigenvalues.
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0.0))
