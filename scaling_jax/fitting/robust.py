"""Huber weights: points that lie far from a fit pull on it with bounded force.

Huber 1964, "Robust estimation of a location parameter"; the scale is the median absolute residual.
"""

import numpy as np

TUNING = 2.0  # residuals beyond this many scales are held back; at 1.345 clean scans of seven batches lose too much


def huber_limit(residuals: np.ndarray, mask: np.ndarray, num_parameters: int) -> np.ndarray:
    """Residual size from which Huber's loss turns linear, one per fit.

    Args:
      residuals: `[..., n]`, any unit.
      mask: `[..., n]`, True where there is a point.
      num_parameters: fitted to each row; their share of the freedom is given back to the scale.

    Returns:
      `[..., 1]`, infinite (least squares) where fewer than three degrees of freedom are left to judge outliers by.
    """
    count = mask.sum(-1, keepdims=True)
    ordered = np.sort(np.where(mask, np.abs(residuals), np.inf), axis=-1)
    count_all = np.broadcast_to(count, (*ordered.shape[:-1], 1))
    low = np.take_along_axis(ordered, np.maximum(count_all - 1, 0) // 2, axis=-1)
    high = np.take_along_axis(ordered, np.minimum(count_all // 2, ordered.shape[-1] - 1), axis=-1)
    freedom = count - num_parameters
    with np.errstate(invalid="ignore"):
        scale = 1.4826 * 0.5 * (low + high) * np.sqrt(count / np.maximum(freedom, 1))
    # The floor keeps data without noise from turning rounding errors into outliers.
    return np.where(freedom >= 3, np.maximum(TUNING * scale, 1e-9), np.inf)


def huber_weights(residuals: np.ndarray, limit: np.ndarray) -> np.ndarray:
    """Weights in (0, 1] of the least-squares fit that has Huber's fit as its fixed point."""
    size = np.abs(residuals)
    return np.where(size <= limit, 1.0, limit / np.maximum(size, np.finfo(float).tiny))
