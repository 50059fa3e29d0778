"""A long table of measurements as padded arrays: one row per model and target loss, its runs along the last axis.

Dimension letters: G rows, each a fit (model, target loss); n runs of the model with most runs; R runs of all models; T
target losses of all models.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np


class ScanTable(NamedTuple):
    """Measurements in natural logs of tokens and steps. Entries with neither `mask` nor `bound` have no meaning."""

    models: tuple[str, ...]  # of each fit, `[G]`
    losses: np.ndarray  # `[G]`, nats per token
    log_batch: np.ndarray  # `[G, n]`
    log_steps: np.ndarray  # `[G, n]`, a lower bound where `bound` is True
    mask: np.ndarray  # `[G, n]`, True where the run reached the target
    bound: np.ndarray  # `[G, n]`, True where the run ended above the target after a known number of steps
    run_index: np.ndarray  # `[G, n]`, in 0..R-1
    target_index: np.ndarray  # `[G]`, in 0..T-1
    not_reached: np.ndarray  # `[G]`, number of runs that didn't reach the target

    def select(self, keep: np.ndarray) -> "ScanTable":
        """The rows where `keep`, `[G]`, is True."""
        models = tuple(model for model, kept in zip(self.models, keep, strict=True) if kept)
        return ScanTable(models, *(field[keep] for field in self[1:]))

    def between(self, lowest: float, highest: float) -> "ScanTable":
        """The table with only the runs whose log batch lies between two values, up to rounding."""
        inside = (self.log_batch > lowest - 1e-6) & (self.log_batch < highest + 1e-6)
        return self._replace(mask=self.mask & inside, bound=self.bound & inside)

    @property
    def num_batches(self) -> np.ndarray:
        """`[G]`: number of batch sizes that reached the target."""
        return np.array([np.unique(row[mask]).size for row, mask in zip(self.log_batch, self.mask, strict=True)], int)

    def degrees_of_freedom(self, leftover: Callable[[int], np.ndarray]) -> np.ndarray:
        """`[T, T]`: expected sum over runs of the product of residuals at two targets, for an error covariance of 1.

        Args:
          leftover: row -> the projection `[points, points]` that turns the errors of its points into residuals.
        """
        num_runs, num_targets = self.run_index.max() + 1, self.target_index.max() + 1
        projections = np.zeros((num_targets, num_runs, num_runs))
        for g, t in enumerate(self.target_index):
            runs = self.run_index[g, self.mask[g]]
            projections[t][np.ix_(runs, runs)] += leftover(g)
        flat = projections.reshape(num_targets, -1)
        return flat @ flat.T

    def by_run(self, values: np.ndarray) -> np.ndarray:
        """`values` `[..., G, n]` as `[..., R, T]`; zero where nothing was measured."""
        out = np.zeros((*values.shape[:-2], self.run_index.max() + 1, self.target_index.max() + 1))
        g, i = np.nonzero(self.mask)
        out[..., self.run_index[g, i], self.target_index[g]] = values[..., g, i]
        return out


def covariance_of(influence, errors, freedom) -> np.ndarray:
    """Covariance `[k, k]` of numbers that errors of run r at target t move by `influence` `[k, R, T]`.

    Args:
      errors: `[R, T]`, residuals by run and target.
      freedom: `[T, T]`, see `ScanTable.degrees_of_freedom`.
    """
    product = errors.T @ errors / np.maximum(freedom, 1.0)
    return np.einsum("irs,st,jrt->ij", influence, product, influence)


def scan_table(model, batch_tokens, target_loss, steps, run=None, steps_tried=None, offset_steps=None) -> ScanTable:
    """The columns of a long table as arrays; `fit_scan` lists the columns.

    Raises:
      ValueError: for bad values, columns of unequal length, or two rows for one run and target. Names the row.
    """
    model = [str(name) for name in model]
    batch_tokens, target_loss, steps = (np.asarray(x, float) for x in (batch_tokens, target_loss, steps))
    run = [""] * len(model) if run is None else [str(name) for name in run]
    tried = np.full(len(model), np.nan) if steps_tried is None else np.asarray(steps_tried, float)
    _check(model, batch_tokens, target_loss, steps, run, tried)
    if offset_steps is not None:
        steps, tried = _without(offset_steps, steps, tried)

    rows: dict[tuple, tuple[float, float]] = {}
    for i, key in enumerate(zip(model, batch_tokens.tolist(), run, target_loss.tolist(), strict=True)):
        if key in rows:
            raise ValueError(
                f"row {i}: model {key[0]}, batch {key[1]:g} and target {key[3]:g} also have an earlier row; if these "
                "are two runs, name them in `run`"
            )
        rows[key] = float(steps[i]), float(tried[i])
    # Sorted, so that the resampled numbers don't depend on the order in which runs finished.
    runs = sorted({key[:3] for key in rows})
    targets = sorted({key[3] for key in rows}, reverse=True)
    runs_of = {name: [r for r, key in enumerate(runs) if key[0] == name] for name in dict.fromkeys(model)}
    width = max(len(members) for members in runs_of.values())

    fits = []
    for name, members in runs_of.items():
        padding = [0] * (width - len(members))
        for t, target in enumerate(targets):
            values = [rows.get((*runs[r], target)) for r in members]
            if all(value is None for value in values):
                continue
            measured, tried_here = np.array([value or (np.nan, np.nan) for value in values], float).T
            reached = np.isfinite(measured)
            bound = ~reached & np.isfinite(tried_here)
            log_steps = np.log(np.where(reached, measured, np.where(bound, tried_here, 1.0)))
            fits.append(
                (
                    name,
                    target,
                    [np.log(runs[r][1]) for r in members] + padding,
                    log_steps.tolist() + padding,
                    reached.tolist() + [False] * len(padding),
                    bound.tolist() + [False] * len(padding),
                    members + padding,
                    t,
                    sum(value is not None for value in values) - int(reached.sum()),
                )
            )
    models, *columns = zip(*fits, strict=True)
    return ScanTable(models, *(np.array(column) for column in columns))


def _without(offset_steps, steps, tried) -> tuple[np.ndarray, np.ndarray]:
    offset = np.asarray(offset_steps, float)
    if offset.shape != steps.shape:
        raise ValueError(f"offset_steps {offset.shape} must be as long as steps {steps.shape}")
    bad = np.flatnonzero(~(offset >= 0) | ~np.isfinite(offset) | (steps <= offset))
    if bad.size:
        raise ValueError(f"row {bad[0]}: offset_steps is {offset[bad[0]]:g}; must be at least 0 and below the steps")
    # A run that ended within its offset bounds nothing.
    return steps - offset, np.where(tried > offset, tried - offset, np.nan)


def _check(model, batch_tokens, target_loss, steps, run, tried):
    lengths = [len(model), *(x.shape for x in (batch_tokens, target_loss, steps)), len(run), tried.shape]
    if len(model) == 0 or any(length not in (len(model), (len(model),)) for length in lengths):
        raise ValueError(
            f"columns model, batch_tokens, target_loss, steps, run, steps_tried must be equally long, but are {lengths}"
        )
    for name, values in (("batch_tokens", batch_tokens), ("target_loss", target_loss)):
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if bad.size:
            raise ValueError(f"row {bad[0]}: {name} is {values[bad[0]]:g}; must be positive and finite")
    bad = np.flatnonzero(~(np.isnan(steps) | (np.isfinite(steps) & (steps > 0))))
    if bad.size:
        raise ValueError(
            f"row {bad[0]}: steps is {steps[bad[0]]:g}; must be positive, or NaN if the run didn't reach the target"
        )
    bad = np.flatnonzero(np.isnan(steps) & ~(np.isnan(tried) | (np.isfinite(tried) & (tried > 0))))
    if bad.size:
        raise ValueError(f"row {bad[0]}: steps_tried is {tried[bad[0]]:g}; must be positive, or NaN if unknown")
