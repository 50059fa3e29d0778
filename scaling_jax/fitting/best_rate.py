"""The loss of each batch size at its best learning rate, between the rates that were tried.

At one budget, loss = lowest loss of the batch + κ·u² + γ·u³, u = log rate - log best rate. Each batch has its own
lowest loss and best rate; κ and γ are common to the batches of a budget.
"""

import dataclasses

import numpy as np
from scipy import optimize

NEIGHBOURS = 2  # rates on each side of the best one that enter the fit; farther ones say little of the minimum
LARGEST_RISE = 0.1  # of the loss, above which a rate is left out: close to divergence, losses follow no cubic
_FEWEST_LEFT = 3  # runs beyond the other parameters, to fit γ


@dataclasses.dataclass(frozen=True, eq=False)
class BestLosses:
    """A row for each batch size of one budget, by rising batch."""

    batch_tokens: np.ndarray  # `[n]`
    loss: np.ndarray  # `[n]`, at the best rate
    covariance: np.ndarray  # `[n, n]`, relative to the variance of one run's loss
    learning_rate: np.ndarray  # `[n]`, the best; NaN if unknown
    at_edge: np.ndarray  # `[n]`, True if the lowest loss is at an edge of the rates tried
    rss: float  # squared residuals of runs around their batch's fit, with their degrees of freedom
    freedom: int


def best_losses(batch_tokens, loss, learning_rate) -> BestLosses:
    """The loss at the best rate of each batch size of one budget.

    A batch with fewer than three rates, whose best rate can't be told, has the mean of the runs at its best one.

    Args:
      batch_tokens: `[runs]`, tokens.
      loss: `[runs]`, finite.
      learning_rate: `[runs]`; NaN if unknown.
    """
    batches = np.unique(batch_tokens)
    of_batch = [_Batch(loss[batch_tokens == b], learning_rate[batch_tokens == b]) for b in batches]
    found = BestLosses(
        batches,
        np.array([b.lowest for b in of_batch]),
        np.diag([1.0 / b.count for b in of_batch]),
        np.array([b.rate for b in of_batch]),
        np.array([b.at_edge for b in of_batch]),
        sum(b.rss for b in of_batch),
        sum(b.count - 1 for b in of_batch),
    )
    inside = np.array([b.inside for b in of_batch])
    return _between_rates(found, of_batch, inside) if inside.any() else found


class _Batch:
    """The runs of one batch size."""

    def __init__(self, loss, rate):
        known = np.isfinite(rate)
        if known.any():  # a run whose rate is unknown says nothing beside runs whose rates are known
            loss, rate = loss[known], rate[known]
        rates = np.unique(rate)  # a single NaN if they are unknown
        same = [np.isnan(rate) if np.isnan(r) else rate == r for r in rates]
        means = np.array([loss[rows].mean() for rows in same])
        k = int(np.argmin(means))
        self.rate, self.lowest, self.count = float(rates[k]), float(means[k]), int(same[k].sum())
        self.rss = float(((loss[same[k]] - means[k]) ** 2).sum())
        self.at_edge = len(rates) > 1 and k in (0, len(rates) - 1)
        self.inside = 0 < k < len(rates) - 1
        near = [
            j
            for j in range(max(k - NEIGHBOURS, 0), min(k + NEIGHBOURS, len(rates) - 1) + 1)
            if abs(j - k) <= 1 or means[j] <= means[k] * (1 + LARGEST_RISE)
        ]
        rows = np.isin(rate, rates[near])
        self.y, self.loss = np.log(rate[rows] / rates[k]), loss[rows]


def _between_rates(found: BestLosses, of_batch: list[_Batch], inside) -> BestLosses:
    """The lowest losses of the batches whose best rate lies inside those tried, by a cubic."""
    used = [of_batch[i] for i in np.flatnonzero(inside)]
    index = np.repeat(np.arange(len(used)), [len(b.y) for b in used])
    y, loss = np.concatenate([b.y for b in used]), np.concatenate([b.loss for b in used])
    count = len(used)
    lowest = np.array([b.lowest for b in used])
    cubic = len(y) - (2 * count + 1) >= _FEWEST_LEFT

    def residuals(parameters):
        u = y - parameters[count : 2 * count][index]
        kappa, gamma = parameters[2 * count], parameters[2 * count + 1] if cubic else 0.0
        return parameters[:count][index] + (kappa + gamma * u) * u**2 - loss

    rise = max(float(np.mean((loss - lowest[index]) / np.maximum(y**2, 1e-9), where=y != 0)), 1e-9)
    start = np.concatenate([lowest, np.zeros(count), [rise], [0.0] * cubic])
    fit = optimize.least_squares(residuals, start, method="lm", x_scale="jac")
    best = fit.x[count : 2 * count]
    # Runs that rise and fall by chance have no best rate: then the lowest run stands, as it does at an edge.
    if not fit.x[2 * count] > 0 or any(not b.y.min() <= at <= b.y.max() for b, at in zip(used, best, strict=True)):
        return found
    rows = np.flatnonzero(inside)
    new_loss, covariance, rate = found.loss.copy(), found.covariance.copy(), found.learning_rate.copy()
    new_loss[rows], rate[rows] = fit.x[:count], rate[rows] * np.exp(best)
    covariance[np.ix_(rows, rows)] = np.linalg.pinv(fit.jac.T @ fit.jac)[:count, :count]
    others = [b for b in of_batch if not b.inside]
    return dataclasses.replace(
        found,
        loss=new_loss,
        covariance=covariance,
        learning_rate=rate,
        rss=2 * fit.cost + sum(b.rss for b in others),
        freedom=len(y) - len(start) + sum(b.count - 1 for b in others),
    )
