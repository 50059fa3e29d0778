"""A long table of measurements as padded arrays: a fit for each model and target loss, the runs along the last axis.

Dimension letters: G fits (model, target loss); n runs of the model that has most; R runs of all models; T target
losses of all models.
"""

from typing import NamedTuple

import numpy as np


class ScanTable(NamedTuple):
    """Natural logs of tokens and steps; where `mask` is False the other entries are fillers."""

    models: tuple[str, ...]  # of each fit, `[G]`
    losses: np.ndarray  # `[G]`, nats per token
    log_batch: np.ndarray  # `[G, n]`
    log_steps: np.ndarray  # `[G, n]`, a lower bound of them where `bound` is True
    mask: np.ndarray  # `[G, n]`, True where the run reached the target
    bound: np.ndarray  # `[G, n]`, True where it is known how many steps were not enough
    run_index: np.ndarray  # `[G, n]`, in 0..R-1
    target_index: np.ndarray  # `[G]`, in 0..T-1
    not_reached: np.ndarray  # `[G]`, runs of the model that were measured and didn't reach the target

    def select(self, keep: np.ndarray) -> "ScanTable":
        """The fits where `keep`, `[G]`, is True."""
        models = tuple(model for model, kept in zip(self.models, keep, strict=True) if kept)
        return ScanTable(models, *(field[keep] for field in self[1:]))


def scan_table(model, batch_tokens, target_loss, steps, run=None, steps_tried=None) -> ScanTable:
    """Checks the columns of a long table and lays them out; `fit_scan` says what they hold."""
    model = [str(name) for name in model]
    batch_tokens, target_loss, steps = (np.asarray(x, float) for x in (batch_tokens, target_loss, steps))
    run = [""] * len(model) if run is None else [str(name) for name in run]
    tried = np.full(len(model), np.nan) if steps_tried is None else np.asarray(steps_tried, float)
    _check(model, batch_tokens, target_loss, steps, run, tried)

    rows: dict[tuple, tuple[float, float]] = {}
    for i, key in enumerate(zip(model, batch_tokens.tolist(), run, target_loss.tolist(), strict=True)):
        if key in rows:
            raise ValueError(
                f"row {i}: model {key[0]}, batch {key[1]:g} and target {key[3]:g} came before; tell runs apart by `run`"
            )
        rows[key] = float(steps[i]), float(tried[i])
    # Sorted, so that the order in which runs finished doesn't change the resampled numbers.
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


def _check(model, batch_tokens, target_loss, steps, run, tried):
    lengths = [len(model), *(x.shape for x in (batch_tokens, target_loss, steps)), len(run), tried.shape]
    if len(model) == 0 or any(length not in (len(model), (len(model),)) for length in lengths):
        raise ValueError(
            f"columns model, batch_tokens, target_loss, steps, run, steps_tried should be equally long; got {lengths}"
        )
    for name, values in (("batch_tokens", batch_tokens), ("target_loss", target_loss)):
        bad = np.flatnonzero(~(np.isfinite(values) & (values > 0)))
        if bad.size:
            raise ValueError(f"row {bad[0]}: {name} is {values[bad[0]]:g}; should be positive and finite")
    bad = np.flatnonzero(~(np.isnan(steps) | (np.isfinite(steps) & (steps > 0))))
    if bad.size:
        raise ValueError(
            f"row {bad[0]}: steps is {steps[bad[0]]:g}; should be positive, or NaN for a target not reached"
        )
    bad = np.flatnonzero(np.isnan(steps) & ~(np.isnan(tried) | (np.isfinite(tried) & (tried > 0))))
    if bad.size:
        raise ValueError(f"row {bad[0]}: steps_tried is {tried[bad[0]]:g}; should be positive, or NaN if unknown")
