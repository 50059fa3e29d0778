"""Is the trade-off a hyperbola? Fits S = S_min·(1 + (B_half/B)^a), and tests a = 1.

With a = 1 this is McCandlish et al.'s hyperbola (arXiv 1812.06162, eq. 2.11), and B_half is B_crit. With any a, a run
at B_half needs 2·S_min steps. With a > 1, tokens E = B·S have a minimum inside: small batches need more of them, as
Zhou et al. 2026 (arXiv 2601.05034) found under constant learning rates.

For a given a, the fit is that of a hyperbola in B^a. So all rows are fitted at a grid of shapes, then between them.
"""

from typing import NamedTuple

import numpy as np
from scipy import special

from scaling_jax.fitting.hyperbolas import (
    best_of_grid,
    huber_limit,
    huber_loss,
    huber_weights,
    last_accepted,
    linearise,
    log_overhead,
    weighted_mean,
)
from scaling_jax.fitting.scan_table import ScanTable, covariance_of

NUM_PARAMETERS = 3  # S_min, B_half, a
SHAPES = (0.2, 5.0)  # a is sought between these
REACH = 3.0  # log B_half is sought this far beyond the batches
# End slopes d log S/d log B on the way to -1 and to 0: those of a hyperbola at B_crit/2 and 2·B_crit.
LINEAR, SATURATED = -2 / 3, -1 / 3
_GRID = np.log(np.geomspace(*SHAPES, 17))
_STEPS = 8  # of Gauss-Newton


class Shape(NamedTuple):
    """A trade-off of free shape. B in tokens; slopes are d log S/d log B, -1 for linear scaling, 0 for saturation."""

    a: float
    a_interval: tuple[float, float]  # 0 or infinity at an end if no smaller or larger a is rejected
    p_hyperbola: float  # of an F test of a = 1; NaN with three batch sizes, which any a fits
    s_min: float  # steps
    b_half: float  # a run at this batch size needs 2·S_min steps
    b_half_interval: tuple[float, float]  # with a free
    end_slopes: tuple[float, float]  # at the smallest and the largest batch
    end_slope_errors: tuple[float, float]  # standard errors
    b_opt: float  # with the fewest tokens; 0 if tokens fall towards the smallest batches
    b_opt_interval: tuple[float, float]  # by the delta method in logs; 0 and infinity where a may be 1
    u_shaped: bool  # True if the smallest batch takes significantly more tokens than one inside

    def steps_at(self, batch_tokens):
        """Steps to the loss at a batch size in tokens."""
        return self.s_min * (1.0 + (self.b_half / np.asarray(batch_tokens, float)) ** self.a)

    @property
    def both_ends(self) -> bool:
        """True if the smallest batch is near linear scaling, and the largest near saturation."""
        return self.end_slopes[0] < LINEAR and self.end_slopes[1] > SATURATED


def fit_shapes(log_batch, log_steps, mask, confidence: float = 0.95) -> list[Shape]:
    """The shape of each row `[G, n]` of natural logs; `mask` is True where steps were measured, at 3 batches or more.

    Runs that ended above the loss (bounds) are left out.
    """
    rows = _Rows(log_batch, log_steps, mask)
    log_a = rows.best()
    best = rows.at(log_a)
    allowed = special.stdtrit(rows.freedom, 0.5 + confidence / 2) ** 2
    start = best.log_b_half
    a_low, a_high = rows.ends(log_a, np.log(SHAPES), lambda x: rows.deviance(rows.at(x, start).loss), allowed)
    worse = rows.deviance(rows.at(np.zeros_like(log_a), start).loss)
    p = np.where(rows.freedom_left > 0, special.fdtrc(1, rows.freedom, worse), np.nan)
    lowest, highest = rows.smallest - REACH, rows.largest + REACH
    low, high = rows.ends(best.log_b_half, (lowest, highest), lambda x: rows.deviance(rows.loss_at(x)), allowed)
    covariance = rows.covariance(log_a, best)
    slopes, errors = rows.end_slopes(log_a, best, covariance)
    reach = _error_of_b_opt(log_a, covariance) * special.stdtrit(rows.freedom, 0.5 + confidence / 2)
    u_shaped = (slopes[0] + special.stdtrit(rows.freedom, 0.5 + confidence / 2) * errors[0] < -1) & (
        rows.freedom_left > 0
    )
    a = np.exp(log_a)
    overhead, _ = log_overhead((a * best.log_b_half)[:, None], a[:, None] * log_batch)
    weights = rows.points * huber_weights(best.residuals, rows.limit)
    log_s_min = weighted_mean(log_steps - overhead, weights)[:, 0]
    with np.errstate(divide="ignore"):
        b_opt = np.where(a > 1, np.exp(best.log_b_half + np.log(np.maximum(a - 1, 1e-300)) / a), 0.0)
    b_opt = np.where(b_opt > np.exp(rows.smallest), b_opt, 0.0)
    return [
        Shape(
            a=float(a[g]),
            a_interval=(float(np.exp(a_low[g])), float(np.exp(a_high[g]))),
            p_hyperbola=float(p[g]),
            s_min=float(np.exp(log_s_min[g])),
            b_half=float(np.exp(best.log_b_half[g])),
            b_half_interval=(float(np.exp(low[g])), float(np.exp(high[g]))),
            end_slopes=(float(slopes[0][g]), float(slopes[1][g])),
            end_slope_errors=(float(errors[0][g]), float(errors[1][g])),
            b_opt=float(b_opt[g]),
            b_opt_interval=_around(float(b_opt[g]), float(reach[g])),
            u_shaped=bool(u_shaped[g] and b_opt[g] > 0),
        )
        for g in range(len(mask))
    ]


class BestShapes(NamedTuple):
    """The best shape of each row `[G]`."""

    log_a: np.ndarray
    log_b_half: np.ndarray
    variances: np.ndarray  # `[G, 3]`, of log S_min, log B_half and log a if log S has variance 1


def best_shapes(log_batch, log_steps, mask) -> BestShapes:
    """The best shapes alone, of the rows of `fit_shapes`."""
    rows = _Rows(log_batch, log_steps, mask)
    log_a = rows.best()
    fits = rows.at(log_a)
    inverses = _inverse(rows.columns(log_a, fits))
    return BestShapes(log_a, fits.log_b_half, np.maximum(np.einsum("gii->gi", inverses), 0.0))


class _Fits(NamedTuple):
    """Fits at given shapes, `[..., G]`."""

    log_b_half: np.ndarray
    loss: np.ndarray  # Huber's
    residuals: np.ndarray  # [..., G, n]


class _Rows:
    def __init__(self, log_batch, log_steps, mask):
        self.log_batch, self.log_steps, self.mask = log_batch, log_steps, mask
        self.points = mask.astype(float)
        self.smallest = np.min(np.where(mask, log_batch, np.inf), axis=-1)
        self.largest = np.max(np.where(mask, log_batch, -np.inf), axis=-1)
        self.freedom_left = mask.sum(-1) - NUM_PARAMETERS
        self.freedom = np.maximum(self.freedom_left, 1)
        self.limit = np.array(np.inf)

    def best(self) -> np.ndarray:
        """log a `[G]` of the best fit. Sets the limit beyond which residuals pull no more, and the variance."""
        starts: list[np.ndarray | None] = [None] * len(_GRID)
        for _ in range(2):  # by least squares, then with outliers held back
            grid = [self.at(np.full(len(self.mask), x), start) for x, start in zip(_GRID, starts, strict=True)]
            chosen = np.stack([fits.loss for fits in grid]).argmin(0)
            starts = [fits.log_b_half for fits in grid]
            start = np.stack([fits.log_b_half for fits in grid])[chosen, np.arange(len(chosen))]
            step = _GRID[1] - _GRID[0]
            low, high = _GRID[chosen] - step, _GRID[chosen] + step
            for _ in range(14):  # golden section
                inner = [high - 0.618 * (high - low), low + 0.618 * (high - low)]
                left = self.at(inner[0], start).loss < self.at(inner[1], start).loss
                low, high = np.where(left, low, inner[0]), np.where(left, inner[1], high)
            log_a = np.clip(0.5 * (low + high), _GRID[0], _GRID[-1])
            fits = self.at(log_a, start)
            if np.isfinite(self.limit).any():
                break
            self.limit = huber_limit(fits.residuals, self.mask, NUM_PARAMETERS)
        inside = weighted_mean(self.points * (np.abs(fits.residuals) <= self.limit), self.points)[..., 0]
        pull = self.points * np.clip(fits.residuals, -self.limit, self.limit)
        self.variance = np.maximum((pull**2).sum(-1) / self.freedom, 1e-24) / np.maximum(inside, 0.5) ** 2
        self.scale, self.least = self.variance * np.maximum(inside, 0.5), fits.loss
        return log_a

    def at(self, log_a, start=None) -> _Fits:
        """The fits at shapes log a `[G]`, starting from log B_half `[G]`; None starts from the best of a grid."""
        a = np.exp(log_a)[..., None]
        scaled = a * self.log_batch
        lowest, highest = a * (self.smallest[..., None] - REACH), a * (self.largest[..., None] + REACH)
        if start is None:
            position = best_of_grid(scaled, self.log_steps, self.points, lowest, highest)
        else:
            position = a * start[..., None]
        for _ in range(_STEPS):
            residuals, slope, weights, curvature = linearise(position, scaled, self.log_steps, self.points, self.limit)
            step = (weights * slope * residuals).sum(-1, keepdims=True) / np.maximum(curvature, 1e-12)
            position = np.clip(position + np.clip(step, -1.0, 1.0), lowest, highest)
        residuals = linearise(position, scaled, self.log_steps, self.points, self.limit)[0]
        return _Fits((position / a)[..., 0], huber_loss(residuals, self.points, self.limit), residuals * self.points)

    def loss_at(self, log_b_half) -> np.ndarray:
        """The smallest loss `[G]` of all shapes at a given log B_half `[G]`."""

        def loss(log_a):
            a = np.exp(log_a)[..., None]
            residuals = linearise(
                a * log_b_half[..., None], a * self.log_batch, self.log_steps, self.points, self.limit
            )[0]
            return huber_loss(residuals, self.points, self.limit)

        step = _GRID[1] - _GRID[0]
        grid = np.broadcast_to(_GRID[:, None], (len(_GRID), len(log_b_half)))
        for _ in range(4):  # ever finer around the best
            losses = loss(grid)
            chosen = np.take_along_axis(grid, losses.argmin(0)[None], 0)
            around, step = step * np.linspace(-1, 1, 9)[:, None], step / 4
            grid = np.clip(chosen + around, _GRID[0], _GRID[-1])
        return losses.min(0)

    def deviance(self, loss) -> np.ndarray:
        """How much worse than the best fit, F-distributed with (1, n - 3) degrees of freedom for the truth."""
        return 2.0 * np.maximum(loss - self.least, 0.0) / self.scale

    def ends(self, best, outside, deviance_at, allowed) -> tuple[np.ndarray, np.ndarray]:
        """Both ends of what isn't rejected between `outside` and `best`; infinite where nothing is rejected."""
        found = []
        for edge, sign in zip(outside, (-1.0, 1.0), strict=True):
            edge = np.broadcast_to(edge, best.shape)
            unbounded = deviance_at(edge) <= allowed
            accepted = last_accepted(best, edge, lambda x: deviance_at(x) <= allowed, num_halvings=25)
            found.append(np.where(unbounded | (self.freedom_left < 1), sign * np.inf, accepted))
        return found[0], found[1]

    def columns(self, log_a, fits: _Fits) -> np.ndarray:
        """`[G, n, 3]`: derivatives of log S by log S_min, log B_half and log a."""
        a = np.exp(log_a)[..., None]
        distance = fits.log_b_half[..., None] - self.log_batch
        _, share = log_overhead(a * fits.log_b_half[..., None], a * self.log_batch)
        return np.stack([np.ones_like(share), a * share, a * share * distance], -1) * self.points[..., None]

    def covariance(self, log_a, fits: _Fits) -> np.ndarray:
        """`[G, 3, 3]`, of log S_min, log B_half and log a, linearised at the fits."""
        return _inverse(self.columns(log_a, fits)) * self.variance[:, None, None]

    def end_slopes(self, log_a, fits: _Fits, covariance) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """d log S/d log B at the smallest and the largest batch, and standard errors by the delta method."""
        slopes, errors = [], []
        for end in (self.smallest, self.largest):
            distance = fits.log_b_half - end
            share = special.expit(np.exp(log_a) * distance)
            a_flat = np.exp(log_a)
            bend = a_flat**2 * share * (1 - share)
            gradient = -np.stack([0 * share, bend, a_flat * share + bend * distance], -1)
            slopes.append(-a_flat * share)
            errors.append(np.sqrt(np.einsum("gi,gij,gj->g", gradient, covariance, gradient)))
        return slopes, errors


def _error_of_b_opt(log_a, covariance) -> np.ndarray:
    """Standard error `[G]` of log B_opt = log B_half + log(a - 1)/a; infinite for a up to 1."""
    a = np.exp(log_a)
    above = np.maximum(a - 1, 1e-12)
    gradient = np.stack([0 * a, 1 + 0 * a, 1 / above - np.log(above) / a], -1)
    error = np.sqrt(np.maximum(np.einsum("gi,gij,gj->g", gradient, covariance, gradient), 0.0))
    return np.where(a > 1, error, np.inf)


def _around(value: float, reach: float) -> tuple[float, float]:
    if not value > 0 or not reach < 50:
        return 0.0, np.inf
    return float(value * np.exp(-reach)), float(value * np.exp(reach))


def p_of_hyperbolas(table: ScanTable) -> float:
    """p of a test that all rows of a scan are hyperbolas; NaN if no row, or no run, is left to test with.

    Tests the level and the slope over log L of log a. Their covariance comes from the errors of whole runs, since
    neighbouring losses share them (as in `resampling`).
    """
    table = table.select(table.num_batches > NUM_PARAMETERS)
    num_runs = np.unique(table.run_index[table.mask]).size
    freedom = num_runs - NUM_PARAMETERS * len(set(table.models))
    if freedom < 2 or np.unique(table.losses).size < 2:
        return float("nan")
    rows = _Rows(table.log_batch, table.log_steps, table.mask)
    log_a = rows.best()
    fits = rows.at(log_a)
    columns = rows.columns(log_a, fits)
    influence_of_a = np.einsum("gi,gni->gn", _inverse(columns)[:, NUM_PARAMETERS - 1], columns)
    weights = 1 / np.maximum((influence_of_a**2).sum(-1), 1e-12)
    x = np.log(table.losses)
    design = np.stack([np.ones_like(x), x - (weights * x).sum() / weights.sum()])
    on_line = design * weights / (weights * design**2).sum(-1, keepdims=True)
    found = on_line @ log_a
    influence = on_line[..., None] * influence_of_a
    errors = table.mask * np.clip(fits.residuals, -rows.limit, rows.limit)
    basis, sizes, _ = np.linalg.svd(columns, full_matrices=False)
    freedom_of = table.degrees_of_freedom(basis * (sizes / np.hypot(sizes, 1e-6))[:, None])
    covariance = covariance_of(table, influence, errors, freedom_of)
    statistic = found @ np.linalg.solve(covariance + 1e-24 * np.eye(2), found) / 2
    return float(special.fdtrc(2, freedom, max(statistic, 0.0)))


def _inverse(columns) -> np.ndarray:
    """`[G, 3, 3]`: inverses of the rows' normal matrices."""
    return np.linalg.inv(np.einsum("gni,gnj->gij", columns, columns) + 1e-12 * np.eye(NUM_PARAMETERS))
