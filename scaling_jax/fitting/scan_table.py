"""A long table of measurements as padded arrays: one row per model and target loss, its runs along the last axis.

Dimension letters: G rows, each a fit (model, target loss); n runs of the model with most runs; R runs of all models; T
target losses of all models.
"""

from collections.abc import Iterable
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

    @property
    def num_runs(self) -> int:
        return int(self.run_index.max()) + 1

    def rows_of_models(self) -> list[np.ndarray]:
        """The rows of each model. In all of them, a column is the same run."""
        rows: dict[str, list[int]] = {}
        for g, model in enumerate(self.models):
            rows.setdefault(model, []).append(g)
        return [np.array(own) for own in rows.values()]

    def sum_over_runs(self, values: np.ndarray, others: np.ndarray) -> np.ndarray:
        """`[T, T]`: sum over runs of `values` at a target times `others` at another; both `[G, n]`."""
        return self._by_targets(values[rows] @ others[rows].T for rows in self.rows_of_models())

    def degrees_of_freedom(self, fitted: np.ndarray) -> np.ndarray:
        """`[T, T]`: expected sum over runs of the product of residuals at two targets, for an error covariance of 1.

        Args:
          fitted: `[G, n, k]`, orthonormal columns that span what the fit of a row takes out of its errors; zero where
            nothing was measured.
        """

        def of_model(rows: np.ndarray) -> np.ndarray:
            inside, own = self.mask[rows].astype(float), fitted[rows]
            taken = inside @ (own**2).sum(-1).T
            flat = np.moveaxis(own, -1, 1).reshape(-1, own.shape[1])
            shared = ((flat @ flat.T) ** 2).reshape(2 * (len(rows), own.shape[-1])).sum((1, 3))
            return inside @ inside.T - taken - taken.T + shared

        return self._by_targets(map(of_model, self.rows_of_models()))

    def _by_targets(self, blocks: Iterable[np.ndarray]) -> np.ndarray:
        num_targets = self.target_index.max() + 1
        total = np.zeros((num_targets, num_targets))
        for rows, block in zip(self.rows_of_models(), blocks, strict=True):
            total[self.targets_of(rows)] += block
        return total

    def targets_of(self, rows: np.ndarray) -> tuple[np.ndarray, ...]:
        """Index of the block of `[T, T]` that belongs to the rows of a model."""
        return np.ix_(self.target_index[rows], self.target_index[rows])


def covariance_of(table: ScanTable, influence, errors, freedom) -> np.ndarray:
    """Covariance `[k, k]` of numbers that errors move by `influence` `[k, G, n]`.

    Args:
      errors: `[G, n]`, residuals; zero where nothing was measured, as `influence` is.
      freedom: `[T, T]`, see `ScanTable.degrees_of_freedom`.
    """
    product = table.sum_over_runs(errors, errors) / np.maximum(freedom, 1.0)
    total = np.zeros((len(influence), len(influence)))
    for rows in table.rows_of_models():
        own = influence[:, rows]
        total += (product[table.targets_of(rows)] @ own).reshape(len(own), -1) @ own.reshape(len(own), -1).T
    return total


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
