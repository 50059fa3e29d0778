"""Steps to losses from runs that ended at several budgets, by interpolation between the budgets.

A run with a decaying learning rate says its loss at its end only. But runs of one batch on several budgets say how its
loss falls with the tokens, so how many tokens each loss takes. That makes the table of `fit_scan`.
"""

from typing import Any, NamedTuple

import numpy as np
from scipy import interpolate, optimize

from scaling_jax.fitting.best_rate import best_losses

FEWEST_BUDGETS = 2
FEWEST_BATCHES = 3  # that reach a loss
MOST_LOSSES = 8


class _Fall(NamedTuple):
    """How the loss of one batch size falls with the budget: log tokens `[budgets]` and losses that fall."""

    batch_tokens: float
    log_tokens: np.ndarray
    loss: np.ndarray


def steps_from_budgets(model, batch_tokens, tokens, loss, learning_rate=None, *, run=None) -> dict[str, list]:
    """The columns of `fit_scan` from losses at several budgets; see `fit_budget` for the arguments.

    Each batch counts at its best learning rate at each budget, in the mean over seeds. Losses that a batch passes
    before its smallest budget are left out, because it isn't known where. One that it doesn't reach has `steps_tried`.

    Raises:
      ValueError: if no model has three batches with two budgets each, whose losses overlap.
    """
    model = np.asarray(model, dtype=object)
    rates = np.full(model.shape, np.nan) if learning_rate is None else np.asarray(learning_rate, float)
    batch_tokens, tokens, loss = (np.asarray(column, float) for column in (batch_tokens, tokens, loss))
    columns: dict[str, list[Any]] = {
        name: [] for name in ("model", "batch_tokens", "target_loss", "steps", "steps_tried")
    }
    for name in dict.fromkeys(model):
        rows = (model == name) & np.isfinite(loss)
        falls = _falls(batch_tokens[rows], tokens[rows], loss[rows], rates[rows])
        for target in _targets(falls):
            for fall in falls:
                steps = _tokens_to(fall, target) / fall.batch_tokens
                tried = float(np.exp(fall.log_tokens[-1])) / fall.batch_tokens
                for column, value in zip(
                    columns.values(), (name, fall.batch_tokens, target, steps, tried), strict=True
                ):
                    column.append(value)
    if not columns["model"]:
        raise ValueError(
            f"no loss lies between two budgets of {FEWEST_BATCHES} batch sizes of a model: steps to a loss need the "
            "same batches on two budgets or more"
        )
    return columns


def _falls(batch_tokens, tokens, loss, rates) -> list[_Fall]:
    best: dict[float, list[tuple[float, float]]] = {}
    for d in np.unique(tokens):
        at = tokens == d
        found = best_losses(batch_tokens[at], loss[at], rates[at])
        for batch, lowest in zip(found.batch_tokens, found.loss, strict=True):
            best.setdefault(float(batch), []).append((float(d), float(lowest)))
    falls = []
    for batch in sorted(best):
        if len(best[batch]) >= FEWEST_BUDGETS:
            d, lowest = np.array(best[batch]).T
            falls.append(_Fall(batch, np.log(d), optimize.isotonic_regression(lowest, increasing=False).x))
    return falls


def _targets(falls: list[_Fall]) -> np.ndarray:
    """Losses between budgets of three batches or more, which no batch passes before its smallest budget."""
    if len(falls) < FEWEST_BATCHES:
        return np.array([])
    high = min(fall.loss[0] for fall in falls)
    low = sorted(fall.loss[-1] for fall in falls)[FEWEST_BATCHES - 1]
    if not low < high:
        return np.array([])
    count = min(MOST_LOSSES, 2 * max(len(fall.loss) for fall in falls))
    return np.geomspace(high, low, count)


def _tokens_to(fall: _Fall, target: float) -> float:
    """Tokens to a loss, by a monotone cubic of log tokens over the loss; NaN if it isn't reached."""
    if target < fall.loss[-1]:
        return np.nan
    loss, first = np.unique(fall.loss, return_index=True)  # rising; of budgets with one loss the smallest
    if len(loss) < 2:
        return float(np.exp(fall.log_tokens[0]))
    return float(np.exp(interpolate.PchipInterpolator(loss, fall.log_tokens[first])(min(target, loss[-1]))))
