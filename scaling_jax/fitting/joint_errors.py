"""What a joint fit would have come out as, had its runs' errors fallen otherwise.

Like `resampling`: whole runs' errors are drawn from a normal law whose covariance along the run is that of the
residuals, corrected for what the fit took out of them; intervals are studentised (bootstrap-t).
"""

import numpy as np

from scaling_jax.fitting.joint import JointFits, fit_joint_rows
from scaling_jax.fitting.resampling import CHUNK, LawErrors, square_root
from scaling_jax.fitting.scan_table import ScanTable


def joint_errors(
    table: ScanTable, x: np.ndarray, centre: float, fit: JointFits, resamples: int, seed: int
) -> LawErrors:
    """Refits `resamples` draws; level and slope are in x, which is log L less `centre` for a law of the loss."""
    by_run = _by_run(table, fit.gradient)  # [2, R, T]
    inverse = np.linalg.inv(fit.information)
    influence = np.einsum("kl,lrt->krt", inverse, by_run)
    errors = _run_errors(table, fit)
    freedom = _degrees_of_freedom(table)
    covariance = _covariance(errors, freedom, by_run, inverse)
    root = square_root(covariance)
    forms = np.stack([influence[i].T @ influence[j] for i, j in ((0, 0), (1, 1), (0, 1))]) / np.maximum(freedom, 1.0)

    generator = np.random.default_rng(seed)
    fitted = table.log_steps - fit.residuals * table.mask  # bounds stay what they are
    shifts, variances = [], []
    for first in range(0, resamples, CHUNK):
        count = min(CHUNK, resamples - first)
        drawn = generator.standard_normal((count, *errors.shape)) @ root.T
        log_steps = fitted + drawn[:, table.run_index, table.target_index[:, None]] * table.mask
        start = np.full(count, fit.level), np.full(count, fit.slope)
        again = fit_joint_rows(table, x, log_steps, start, num_rounds=2, num_iterations=3, bound_iterations=8)
        shifts.append(np.stack([again.level - fit.level, again.slope - fit.slope], axis=-1))
        variances.append(_variance(forms, _run_errors(table, again)))
    return LawErrors(
        centre=centre,
        level=float(fit.level),
        slope=float(fit.slope),
        variance=_variance(forms, errors),
        shifts=np.concatenate(shifts),
        variances=np.concatenate(variances),
    )


def _by_run(table: ScanTable, values: np.ndarray) -> np.ndarray:
    """`[..., G, n]` as `[..., R, T]`, zero where nothing was measured."""
    shape = table.run_index.max() + 1, table.target_index.max() + 1
    out = np.zeros((*values.shape[:-2], *shape))
    g, i = np.nonzero(table.mask)
    out[..., table.run_index[g, i], table.target_index[g]] = values[..., g, i]
    return out


def _run_errors(table, fit):
    inside = (table.mask & (np.abs(fit.residuals) <= fit.limit)).sum((-2, -1), keepdims=True) / table.mask.sum()
    return _by_run(table, np.clip(fit.residuals, -fit.limit, fit.limit) / np.maximum(inside, 0.5))


def _degrees_of_freedom(table: ScanTable) -> np.ndarray:
    """`[T, T]`: what is left of a sum over runs once each row's mean is taken out."""
    num_runs, num_targets = table.run_index.max() + 1, table.target_index.max() + 1
    leftover = np.zeros((num_targets, num_runs, num_runs))
    for g, t in enumerate(table.target_index):
        runs = table.run_index[g, table.mask[g]]
        leftover[t][np.ix_(runs, runs)] += np.eye(len(runs)) - 1 / len(runs)
    flat = leftover.reshape(num_targets, -1)
    return flat @ flat.T


def _covariance(errors, freedom, gradient, inverse):
    """Of errors along a run: that of the residuals, and what level and slope have taken from it."""
    total = errors.T @ errors
    covariance = total / np.maximum(freedom, 1.0)
    for _ in range(10):
        spread = np.einsum("krt,tu->kru", gradient, covariance)
        crossed = np.einsum("kru,kl,lrt->ut", spread, inverse, gradient)
        of_parameters = inverse @ np.einsum("krt,lrt->kl", spread, gradient) @ inverse
        taken = crossed + crossed.T - np.einsum("krt,kl,lru->tu", gradient, of_parameters, gradient)
        covariance = (total + taken) / np.maximum(freedom, 1.0)
    return covariance


def _variance(forms, errors):
    return np.stack([((errors @ form) * errors).sum((-2, -1)) for form in forms], axis=-1)
