"""The fitted trade-offs that advice rests on: of which model, at which losses, and how sure their steps are."""

import math

import numpy as np
from scipy import special

from scaling_jax.fitting import CriticalBatch, ScanFit
from scaling_jax.fitting.hyperbolas import huber_limit
from scaling_jax.fitting.scan_fit import FEWEST_BATCHES
from scaling_jax.fitting.shapes import NUM_PARAMETERS
from scaling_jax.io import UserError


def models_of(fit: ScanFit) -> tuple[str, ...]:
    """The models with a usable trade-off. The model with the lowest loss comes first."""
    lowest: dict[str, float] = {}
    for point in fit.points:
        if usable(point):
            lowest[point.model] = min(point.loss, lowest.get(point.model, math.inf))
    return tuple(sorted(lowest, key=lambda model: lowest[model]))


def losses_of(fit: ScanFit, model: str) -> tuple[float, float]:
    """(lowest, highest) loss at which batches lie on both sides of the model's B_crit.

    Raises:
      UserError: if there is no such loss.
    """
    points = points_of(fit, model)
    return points[-1].loss, points[0].loss


def usable(point: CriticalBatch) -> bool:
    """True if batches lie on both sides of B_crit: of the hyperbola's, or of the free shape's if there are none."""
    if point.free_shape:
        low, high = point.b_crit_interval
        return point.in_law and low > 0 and high < math.inf
    return point.identified and not point.tradeoff.one_sided


def points_of(fit: ScanFit, model: str) -> list[CriticalBatch]:
    """The model's usable trade-offs, by falling loss.

    Raises:
      UserError: if there are none. Says what is missing.
    """
    points = [point for point in fit.points if point.model == model and usable(point)]
    if points:
        return sorted(points, key=lambda point: -point.loss)
    there = models_of(fit)
    unusable = [point for point in fit.points if point.model == model or not there]
    others = f"choose from {', '.join(there)}" if there else ""
    if not fit.points:
        raise UserError(
            "no loss has steps at three batch sizes, so there is no trade-off: add batch sizes for the same losses"
        )
    if not unusable:
        raise UserError(f"model {model!r} has no trade-off at any loss: {others}")
    names = ", ".join(dict.fromkeys(point.model for point in unusable))
    raise UserError(f"model {names}: {_what_is_missing(unusable)}" + (f", or {others}" if others else ""))


def exponent(point: CriticalBatch) -> float:
    """a of its steps, S_min·(1 + (B_crit/B)^a); 1 for hyperbolas."""
    return point.tradeoff.shape.a if point.free_shape else 1.0


def neighbours_of(points: list[CriticalBatch], loss: float) -> tuple[tuple[float, CriticalBatch], ...]:
    """(weight, point) of the point at a loss, or of both beside it, for means of logs linear in log loss."""
    for point in points:
        if math.isclose(point.loss, loss, rel_tol=1e-9):
            return ((1.0, point),)
    k = next(i for i, point in enumerate(points) if point.loss < loss)
    above, below = points[k - 1], points[k]
    share = math.log(above.loss / loss) / math.log(above.loss / below.loss)
    return (1.0 - share, above), (share, below)


def steps_interval(point: CriticalBatch, batch_tokens) -> tuple[np.ndarray, np.ndarray]:
    """(low, high) of `point.steps_at`, by the delta method in logs (Student t) over the parameters of its shape."""
    if not point.free_shape:
        return point.tradeoff.steps_interval(batch_tokens)
    residuals = point.residuals
    freedom = max(residuals.size - NUM_PARAMETERS, 1)
    limit = huber_limit(residuals, np.ones(residuals.shape, bool), NUM_PARAMETERS)[0]
    inside = max(float(np.mean(np.abs(residuals) <= limit)), 0.5)
    variance = float((np.clip(residuals, -limit, limit) ** 2).sum()) / freedom / inside**2
    known = _gradient(point, point.tradeoff.batch_tokens)
    inverse = np.linalg.inv(known.T @ known + 1e-12 * np.eye(NUM_PARAMETERS))
    along = _gradient(point, batch_tokens)
    spread = variance * np.einsum("...i,ij,...j->...", along, inverse, along)
    factor = np.exp(special.stdtrit(freedom, 0.5 + point.tradeoff.confidence / 2) * np.sqrt(np.maximum(spread, 0.0)))
    return point.steps_at(batch_tokens) / factor, point.steps_at(batch_tokens) * factor


def _gradient(point: CriticalBatch, batch_tokens) -> np.ndarray:
    """`[..., 3]`: derivatives of log S by log S_min, log B_half and log a."""
    shape = point.tradeoff.shape
    distance = math.log(shape.b_half) - np.log(np.asarray(batch_tokens, float))
    share = special.expit(shape.a * distance)
    return np.stack([np.ones_like(share), shape.a * share, shape.a * share * distance], axis=-1)


def _what_is_missing(points: list[CriticalBatch]) -> str:
    """Why none of these trade-offs is usable, and what to do."""
    losses = [point.loss for point in points]
    batches = np.concatenate([point.tradeoff.batch_tokens for point in points])
    at = f"with batches of {batches.min():,.0f} to {batches.max():,.0f} tokens at losses of {min(losses):g} to "
    at += f"{max(losses):g}"
    if all(point.tradeoff.token_minimum for point in points):
        return (
            f"tokens are U-shaped, {at}: small batches need more of them, so there is no B_crit; look for what slows "
            "small batches, such as β's fixed per step, or leave them out"
        )
    most = max(np.unique(point.tradeoff.batch_tokens).size for point in points)
    if points[0].free_shape and most < FEWEST_BATCHES:
        return (
            f"the trade-offs are no hyperbolas, and another shape takes {FEWEST_BATCHES} batch sizes at a loss, but "
            f"there are {most}, {at}: add batch sizes"
        )
    middle = math.sqrt(batches.min() * batches.max())
    missing = "smaller" if np.median([point.b_crit for point in points]) < middle else "larger"
    return f"the data do not show batches on both sides of B_crit, {at}: add {missing} batch sizes"
