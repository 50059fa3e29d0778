"""The best batch size at each budget, from losses of runs that trained on the same tokens with different batches.

B_opt is the batch of the least loss after D tokens. B_crit is another quantity: it compares runs to one loss. B_opt is
read off a smooth curve through the losses (`smooth`), not from the best batch of those tried.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Literal

import numpy as np
from scipy import special

from scaling_jax.fitting.best_rate import BestLosses, best_losses
from scaling_jax.fitting.budget_law import MISFIT, BudgetLaw, fit_budget_law
from scaling_jax.fitting.smooth import Curve, Losses, roughness_of

Kind = Literal["U-shaped", "rising", "falling", "flat", "too few"]
FEWEST_BATCHES = 4
NEAR = 7  # batches with the lowest losses always enter a curve;
FAR = 0.02  # others do up to this rise of the loss, as a share: farther up they say nothing of the minimum
_FEWEST_FREEDOM = 6  # degrees of freedom of the curves, below which runs at one batch size help to judge the noise


@dataclasses.dataclass(frozen=True, eq=False)
class Budget:
    """The runs of one model on one number of tokens. Batches are in tokens, losses in nats per token."""

    model: str
    tokens: float  # D
    runs: BestLosses  # at each batch size
    kind: Kind  # rising: the smallest batch is the best of those tried, as far as can be told; falling: the largest
    b_opt: float  # NaN unless U-shaped
    b_opt_interval: tuple[float, float]  # 0 or infinity at an end that the losses don't bound
    loss: float  # of the curve at its lowest point; NaN with too few batches
    confidence: float
    curve: Curve | None = dataclasses.field(repr=False)  # None with too few batches

    @property
    def best_batch(self) -> float:
        """The batch of the curve's lowest point, which may be at an end; the best of those tried with too few."""
        if self.curve is None:
            return float(self.runs.batch_tokens[np.argmin(self.runs.loss)])
        return self.b_opt if self.kind == "U-shaped" else float(np.exp(self.curve.grid[self.curve.lowest]))

    @property
    def batch_range(self) -> tuple[float, float]:
        """Smallest and largest batch that the curve goes through."""
        ends = self.runs.batch_tokens if self.curve is None else np.exp(self.curve.x)
        return float(ends[0]), float(ends[-1])

    def loss_at(self, batch_tokens) -> np.ndarray:
        """The curve at batches inside `batch_range`; NaN outside."""
        if self.curve is None:
            return np.full(np.shape(batch_tokens), math.nan)
        x = np.log(np.asarray(batch_tokens, float))
        inside = (x >= self.curve.x[0] - 1e-9) & (x <= self.curve.x[-1] + 1e-9)
        return np.where(inside, self.curve.at(x.ravel()).reshape(x.shape), math.nan)

    def penalty_at(self, batch_tokens: float) -> tuple[float, float, float]:
        """(loss above that of the best batch, low, high) in nats per token; NaN outside `batch_range`."""
        x = math.log(batch_tokens)
        if self.curve is None or not self.curve.x[0] - 1e-9 <= x <= self.curve.x[-1] + 1e-9:
            return math.nan, math.nan, math.nan
        value, low, high = (max(float(x[0]), 0.0) for x in self._penalties(np.array([batch_tokens])))
        return value, low, high

    def largest_within(self, penalty: float) -> tuple[float, float, float]:
        """(largest batch whose loss is at most `penalty` nats above the best, low, high) in tokens.

        Infinite where no batch of `batch_range` is above it; NaN with too few batches.
        """
        if self.curve is None:
            return math.nan, math.nan, math.nan
        batches = np.exp(np.linspace(math.log(self.best_batch), self.curve.x[-1], 120))
        columns = np.maximum.accumulate(self._penalties(batches), axis=1)
        value, high, low = (_first_above(batches, column, penalty) for column in columns)  # a low penalty goes far
        return value, low, high

    def _penalties(self, batches: np.ndarray) -> np.ndarray:
        """`[3, batches]`: penalty, low, high."""
        assert self.curve is not None
        found = self.curve.above(np.log(batches), math.log(self.best_batch))
        value = sum(weight * d for weight, d, _ in found)
        error = np.sqrt(sum(w * (e**2 + (d - value) ** 2) for w, d, e in found))
        half = special.stdtrit(self.curve.freedom, 0.5 + self.confidence / 2) * error
        return np.stack([value, value - half, value + half])

    def rate_at(self, batch_tokens: float) -> float:
        """The best learning rate at a batch, between those of tried batches in logs; beyond them as √B; NaN unknown."""
        known = np.isfinite(self.runs.learning_rate)
        if not known.any():
            return math.nan
        x, y = np.log(self.runs.batch_tokens[known]), np.log(self.runs.learning_rate[known])
        at = math.log(batch_tokens)
        beyond = at - min(max(at, x[0]), x[-1])
        return float(np.exp(np.interp(at, x, y) + 0.5 * beyond))


@dataclasses.dataclass(frozen=True, eq=False)
class BudgetFit:
    """The best batch at every budget, and the law through them."""

    budgets: tuple[Budget, ...]  # by model in order of appearance, then by rising tokens
    law: BudgetLaw | None  # through all models; None unless three budgets are U-shaped
    laws: dict[str, BudgetLaw]  # of each model that has three such budgets
    notes: tuple[str, ...]
    confidence: float
    noise: float  # standard deviation of a run's loss, nats per token; NaN if no budget has enough batches

    @functools.cached_property
    def models(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(budget.model for budget in self.budgets))


def fit_budget(
    model, batch_tokens, tokens, loss, learning_rate=None, *, run=None, confidence: float = 0.95
) -> BudgetFit:
    """Finds the best batch size at each budget, and the law B_opt(D).

    The arguments are the columns of a table with a row for each run. A run that several learning rates have is judged
    at the best one, between those tried.

    Args:
      model: `[runs]`, names.
      batch_tokens: `[runs]`, tokens per step.
      tokens: `[runs]`, tokens of the whole run, D.
      loss: `[runs]`, nats per token at the end of the run; NaN if it diverged.
      learning_rate: `[runs]`; None, or NaN, if it is unknown or tuned already.
      run: `[runs]`, seeds or names, which tell runs with the same settings apart.
      confidence: of the intervals.

    Raises:
      ValueError: for columns of unequal length, or values that aren't positive.
    """
    model = np.asarray(model, dtype=object)
    rates = np.full(model.shape, math.nan) if learning_rate is None else learning_rate
    columns = [np.asarray(column, float) for column in (batch_tokens, tokens, loss, rates)]
    _check(model, columns, run, confidence)
    grouped = list(_grouped(model, *columns))
    judged = [(name, d, runs, _near(runs)) for name, d, runs in grouped]
    curves = [losses for *_, losses in judged if losses is not None]
    found: list[Budget] = []
    noise = math.nan
    if curves:
        roughness, freedom = _roughness(curves, [runs for *_, runs in grouped])
        noise = math.sqrt(sum(r.weight * r.variance for r in roughness))
    for name, d, runs, losses in judged:
        curve = None if losses is None else Curve(losses, roughness, freedom)
        found.append(_budget(name, d, runs, curve, confidence))
    names = dict.fromkeys(budget.model for budget in found)
    laws = {name: law for name in names if (law := _law([b for b in found if b.model == name], confidence))}
    law = _law(found, confidence) if len(names) > 1 else laws.get(next(iter(names)))
    return BudgetFit(tuple(found), law, laws, tuple(_notes(found, law, len(names))), confidence, noise)


def _grouped(model, batch_tokens, tokens, loss, rates) -> Iterator[tuple[str, float, BestLosses]]:
    """(model, tokens, losses) of each budget."""
    finite = np.isfinite(loss)
    for name in dict.fromkeys(model):
        for d in np.unique(tokens[model == name]):
            rows = (model == name) & (tokens == d) & finite
            if rows.any():
                yield name, float(d), best_losses(batch_tokens[rows], loss[rows], rates[rows])


def _near(runs: BestLosses) -> Losses | None:
    """The losses that a curve goes through; None with too few batches."""
    if len(runs.loss) < FEWEST_BATCHES:
        return None
    nearest = np.sort(runs.loss)[:NEAR]
    kept = np.flatnonzero(runs.loss <= max(nearest[-1], nearest[0] * (1 + FAR)))
    return Losses(np.log(runs.batch_tokens[kept]), runs.loss[kept], runs.covariance[np.ix_(kept, kept)])


def _roughness(curves: list[Losses], runs: list[BestLosses]):
    freedom = sum(len(c.x) - 3 for c in curves)
    if freedom >= _FEWEST_FREEDOM:
        return roughness_of(curves)
    return roughness_of(curves, sum(r.rss for r in runs), sum(r.freedom for r in runs))


def _budget(name: str, tokens: float, runs: BestLosses, curve: Curve | None, confidence: float) -> Budget:
    if curve is None:
        return Budget(name, tokens, runs, "too few", math.nan, (0.0, math.inf), math.nan, confidence, None)
    best, low, high = curve.minimum(confidence)
    kinds: dict[tuple[bool, bool], Kind] = {
        (True, True): "U-shaped",
        (False, True): "rising",
        (True, False): "falling",
        (False, False): "flat",
    }
    kind = kinds[low > -math.inf, high < math.inf]
    return Budget(
        model=name,
        tokens=tokens,
        runs=runs,
        kind=kind,
        b_opt=math.exp(best) if kind == "U-shaped" else math.nan,
        b_opt_interval=(math.exp(low), math.exp(high)),
        loss=float(curve.values[curve.lowest]),
        confidence=confidence,
        curve=curve,
    )


def _law(budgets: list[Budget], confidence: float) -> BudgetLaw | None:
    used = [b for b in budgets if b.curve is not None and b.kind != "flat"]
    if not used:
        return None
    curves = [b.curve for b in used if b.curve is not None]
    tokens, bounded = np.array([(b.tokens, b.kind == "U-shaped") for b in used]).T
    return fit_budget_law(curves, tokens, bounded > 0, confidence)


def _notes(budgets: list[Budget], law: BudgetLaw | None, models: int) -> Iterator[str]:
    """What the reader should know: which budgets have no best batch, and why there is no law."""
    kinds: list[str] = [b.kind for b in budgets]
    of = len(budgets)
    u_shaped = kinds.count("U-shaped")
    if u_shaped:
        yield (
            f"at {u_shaped} of {of} budgets the loss has a minimum between the batches: there B_crit isn't defined, as "
            "it needs small batches to be the best; B_opt is"
        )
    for kind, end, way in (("rising", "smallest", "smaller"), ("falling", "largest", "larger")):
        if kinds.count(kind):
            yield (
                f"at {kinds.count(kind)} of {of} budgets B_opt has only a bound: it may be the {end} batch that was "
                f"tried, or beyond. Add {way} batches"
            )
    if kinds.count("rising") > 1 and not u_shaped and "falling" not in kinds:
        yield "if small batches are the best, B_crit is well posed: fit --to-steps finds it from several budgets"
    if "flat" in kinds:
        yield f"at {kinds.count('flat')} of {of} budgets the losses tell no batch from another: add batches or seeds"
    if "too few" in kinds:
        yield f"at {kinds.count('too few')} of {of} budgets there are fewer than {FEWEST_BATCHES} batch sizes: add some"
    edges = sum(int(b.runs.at_edge.sum()) for b in budgets)
    if edges:
        yield (
            f"at {edges} of {sum(len(b.runs.loss) for b in budgets)} batches the best learning rate is at the edge of "
            "those tried. A better one may lie beyond, and lower the loss there"
        )
    if law is None:
        yield f"no law: fewer than three budgets have a best batch inside those tried ({u_shaped} of {of} do)"
        return
    if law.misfit_p < MISFIT:
        yield (
            f"the budgets don't follow one power law (p = {law.misfit_p:.2g}): its interval is as wide as they scatter"
            + "; use each model's own" * (models > 1)
        )
    if models > 1 and len({b.model for b in budgets}) == of:
        yield "each model has one budget: the law can't tell tokens from model size"


def _first_above(batches: np.ndarray, penalties: np.ndarray, limit: float) -> float:
    """The batch at which rising penalties pass a limit; infinity if they don't."""
    above = np.flatnonzero(penalties > limit)
    if not above.size:
        return math.inf
    k = int(above[0])
    if k == 0:
        return float(batches[0])
    share = (limit - penalties[k - 1]) / (penalties[k] - penalties[k - 1])
    return float(batches[k - 1] * (batches[k] / batches[k - 1]) ** share)


def _check(model, listed, run, confidence) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; must be between 0 and 1")
    for name, values in zip(("batch_tokens", "tokens", "loss", "learning_rate"), listed, strict=True):
        if values.shape != model.shape or values.ndim != 1:
            raise ValueError(f"model {model.shape} and {name} {values.shape} must be lists of equal length")
        may_miss = name in ("loss", "learning_rate")
        bad = np.flatnonzero(~((np.isfinite(values) & (values > 0)) | (may_miss & np.isnan(values))))
        if bad.size:
            raise ValueError(f"{name}[{bad[0]}] is {values[bad[0]]:g}; must be positive and finite")
    if run is not None and np.shape(run) != model.shape:
        raise ValueError(f"model {model.shape} and run {np.shape(run)} must be lists of equal length")
    if not np.isfinite(listed[2]).any():
        raise ValueError("no run has a finite loss: give at least one")
