"""Confidence intervals of a scan's law, from resampled errors of whole runs.

Points of B_crit(L) at neighbouring losses come from the same runs, so their errors move together. A run's errors, one
log(steps measured/steps fitted) per target loss, are taken as one draw from a normal distribution. Its covariance along
the run comes from all runs. A resample draws such errors for every run and repeats the whole fit.

The intervals are studentised (bootstrap-t; Efron and Tibshirani 1993, section 12.5): the shift of each resample is
measured in standard errors that this resample itself gives. This matters for two reasons. With two parameters fitted to
seven batch sizes, residuals are smaller than errors. A run that bends the law also changes residuals at other losses.

In 500 planted scans of 7 batch sizes and 2 models (tests/fitting/test_scan_fit.py), 95 % intervals covered the exponent
in 95 to 97 % of scans, and the law at the ends of its range in 95 to 96 %, for each of four kinds of noise.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np

from scaling_jax.fitting.hyperbolas import Hyperbolas, log_overhead, weighted_mean
from scaling_jax.fitting.loss_law import Lines, LossLaw, fit_lines
from scaling_jax.fitting.scan_table import ScanTable
from scaling_jax.fitting.tradeoff import fit_rows

Variable = Literal["loss", "data"]

CHUNK = 500  # resamples fitted at once
FEWER = 1_000  # resamples for laws beside the main one
MOST_POINTS = 100_000  # table entries fitted at once; few enough for a core's cache, which makes it twice as fast
MOST_RESAMPLED = 6_000_000  # table entries of all resamples, above which there are fewer of these


class Chain(NamedTuple):
    """Both stages of the fit: trade-offs, then the law through their B_crit; one scan or a batch of resamples."""

    hyperbolas: Hyperbolas
    line: Lines  # log B_crit against log L or log D_min, weighted by each fit's information about its B_crit


@dataclasses.dataclass(frozen=True)
class Errors:
    """A law log B = level + slope·x, x = log L - centre, with intervals. (Or x = log D_min - centre.)"""

    centre: float

    def interval(self, at, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(value, low, high) of u·level + v·slope for `at = (u, v)`, `[...]` each."""
        raise NotImplementedError

    def law(self, confidence: float, losses: np.ndarray) -> LossLaw:
        """The law with its intervals, valid in the range of `losses`."""
        exponent, *exponent_interval = self.interval((0.0, 1.0), confidence)
        log_b_star, *log_b_star_interval = self.interval((1.0, -self.centre), confidence)
        return LossLaw(
            b_star=float(_exp(log_b_star)),
            exponent=float(exponent),
            exponent_interval=(float(exponent_interval[0]), float(exponent_interval[1])),
            b_star_interval=(float(_exp(log_b_star_interval[0])), float(_exp(log_b_star_interval[1]))),
            loss_range=(float(losses.min()), float(losses.max())),
            confidence=confidence,
        )

    def band(self, loss, confidence: float) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of the interval of B at each loss, in tokens."""
        x = np.log(np.asarray(loss, float)) - self.centre
        _, low, high = self.interval((np.ones_like(x), x), confidence)
        return _exp(low), _exp(high)


@dataclasses.dataclass(frozen=True)
class LawErrors(Errors):
    """The law of hyperbolas, and its errors in every resample."""

    level: float
    slope: float
    variance: np.ndarray  # `[3]`: of the level, of the slope, and their covariance
    shifts: np.ndarray  # `[resamples, 2]`: resampled level and slope minus the fitted ones
    variances: np.ndarray  # `[resamples, 3]`: `variance` as each resample estimates it

    def interval(self, at, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        u, v = (np.asarray(x, float)[..., None] for x in at)
        here = (u * self.level + v * self.slope)[..., 0]
        error = np.sqrt(_quadratic(self.variance, u, v))[..., 0]
        pivots = np.abs(u * self.shifts[:, 0] + v * self.shifts[:, 1]) / np.sqrt(_quadratic(self.variances.T, u, v))
        # Among n resamples, the truth takes each of the n + 1 ranks with equal probability ("weibull" quantile).
        half = np.quantile(pivots, confidence, axis=-1, method="weibull") * error
        return here, here - half, here + half


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class LawFit:
    """The law of a scan and its errors; the common part of the two-stage fit and the joint fit."""

    law: LossLaw | None  # None unless batches lie on both sides of B_crit at three losses or more
    confidence: float
    errors: Errors | None = dataclasses.field(repr=False)

    def band(self, loss) -> tuple[np.ndarray, np.ndarray]:
        """Lower and upper end of the interval of B_crit at each loss, in tokens.

        Raises:
          ValueError: if there is no law.
        """
        if self.errors is None:
            raise ValueError(
                "no band without a law: batches lie on both sides of B_crit at fewer than 3 losses; add batch sizes"
            )
        return self.errors.band(loss, self.confidence)


def fit_chain(
    table: ScanTable, log_steps=None, start=None, num_rounds=3, num_iterations=6, *, variable: Variable = "loss"
) -> Chain:
    """Trade-offs `[..., G]` of `log_steps` `[..., G, n]` (None: the table's), and the law `[...]` through them.

    With `variable="data"` it is the law in D_min = E_min, which comes from the same trade-offs.
    """
    log_steps = table.log_steps if log_steps is None else log_steps
    fits = fit_rows(table.log_batch, log_steps, table.mask, table.bound, start, num_rounds, num_iterations)
    x = np.broadcast_to(np.log(table.losses), fits.log_b_crit.shape)
    if variable == "data":
        x = fits.log_s_min + fits.log_b_crit
    weights = np.maximum(fits.information, 1e-12)
    return Chain(fits, fit_lines(x, fits.log_b_crit, weights, np.ones(x.shape, bool)))


def chunk_of(table: ScanTable) -> int:
    """Number of resamples of a table to fit at once. The results don't depend on it."""
    return max(1, min(CHUNK, MOST_POINTS // table.mask.size))


def resamples_for(table: ScanTable) -> int:
    """Default number of resamples for a table: 4,000, and down to 400 for large tables, where each takes long."""
    return max(400, min(4_000, MOST_RESAMPLED // table.mask.size))


def fewer_for(table: ScanTable) -> int:
    """Default number of resamples for laws beside the main one."""
    return min(FEWER, resamples_for(table))


def law_errors(table: ScanTable, resamples: int, seed: int, variable: Variable = "loss") -> LawErrors:
    """Fits the chain to the table and to resamples of its runs' errors."""
    chain = fit_chain(table, variable=variable)
    fits, line = chain
    slopes = centred_slopes(table, fits)
    freedom = degrees_of_freedom(table, slopes)
    errors = run_errors(table, fits)
    covariance = table.sum_over_runs(errors, errors) / np.maximum(freedom, 1.0)
    forms = forms_of_variance(table, _influence(table, chain, slopes, variable), freedom)

    fitted = table.log_steps - fits.residuals  # bounds have no residual, so they stay as they are
    shifts, variances = [], []
    for drawn in draw_errors(table, covariance, resamples, seed):
        # A bound stays as it is: the steps that the run had are known exactly.
        log_steps = fitted + np.where(table.bound, 0.0, drawn)
        start = np.broadcast_to(fits.log_b_crit, (len(drawn), len(table.losses)))
        again = fit_chain(table, log_steps, start, num_rounds=2, num_iterations=4, variable=variable)
        level = again.line.level + again.line.slope * (line.centre - again.line.centre)
        shifts.append(np.stack([level - line.level, again.line.slope - line.slope], axis=-1))
        variances.append(variance_of(table, forms, run_errors(table, again.hyperbolas)))
    return LawErrors(
        centre=float(line.centre),
        level=float(line.level),
        slope=float(line.slope),
        variance=variance_of(table, forms, errors),
        shifts=np.concatenate(shifts),
        variances=np.concatenate(variances),
    )


def draw_errors(table: ScanTable, covariance: np.ndarray, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Errors `[some resamples, G, n]` of whole runs, whose covariance along a run is `covariance` `[T, T]`."""
    generator, chunk = np.random.default_rng(seed), chunk_of(table)
    models = table.rows_of_models()
    roots = [_square_root(covariance[table.targets_of(rows)]) for rows in models]
    most = max(len(root) for root in roots)
    for first in range(0, resamples, chunk):
        count = min(chunk, resamples - first)
        drawn = np.empty((count, *table.mask.shape))
        normal = generator.standard_normal((count, table.num_runs, most))
        for rows, root in zip(models, roots, strict=True):
            of_runs = normal[:, table.run_index[rows[0]], : len(root)] @ root.T
            drawn[:, rows] = of_runs.swapaxes(1, 2)
        yield drawn


def forms_of_variance(table: ScanTable, influence, freedom) -> np.ndarray:
    """`[3, T, T]`: what `variance_of` takes, from how far level and slope move per unit of error, `[2, G, n]`."""
    pairs = ((0, 0), (1, 1), (0, 1))
    return np.stack([table.sum_over_runs(influence[i], influence[j]) for i, j in pairs]) / np.maximum(freedom, 1.0)


def variance_of(table: ScanTable, forms, errors) -> np.ndarray:
    """`[..., 3]`: variances of level and slope and their covariance, as quadratic `forms` of errors `[..., G, n]`."""
    total = np.zeros((*errors.shape[:-2], len(forms)))
    for rows in table.rows_of_models():
        own = errors[..., rows, :]
        products = own @ own.swapaxes(-2, -1)
        form = forms[(slice(None), *table.targets_of(rows))]
        total += products.reshape(*products.shape[:-2], -1) @ form.reshape(len(forms), -1).T
    return total


def run_errors(table, fits):
    """`[..., G, n]`: residuals, clipped as in the fit; zero where nothing was measured."""
    inside = (table.mask & (np.abs(fits.residuals) <= fits.limit)).sum(-1) / table.mask.sum(-1)
    return table.mask * np.clip(fits.residuals, -fits.limit, fits.limit) / np.maximum(inside, 0.5)[..., None]


def centred_slopes(table, fits):
    """`[G, n]`: d log S/d log B_crit of each run, minus its mean in the row; zero where nothing was measured."""
    _, slopes = log_overhead(fits.log_b_crit[:, None], table.log_batch)
    return table.mask * (slopes - weighted_mean(slopes, fits.weights))


def degrees_of_freedom(table, slopes):
    """`ScanTable.degrees_of_freedom` of hyperbolas."""
    fitted = np.stack([1.0 * table.mask, slopes], axis=-1)
    return table.degrees_of_freedom(fitted / np.sqrt((fitted**2).sum(1, keepdims=True)))


def _influence(table, chain: Chain, slopes, variable: Variable):
    """`[2, G, n]`: how far the law's level and slope move per unit of each error."""
    fits, line = chain
    weights = np.maximum(fits.information, 1e-12)
    on_point = slopes / weights[..., None]
    x = np.log(table.losses) - line.centre
    if variable == "data":
        x = fits.log_s_min + fits.log_b_crit - line.centre
        _, share = log_overhead(fits.log_b_crit[:, None], table.log_batch)
        on_s_min = table.mask / table.mask.sum(-1, keepdims=True) - weighted_mean(share, fits.weights) * on_point
        on_point = on_point - line.slope * (on_point + on_s_min)  # x moves with the errors, too
    on_line = np.stack([weights / weights.sum(), weights * x / (weights * x**2).sum()])
    return on_line[..., None] * on_point


def _square_root(covariance) -> np.ndarray:
    """A matrix R with R·Rᵀ = covariance."""
    # Missing entries and unequal degrees of freedom can make eigenvalues slightly negative.
    values, vectors = np.linalg.eigh(covariance)
    return vectors * np.sqrt(np.maximum(values, 0.0))


def _exp(x) -> np.ndarray:
    """exp, infinite where too few runs leave an end almost open."""
    with np.errstate(over="ignore"):
        return np.exp(x)


def _quadratic(variance, u, v):
    return np.maximum(u**2 * variance[0] + v**2 * variance[1] + 2 * u * v * variance[2], 1e-24)
