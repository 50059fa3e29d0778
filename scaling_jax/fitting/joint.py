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
    draw_errors,
    fit_chain,
    forms_of_variance,
    resamples_for,
    variance_of,
)
from scaling_jax.fitting.scan_table import ScanTable, scan_table
from scaling_jax.fitting.tradeoff import NUM_ITERATIONS, are_one_sided, noise_of, pull_of


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
    if shows_both_sides(table):
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
    inverse = np.linalg.inv(fit.information)
    errors = _run_errors(table, fit)
    freedom = _degrees_of_freedom(table)
    covariance = _covariance(table, errors, freedom, fit.gradient, inverse)
    forms = forms_of_variance(table, np.einsum("kl,lgn->kgn", inverse, fit.gradient), freedom)

    fitted = table.log_steps - fit.residuals * table.mask  # bounds stay as they are
    shifts, variances = [], []
    for drawn in draw_errors(table, covariance, resamples, seed):
        log_steps = fitted + drawn * table.mask
        start = np.full(len(drawn), fit.level), np.full(len(drawn), fit.slope)
        again = fit_joint_rows(table, x, log_steps, start, num_rounds=2, num_iterations=3, bound_iterations=8)
        shifts.append(np.stack([again.level - fit.level, again.slope - fit.slope], axis=-1))
        variances.append(variance_of(table, forms, _run_errors(table, again)))
    return LawErrors(
        centre=centre,
        level=float(fit.level),
        slope=float(fit.slope),
        variance=variance_of(table, forms, errors),
        shifts=np.concatenate(shifts),
        variances=np.concatenate(variances),
    )


def reached_by(table: ScanTable, count: int) -> ScanTable:
    """The table's fits with measured steps at `count` batch sizes or more."""
    return table.select(table.num_batches >= count)


def shows_both_sides(table: ScanTable) -> bool:
    """True if batches lie on both sides of B_crit at three losses or more."""
    if not table.models:
        return False
    one_sided = are_one_sided(table.log_batch, table.log_steps, table.mask, table.bound)
    return np.unique(table.losses[~one_sided]).size >= 3


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
    return table.mask * np.clip(fit.residuals, -fit.limit, fit.limit) / np.maximum(inside, 0.5)


def _degrees_of_freedom(table: ScanTable) -> np.ndarray:
    """`ScanTable.degrees_of_freedom`. Counts S_min of each row as fitted; level and slope are in `_covariance`."""
    return table.degrees_of_freedom((table.mask / np.sqrt(table.mask.sum(-1, keepdims=True)))[..., None])


def _covariance(table: ScanTable, errors, freedom, gradient, inverse):
    """`[T, T]`: covariance of the errors along a run; the residuals' covariance, corrected for level and slope."""
    total = table.sum_over_runs(errors, errors)
    covariance = total / np.maximum(freedom, 1.0)
    weighted = np.einsum("kl,lgn->kgn", inverse, gradient)
    for _ in range(10):
        spread = np.zeros_like(gradient)
        for rows in table.rows_of_models():
            spread[:, rows] = covariance[table.targets_of(rows)] @ gradient[:, rows]
        of_parameters = inverse @ (spread.reshape(2, -1) @ gradient.reshape(2, -1).T) @ inverse
        crossed = table.sum_over_runs(np.hstack(spread), np.hstack(weighted))
        both = np.einsum("kl,lgn->kgn", of_parameters, gradient)
        taken = crossed + crossed.T - table.sum_over_runs(np.hstack(gradient), np.hstack(both))
        covariance = (total + taken) / np.maximum(freedom, 1.0)
    return covariance
