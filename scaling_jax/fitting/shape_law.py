"""The law of a scan whose trade-offs are no hyperbolas: B_half(L) is a power law, and the shape changes with the loss.

All runs are fitted at once: log S = log S_min + log(1 + (B_half/B)^a), with log B_half a straight line and log a a
parabola in log L, and S_min free at each model and loss. So a loss whose runs say little of their shape takes it from
the others. A run at B_half needs 2·S_min steps, as at the B_crit of a hyperbola. Runs that ended above a loss are left
out.

On planted scans with shapes from 0.5 to 1.5 that rise, fall or stay (tests/fitting/test_shape_law.py), 95 % intervals
of the exponent covered in 95 to 99 %. Those of hyperbolas, fitted to the same scans, never did.
"""

import dataclasses

import numpy as np
from scipy import special

from scaling_jax.fitting.hyperbolas import TUNING, huber_weights, log_overhead, weighted_mean
from scaling_jax.fitting.resampling import Errors
from scaling_jax.fitting.scan_table import ScanTable, covariance_of
from scaling_jax.fitting.shapes import best_shapes

NUM_PARAMETERS = 5  # two of B_half, three of a
_STEPS = 60  # of Gauss-Newton
_RIDGE = 0.1  # variance of log B_half and log a at one loss, at least, where the fit starts


@dataclasses.dataclass(frozen=True)
class ShapeLawErrors(Errors):
    """The law of B_half, and the covariance of its level and slope from the errors of whole runs."""

    level: float
    slope: float
    shape: np.ndarray  # `[3]`: log a = shape · (1, x, x²), x = log L - centre
    covariance: np.ndarray  # `[2, 2]`
    freedom: int

    def interval(self, at, confidence: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(value, low, high) of u·level + v·slope for `at = (u, v)`, `[...]` each (Student t)."""
        u, v = (np.asarray(x, float) for x in at)
        here = u * self.level + v * self.slope
        variance = u**2 * self.covariance[0, 0] + 2 * u * v * self.covariance[0, 1] + v**2 * self.covariance[1, 1]
        half = special.stdtrit(self.freedom, 0.5 + confidence / 2) * np.sqrt(np.maximum(variance, 0.0))
        return here, here - half, here + half

    def a(self, loss) -> np.ndarray:
        """The shape at a loss."""
        x = np.log(np.asarray(loss, float)) - self.centre
        return np.exp(self.shape[0] + self.shape[1] * x + self.shape[2] * x**2)


def fit_shape_law(table: ScanTable) -> ShapeLawErrors | None:
    """The law of B_half of a scan; None if runs or losses are too few to fit it with its shape."""
    num_runs, num_models = np.unique(table.run_index[table.mask]).size, len(set(table.models))
    freedom = num_runs - num_models - NUM_PARAMETERS
    if freedom < 1 or np.unique(table.losses).size < 3:
        return None
    fit = _Fit(table)
    parameters, limit = fit.start(), np.inf
    for _ in range(2):  # by least squares, then with outliers held back
        for _ in range(_STEPS):
            residuals, weights, columns = fit.linearise(parameters, limit)
            normal = np.einsum("gni,gn,gnj->ij", columns, weights, columns)
            step = np.linalg.solve(
                normal + 1e-6 * np.diag(np.diag(normal)), np.einsum("gni,gn,gn->i", columns, weights, residuals)
            )
            parameters = parameters + step / max(1.0, np.abs(step).max())
        left = table.mask.sum() - len(table.losses) - NUM_PARAMETERS
        scale = 1.4826 * np.median(np.abs(residuals[table.mask])) * np.sqrt(table.mask.sum() / max(left, 1))
        limit = max(TUNING * scale, 1e-9)
    influence = np.moveaxis(columns @ np.linalg.inv(normal)[:, :2], -1, 0)
    errors = table.mask * np.clip(residuals, -limit, limit)
    takes_out_s_min = (table.mask / np.sqrt(table.mask.sum(1, keepdims=True)))[..., None]
    covariance = covariance_of(table, influence, errors, table.degrees_of_freedom(takes_out_s_min))
    return ShapeLawErrors(
        centre=fit.centre,
        level=float(parameters[0]),
        slope=float(parameters[1]),
        shape=parameters[2:],
        covariance=covariance * (num_runs - num_models) / freedom,
        freedom=freedom,
    )


class _Fit:
    def __init__(self, table: ScanTable):
        self.table, self.points = table, table.mask.astype(float)
        log_loss = np.log(table.losses)
        self.centre = float(log_loss.mean())
        x = log_loss - self.centre
        self.of_half = np.stack([np.ones_like(x), x], 1)
        self.of_shape = np.stack([np.ones_like(x), x, x**2], 1)

    def start(self) -> np.ndarray:
        """Parameters through the fits of each loss alone."""
        best = best_shapes(self.table.log_batch, self.table.log_steps, self.table.mask)
        half, shape = (
            np.linalg.lstsq(design / error[:, None], value / error, rcond=None)[0]
            for design, value, error in (
                (self.of_half, best.log_b_half, np.sqrt(best.variances[:, 1] + _RIDGE)),
                (self.of_shape, best.log_a, np.sqrt(best.variances[:, 2] + _RIDGE)),
            )
        )
        return np.concatenate([half, shape])

    def linearise(self, parameters, limit) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Residuals and weights `[G, n]`, and derivatives `[G, n, 5]` of log S; the best S_min is taken out of all."""
        log_batch, points = self.table.log_batch, self.points
        log_half = (self.of_half @ parameters[:2])[:, None]
        a = np.exp(np.clip(self.of_shape @ parameters[2:], -3, 3))[:, None]
        overhead, share = log_overhead(a * log_half, a * log_batch)
        remainder, weights = self.table.log_steps - overhead, points
        residuals = remainder - weighted_mean(remainder, weights)
        if np.isfinite(limit):
            for _ in range(2):  # the level and the weights depend on each other
                weights = points * huber_weights(residuals, limit)
                residuals = remainder - weighted_mean(remainder, weights)
        columns = np.concatenate(
            [
                (a * share)[..., None] * self.of_half[:, None],
                (a * share * (log_half - log_batch))[..., None] * self.of_shape[:, None],
            ],
            axis=-1,
        )
        mean = (weights[..., None] * columns).sum(1, keepdims=True) / weights.sum(1)[:, None, None]
        return residuals * points, weights, (columns - mean) * points[..., None]
