"""The learning rate for a batch size, from the rates that a scan searched.

Between tested batches it is interpolated. Beyond them it grows as √B, Adam's rule (Malladi et al. 2022, arXiv
2205.10287), from the nearest tested batch.
"""

import math
from typing import NamedTuple

import numpy as np

from scaling_jax.results.table import Table


class Rate(NamedTuple):
    """A learning rate and where it comes from."""

    learning_rate: float
    source: str  # "tuned", "edge" (the best rate, but at the edge of those tried), "between", or "rule" (√B)


class Rates(NamedTuple):
    """The best learning rates of one model at one loss, by rising batch size in tokens."""

    batch_tokens: np.ndarray
    learning_rates: np.ndarray
    tuned: np.ndarray  # False: a better rate may lie beyond those tried

    def at(self, batch_tokens: float) -> Rate:
        """The rate for a batch size."""
        nearest = int(np.argmin(np.abs(np.log(self.batch_tokens / batch_tokens))))
        if math.isclose(self.batch_tokens[nearest], batch_tokens, rel_tol=1e-9):
            return Rate(float(self.learning_rates[nearest]), "tuned" if self.tuned[nearest] else "edge")
        if self.batch_tokens[0] < batch_tokens < self.batch_tokens[-1]:
            log_rate = np.interp(math.log(batch_tokens), np.log(self.batch_tokens), np.log(self.learning_rates))
            return Rate(math.exp(log_rate), "between")
        growth = batch_tokens / float(self.batch_tokens[nearest])
        return Rate(float(self.learning_rates[nearest]) * math.sqrt(growth), "rule")


def best_rates(table: Table, model: str, loss: float) -> Rates | None:
    """The best learning rates of a model's batch sizes at a loss; None if the table doesn't say them.

    Between two target losses the rate is interpolated in logs. Beyond those that a batch size reached, it is the one at
    the nearest. Of several seeds it is the geometric mean.
    """
    rows: dict[float, dict[float, list[tuple[float, bool]]]] = {}
    columns = (table.model, table.batch_tokens, table.target_loss, table.steps, table.learning_rate, table.tuned)
    for name, batch, target, steps, rate, tuned in zip(*columns, strict=True):
        if name == model and math.isfinite(steps) and math.isfinite(rate):
            rows.setdefault(batch, {}).setdefault(target, []).append((math.log(rate), tuned))
    if not rows:
        return None
    found = []
    for batch in sorted(rows):
        targets = sorted(rows[batch])
        log_rates = [np.mean([log_rate for log_rate, _ in rows[batch][target]]) for target in targets]
        nearest = min(targets, key=lambda target: abs(math.log(target / loss)))
        log_rate = np.interp(math.log(loss), np.log(targets), log_rates)
        found.append((batch, math.exp(log_rate), all(tuned for _, tuned in rows[batch][nearest])))
    batches, rates, tuned_at = zip(*found, strict=True)
    return Rates(np.array(batches), np.array(rates), np.array(tuned_at))
