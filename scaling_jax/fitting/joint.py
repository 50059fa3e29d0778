"""One law of B_crit fitted at once to the steps of every run to every target; S_min is free at each model and loss.

log S = log S_min(model, L) + log(1 + B_crit/B), with log B_crit = level + slope·x. For the law of Kaplan et al. 2020
(arXiv 2001.08361), eq. 1.4, x = log L; `forms` uses other x. Given the law, each S_min is an average, so the search is
over level and slope only. A loss at which the data leave B_crit unbounded still counts, with little weight. Runs that
ended above a target enter as bounds (`tradeoff.fit_bounded`).

Dimension letters: G fits (model, target loss); n runs of the largest model; R runs; T target losses.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from scaling_jax.fitting.hyperbolas import TUNING, huber_weights, log_overhead, weighted_mean
from scaling_jax.fitting.resampling import (
    LawErrors,
    LawFit,
    chunk_of,
    fit_chain,
    resamples_for,
    square_root,
    variance_of,
)
from scaling_jax.fitting.scan_table import ScanTable, scan_table
from scaling_jax.fitting.tradeoff import NUM_ITERATIONS, fit_tradeoffs, noise_of, pull_of


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class JointFit(LawFit):
    """One law, and S_min of each model and target loss with this law."""

    models: tuple[str, ...]  # the model of each S_min
    losses: np.ndarray  # the loss of each S_min, nats per token
    s_min: np.ndarray  # steps; NaN if there is no law
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
    resamples: int | None = None,
    seed: int = 0,
) -> JointFit:
    """Fits one law to the columns of `fit_scan`, which lists the arguments. Runs that ended above a target are bounds.

    Raises:
      ValueError: as `fit_scan` does.
    """
    table = reached_by(scan_table(model, batch_tokens, target_loss, steps, run, steps_tried), 3)
    return joint_fit_of(table, confidence, resamples, seed)


def joint_fit_of(table: ScanTable, confidence: float = 0.95, resamples: int | None = None, seed: int = 0) -> JointFit:
    """`fit_joint` of a table whose losses at least three batch sizes reached."""
    law = errors = None
    s_min, residual_scale = np.full(table.losses.shape, np.nan), np.nan
    if shows_both_sides(table, confidence):
        line = fit_chain(table).line
        x = np.log(table.losses) - line.centre
        fit = fit_joint_rows(table, x, table.log_steps, (line.level, line.slope))
        errors = joint_errors(table, x, float(line.centre), fit, resamples or resamples_for(table), seed)
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


class JointFits(NamedTuple):
    """Robust fits, `[...]` unless a shape is given; natural logs of tokens and steps."""

    level: np.ndarray  # log B_crit at x = 0
    slope: np.ndarray
    log_s_min: np.ndarray  # `[..., G]`
    residuals: np.ndarray  # `[..., G, n]`, of measured points and of bounds, zero elsewhere
    limit: np.ndarray  # `[..., 1, 1]`, above which Huber's loss is linear
    noise: np.ndarray  # `[..., 1, 1]`, standard deviation of log steps
    gradient: np.ndarray  # `[..., 2, G, n]`, of the fitted log steps by level and slope, minus its mean in each row
    information: np.ndarray  # `[..., 2, 2]`, inverse covariance of level and slope if log S has variance 1


def fit_joint_rows(
    table: ScanTable, x, log_steps, start, num_rounds=3, num_iterations=6, bound_iterations=NUM_ITERATIONS
) -> JointFits:
    """Fits `log_steps`, `[..., G, n]`, by Gauss-Newton steps in level and slope; each round renews the Huber weights.

    Args:
      table: the batch sizes, and which steps were measured and which are bounds.
      x: `[..., G]`; log B_crit = level + slope·x. Centre it, so that errors of level and slope are nearly independent.
      start: (level, slope), `[...]` each.
      num_rounds, num_iterations: of the first fit, to the measured points.
      bound_iterations: of the second fit, which starts from the first and includes the bounds.
    """
    points = table.mask.astype(float)
    level, slope = (np.asarray(s, float)[..., None, None] for s in start)
    abscissa = np.asarray(x, float)[..., None]
    limit = np.array(np.inf)
    for k in range(num_rounds * num_iterations):
        residuals, gradient, weights = _linearise(level, slope, abscissa, table.log_batch, log_steps, points, limit)
        force = np.einsum("...kgn,...gn->...k", gradient, weights * residuals)
        step = _solve(_quadratic(gradient, weights), force, 1.0)
        level, slope = level + step[..., 0, None, None], slope + step[..., 1, None, None]
        if k % num_iterations == num_iterations - 1:
            limit = _limit(residuals, table.mask)
    overhead, _ = log_overhead(level + slope * abscissa, table.log_batch)
    _, _, weights = _linearise(level, slope, abscissa, table.log_batch, log_steps, points, limit)
    s_min = weighted_mean(log_steps - overhead, weights)
    num_parameters = int(table.mask.any(-1).sum()) + 2
    noise = noise_of(log_steps - overhead - s_min, table.mask, limit, num_parameters, axis=(-2, -1))
    if table.bound.any():
        level, slope, s_min, noise = _with_bounds(
            table, abscissa, log_steps, (level, slope, s_min), limit, noise, num_parameters, bound_iterations
        )
    overhead, along = log_overhead(level + slope * abscissa, table.log_batch)
    residuals = (log_steps - overhead - s_min) * (table.mask | table.bound)
    _, points = pull_of(residuals, table.mask, table.bound, np.inf, noise)
    gradient = _gradient(along, abscissa, points)
    return JointFits(
        level=level[..., 0, 0],
        slope=slope[..., 0, 0],
        log_s_min=s_min[..., 0],
        residuals=residuals,
        limit=limit,
        noise=noise,
        gradient=gradient * table.mask,
        information=_quadratic(gradient, points),
    )


def joint_errors(
    table: ScanTable, x: np.ndarray, centre: float, fit: JointFits, resamples: int, seed: int
) -> LawErrors:
    """Errors of the law, from refits of `resamples` draws; x = log L - centre."""
    by_run = table.by_run(fit.gradient)  # [2, R, T]
    inverse = np.linalg.inv(fit.information)
    influence = np.einsum("kl,lrt->krt", inverse, by_run)
    errors = _run_errors(table, fit)
    freedom = _degrees_of_freedom(table)
    covariance = _covariance(errors, freedom, by_run, inverse)
    root = square_root(covariance)
    forms = np.stack([influence[i].T @ influence[j] for i, j in ((0, 0), (1, 1), (0, 1))]) / np.maximum(freedom, 1.0)

    generator = np.random.default_rng(seed)
    fitted = table.log_steps - fit.residuals * table.mask  # bounds stay as they are
    shifts, variances = [], []
    chunk = chunk_of(table)
    for first in range(0, resamples, chunk):
        count = min(chunk, resamples - first)
        drawn = generator.standard_normal((count, *errors.shape)) @ root.T
        log_steps = fitted + drawn[:, table.run_index, table.target_index[:, None]] * table.mask
        start = np.full(count, fit.level), np.full(count, fit.slope)
        again = fit_joint_rows(table, x, log_steps, start, num_rounds=2, num_iterations=3, bound_iterations=8)
        shifts.append(np.stack([again.level - fit.level, again.slope - fit.slope], axis=-1))
        variances.append(variance_of(forms, _run_errors(table, again)))
    return LawErrors(
        centre=centre,
        level=float(fit.level),
        slope=float(fit.slope),
        variance=variance_of(forms, errors),
        shifts=np.concatenate(shifts),
        variances=np.concatenate(variances),
    )


def reached_by(table: ScanTable, count: int) -> ScanTable:
    """The table's fits with measured steps at `count` batch sizes or more."""
    return table.select(table.num_batches >= count)


def shows_both_sides(table: ScanTable, confidence: float) -> bool:
    """True if batches lie on both sides of B_crit at three losses or more."""
    if not table.models:
        return False
    fits = fit_tradeoffs(table.log_batch, table.log_steps, table.mask, confidence, table.bound)
    return len({float(loss) for loss, fit in zip(table.losses, fits, strict=True) if not fit.one_sided}) >= 3


def _with_bounds(table, abscissa, log_steps, start, limit, noise, num_parameters, num_iterations):
    """Newton steps in level, slope and every S_min, starting from the fit to measured points; updates the noise too."""
    level, slope, s_min = start
    for _ in range(num_iterations):
        overhead, along = log_overhead(level + slope * abscissa, table.log_batch)
        pull, weights = pull_of(log_steps - overhead - s_min, table.mask, table.bound, limit, noise)
        gradient = _gradient(along, abscissa, weights)
        step = _solve(_quadratic(gradient, weights), np.einsum("...kgn,...gn->...k", gradient, pull), 0.5)
        along = along * (step[..., :1, None] + step[..., 1:, None] * abscissa)
        total = weights.sum(-1, keepdims=True)
        s_min = s_min + np.clip((pull - weights * along).sum(-1, keepdims=True) / total, -0.5, 0.5)
        level, slope = level + step[..., 0, None, None], slope + step[..., 1, None, None]
        overhead, _ = log_overhead(level + slope * abscissa, table.log_batch)
        noise = noise_of(log_steps - overhead - s_min, table.mask, limit, num_parameters, axis=(-2, -1))
    return level, slope, s_min, noise


def _linearise(level, slope, abscissa, log_batch, log_steps, points, limit):
    overhead, along = log_overhead(level + slope * abscissa, log_batch)
    remainder = log_steps - overhead
    residuals = (remainder - weighted_mean(remainder, points)) * points
    weights = points
    if np.isfinite(limit).any():
        weights = points * huber_weights(residuals, limit)
        residuals = (remainder - weighted_mean(remainder, weights)) * points
    return residuals, _gradient(along, abscissa, weights), weights


def _gradient(along, abscissa, weights):
    along = (along - weighted_mean(along, weights)) * (weights > 0)
    return np.stack([along, along * abscissa], axis=-3)


def _quadratic(gradient, weights):
    return np.einsum("...kgn,...gn,...lgn->...kl", gradient, weights, gradient, optimize=True)


def _solve(information, force, longest):
    damped = information + 1e-9 * np.trace(information, axis1=-2, axis2=-1)[..., None, None] * np.eye(2)
    return np.clip(np.linalg.solve(damped, force[..., None])[..., 0], -longest, longest)


def _limit(residuals, mask):
    """Limit of Huber's loss, with one scale for the whole scan: seven points would give too poor a scale per row."""
    count = mask.sum()
    freedom = count - mask.any(-1).sum() - 2
    scale = 1.4826 * np.median(np.abs(residuals[..., mask]), axis=-1) * np.sqrt(count / max(freedom, 1))
    return np.maximum(TUNING * scale, 1e-9)[..., None, None]


def _run_errors(table, fit):
    inside = (table.mask & (np.abs(fit.residuals) <= fit.limit)).sum((-2, -1), keepdims=True) / table.mask.sum()
    return table.by_run(np.clip(fit.residuals, -fit.limit, fit.limit) / np.maximum(inside, 0.5))


def _degrees_of_freedom(table: ScanTable) -> np.ndarray:
    """`[T, T]`: expected sum over runs of the product of residuals at two targets, for an error covariance of 1.

    Counts the mean of each row, S_min, as fitted; level and slope are in `_covariance`.
    """
    num_runs, num_targets = table.run_index.max() + 1, table.target_index.max() + 1
    leftover = np.zeros((num_targets, num_runs, num_runs))
    for g, t in enumerate(table.target_index):
        runs = table.run_index[g, table.mask[g]]
        leftover[t][np.ix_(runs, runs)] += np.eye(len(runs)) - 1 / len(runs)
    flat = leftover.reshape(num_targets, -1)
    return flat @ flat.T


def _covariance(errors, freedom, gradient, inverse):
    """`[T, T]`: covariance of the errors along a run; the residuals' covariance, corrected for level and slope."""
    total = errors.T @ errors
    covariance = total / np.maximum(freedom, 1.0)
    for _ in range(10):
        spread = np.einsum("krt,tu->kru", gradient, covariance)
        crossed = np.einsum("kru,kl,lrt->ut", spread, inverse, gradient)
        of_parameters = inverse @ np.einsum("krt,lrt->kl", spread, gradient) @ inverse
        taken = crossed + crossed.T - np.einsum("krt,kl,lru->tu", gradient, of_parameters, gradient)
        covariance = (total + taken) / np.maximum(freedom, 1.0)
    return covariance
