"""Advice for a run on a given number of tokens: batch size, learning rate, weight decay, steps and time.

From a table of budgets it is B_opt(D), the batch of the least loss. From a scan it is B_crit(D_min), the batch at which
twice the fewest tokens are needed: another quantity, and larger. Both laws go far outside what was measured here; how
far is told.
"""

import dataclasses
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import optimize

from scaling_jax.advice.choices import Hardware
from scaling_jax.advice.rates import best_rates
from scaling_jax.fitting import BudgetFit, BudgetLaw
from scaling_jax.fitting.published_laws import of_kind
from scaling_jax.io import UserError
from scaling_jax.results.budget_table import fit_budget_table, is_budget_table
from scaling_jax.results.results import check_measurements
from scaling_jax.results.runs import check_runs
from scaling_jax.results.table import fit_table

FLOPS_PER_PARAMETER = 6  # per token, forward and backward (Kaplan et al. 2020)
FAR = 10.0  # times outside the measured budgets, beyond which a law's interval says little


class HorizonChoice(NamedTuple):
    """What one batch size means for the run."""

    batch_tokens: float
    steps: float
    cost: float  # from budgets: loss above the best, nats per token; from a scan: share of the tokens lost; NaN unknown
    learning_rate: float  # NaN unknown
    weight_decay: float  # NaN without that of the runs
    seconds: float  # NaN without hardware


class Published(NamedTuple):
    """The answer of a published law for the same quantity."""

    key: str
    batch_tokens: float
    outside: bool  # outside the range that the authors measured, or that range is unknown


@dataclasses.dataclass(frozen=True, eq=False)
class HorizonAdvice:
    """What `scaling-jax advise --tokens` prints."""

    tokens: float
    model: str | None  # None for a law through all models
    quantity: str  # "B_opt" or "B_crit"
    batch: float  # tokens
    interval: tuple[float, float]
    law: str  # in words
    measured: tuple[float, float]  # range of tokens in which the law was measured
    rows: tuple[HorizonChoice, ...]
    hardware: Hardware | None
    published: tuple[Published, ...]
    notes: tuple[str, ...]

    @property
    def outside(self) -> float:
        """How many times the tokens lie outside the measured range; 1 inside."""
        low, high = self.measured
        return max(self.tokens / high, low / self.tokens, 1.0)


def advise_tokens(
    results: Path,
    tokens: float,
    *,
    model: str | None = None,
    hardware: Hardware | None = None,
    weight_decay: float | None = None,
) -> HorizonAdvice:
    """Advice for a run on `tokens` tokens.

    Args:
      results: a CSV table of budgets, a CSV table of steps to losses, or a results folder after `scaling-jax fit`.
      tokens: D, of the whole run.
      model: whose law to take; None takes the one through all models.
      hardware: for wall times.
      weight_decay: of the runs, AdamW's; its timescale B/(ηλD) is kept (Bergsma et al. 2025, arXiv 2505.13738).

    Raises:
      UserError: if there is no law to answer with. Says what is missing.
    """
    check_horizon(tokens, weight_decay)
    path = results / "measurements.csv" if results.is_dir() else results
    if not path.exists():
        raise UserError(f"there is no {path}: give a results folder after `scaling-jax fit`, or a CSV table")
    if is_budget_table(path):
        return _from_budgets(path, tokens, model, hardware, weight_decay)
    if results.is_dir():
        check_runs(results)
        check_measurements(results)
    return _from_scan(path, tokens, model, hardware, weight_decay)


def check_horizon(tokens: float, weight_decay: float | None) -> None:
    """Raises UserError unless both are positive and finite; there may be no weight decay."""
    if not 0 < tokens < math.inf:
        raise UserError(f"--tokens {tokens:g} must be positive and finite")
    if weight_decay is not None and not 0 < weight_decay < math.inf:
        raise UserError(f"--weight-decay {weight_decay:g} must be positive and finite")


def tokens_of(flops: float, num_params: float | None) -> float:
    """The tokens of a compute budget, C/(6·N).

    Raises:
      UserError: if the number of parameters isn't given.
    """
    if num_params is None:
        raise UserError("--flops needs --params, the model's number of parameters: tokens = FLOPs/(6·N)")
    if not (0 < flops < math.inf and 0 < num_params < math.inf):
        raise UserError(f"--flops {flops:g} and --params {num_params:g} must be positive and finite")
    return flops / (FLOPS_PER_PARAMETER * num_params)


class Reference(NamedTuple):
    """A run whose weight decay is known, for AdamW's timescale."""

    batch_tokens: float
    tokens: float
    learning_rate: float


def _from_budgets(path: Path, tokens, model, hardware, weight_decay) -> HorizonAdvice:
    fit = fit_budget_table(path).fit
    law = _budget_law(fit, model, path)
    notes = list(fit.notes)
    batch = float(law(tokens))
    low, high = (float(end) for end in law.band(tokens))
    budgets = [b for b in fit.budgets if b.kind == "U-shaped" and model in (None, b.model)]
    nearest = min(budgets, key=lambda b: (abs(math.log(b.tokens / tokens)), b.model))
    rate = _rate_law(fit, model)
    reference = Reference(nearest.b_opt, nearest.tokens, rate(nearest.b_opt, nearest.tokens))
    rows = []
    for size in around(batch):
        row = choice(size, tokens, rate(size, tokens), hardware, weight_decay, reference)
        rows.append(row._replace(cost=nearest.penalty_at(size * nearest.b_opt / batch)[0]))
    notes.append(f"the loss of other batches is that of {nearest.tokens:.3g} tokens, at the same share of B_opt")
    exponents = law.exponent_interval
    return HorizonAdvice(
        tokens=tokens,
        model=model,
        quantity="B_opt",
        batch=batch,
        interval=(low, high),
        law=f"B_opt ∝ D^{law.exponent:.2f} [{exponents[0]:.2f}, {exponents[1]:.2f}]",
        measured=law.valid_range,
        rows=tuple(rows),
        hardware=hardware,
        published=published_answers("B_opt", "training data D", tokens),
        notes=tuple(notes + rate_notes(rows, weight_decay)),
    )


def _budget_law(fit: BudgetFit, model: str | None, path: Path) -> BudgetLaw:
    if model is not None and model not in fit.models:
        raise UserError(f"{path} has no model {model!r}: choose from {', '.join(fit.models)}")
    law = fit.law if model is None else fit.laws.get(model)
    if law is None:
        whose = "" if model is None else f" of {model}"
        raise UserError(f"{path}: there is no law B_opt(D){whose}, it takes three budgets with a best batch inside")
    return law


def _rate_law(fit: BudgetFit, model: str | None):
    """(batch, tokens) -> best learning rate: a plane through the logs of those of the runs near their best batch."""
    rows = [
        (1.0, math.log(batch), math.log(b.tokens), math.log(rate))
        for b in fit.budgets
        if model in (None, b.model) and b.curve is not None
        for batch, rate, edge in zip(b.runs.batch_tokens, b.runs.learning_rate, b.runs.at_edge, strict=True)
        if math.isfinite(rate) and not edge and b.batch_range[0] <= batch <= b.batch_range[1]
    ]
    if len(rows) < 4:
        return lambda batch, tokens: math.nan
    *design, log_rates = np.array(rows).T
    coefficients = np.linalg.lstsq(np.array(design).T, log_rates, rcond=None)[0]
    return lambda batch, tokens: float(np.exp(coefficients @ [1.0, math.log(batch), math.log(tokens)]))


def _from_scan(path: Path, tokens, model, hardware, weight_decay) -> HorizonAdvice:
    found = fit_table(path)
    if model is not None and model not in found.table.model:
        raise UserError(f"{path} has no model {model!r}: choose from {', '.join(dict.fromkeys(found.table.model))}")
    law = next((form for form in found.forms if form.form == "data"), None)
    if law is None:
        raise UserError(
            f"{path}: there is no law of B_crit in data, so it can't say a batch for {tokens:.3g} tokens: scan more "
            "batch sizes and losses, or give a table with columns model, batch_tokens, tokens, loss"
        )
    middle = math.sqrt(math.prod(law.valid_range))
    least = least_data(law, tokens)
    batch = float(law(least))
    exponents = law.exponent_interval or (law.exponent, law.exponent)
    ends = [batch * (least / middle) ** (e - law.exponent) for e in exponents]
    points = [point for point in found.fit.points if point.in_law and model in (None, point.model)]
    lowest = min(points, key=lambda point: point.loss)
    rates = best_rates(found.table, lowest.model, lowest.loss)
    reference = None
    if rates is not None:
        e_min = lowest.s_min * lowest.b_crit
        reference = Reference(lowest.b_crit, 2 * e_min, rates.at(lowest.b_crit).learning_rate)
    rows = []
    for size in around(batch):
        rate = math.nan if rates is None else rates.at(size).learning_rate
        row = choice(size, tokens, rate, hardware, weight_decay, reference)
        rows.append(row._replace(cost=1 - least_data(law, tokens, size) / tokens))
    notes = [*found.notes, *rate_notes(rows, weight_decay)]
    if rates is not None:
        notes.append(f"learning rates are those of {lowest.model} at loss {lowest.loss:.4g}, beyond its batches as √B")
    return HorizonAdvice(
        tokens=tokens,
        model=None,
        quantity="B_crit",
        batch=batch,
        interval=(min(ends), max(ends)),
        law=f"B_crit ∝ D_min^{law.exponent:.2f} [{exponents[0]:.2f}, {exponents[1]:.2f}], of all models",
        measured=(2 * law.valid_range[0], 2 * law.valid_range[1]),  # tokens of runs at B_crit
        rows=tuple(rows),
        hardware=hardware,
        published=published_answers("B_crit", "least data D_min", least),
        notes=tuple(notes),
    )


def least_data(law: Callable[[float], float], tokens: float, batch: float | None = None) -> float:
    """D_min of a run of `tokens` at a batch, from D = D_min·(1 + B/B_crit(D_min)); at B_crit itself, D/2."""
    if batch is None:
        return tokens / 2

    def excess(log_least: float) -> float:
        least = math.exp(log_least)
        return math.log(least * (1 + batch / float(law(least))) / tokens)

    low = math.log(tokens) - 60.0
    return math.exp(optimize.brentq(excess, low, math.log(tokens))) if excess(low) < 0 else math.nan


def choice(batch, tokens, rate, hardware, weight_decay, reference: Reference | None) -> HorizonChoice:
    """What a batch size means, without its cost."""
    steps = tokens / batch
    decay = math.nan
    if weight_decay is not None and reference is not None and math.isfinite(rate):
        kept = reference.batch_tokens / (reference.learning_rate * weight_decay * reference.tokens)  # AdamW's timescale
        decay = batch / (rate * kept * tokens)
    seconds = math.nan if hardware is None else hardware.seconds(batch, steps)
    return HorizonChoice(batch, steps, math.nan, rate, decay, seconds)


def around(batch: float) -> tuple[int, ...]:
    """Powers of two from a quarter of a batch to four times it."""
    middle = max(round(math.log2(batch)), 2)
    return tuple(2**k for k in range(middle - 2, middle + 3))


def published_answers(quantity: str, variable: str, value: float) -> tuple[Published, ...]:
    """The published laws of the quantity that take the same variable."""
    found = []
    for law in of_kind(quantity):
        if law.variable.startswith(variable) and law.constant is not None:
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                found.append(Published(law.key, float(law(value)), bool(told)))
    return tuple(found)


def rate_notes(rows: list[HorizonChoice], weight_decay: float | None) -> list[str]:
    """What the reader must know of learning rates and weight decay."""
    known = any(math.isfinite(row.learning_rate) for row in rows)
    if not known:
        return ["the table knows no learning rates: search the rate at the batch that you take"]
    if weight_decay is None:
        return ["AdamW: --weight-decay, that of your runs, tells the one that keeps its timescale B/(ηλD)"]
    return ["weight decay keeps AdamW's timescale B/(ηλD), in whole runs (Bergsma et al. 2025)"]
