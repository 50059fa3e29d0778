"""What it takes one model to reach one loss, read off its fitted trade-offs and never beyond them unasked."""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from scaling_jax.fitting import CriticalBatch, ScanFit
from scaling_jax.io import UserError

NEAREST = 4  # points that an extrapolated S_min goes on from


@dataclasses.dataclass(frozen=True, eq=False)
class Goal:
    """A loss and the trade-off there: S_min in steps, E_min and B_crit in tokens."""

    model: str
    loss: float  # nats per token
    s_min: float
    e_min: float
    b_crit: float  # e_min/s_min
    b_crit_interval: tuple[float, float]
    law_b_crit: float | None  # by the law through all models and losses; None if there is none
    law_interval: tuple[float, float] | None
    batch_range: tuple[float, float]  # smallest and largest batch that was run, tokens
    extrapolated: bool  # True: outside of the losses measured, S_min by a straight line, B_crit by the law
    neighbours: tuple[tuple[float, CriticalBatch], ...] = dataclasses.field(repr=False)  # weights and points

    def steps(self, batch_tokens):
        """S_min·(1 + B_crit/B)."""
        return self.s_min * (1.0 + self.b_crit / np.asarray(batch_tokens, float))

    def tokens(self, batch_tokens):
        """E_min·(1 + B/B_crit)."""
        return self.e_min * (1.0 + np.asarray(batch_tokens, float) / self.b_crit)

    def steps_interval(self, batch_tokens) -> tuple[np.ndarray, np.ndarray]:
        """Ends of the interval of `steps`; unknown, so 0 and infinity, where the goal is extrapolated."""
        steps = self.steps(batch_tokens)
        if self.extrapolated:
            return np.zeros_like(steps), np.full_like(steps, np.inf)
        below, above = np.zeros_like(steps), np.zeros_like(steps)
        for weight, point in self.neighbours:
            low, high = point.tradeoff.steps_interval(batch_tokens)
            middle = point.tradeoff.steps_at(batch_tokens)
            below, above = below + weight * np.log(low / middle), above + weight * np.log(high / middle)
        return steps * np.exp(below), steps * np.exp(above)


def models_of(fit: ScanFit) -> tuple[str, ...]:
    """Models with a trade-off to advise from, the one that got to the lowest loss first."""
    lowest: dict[str, float] = {}
    for point in _usable(fit.points):
        lowest[point.model] = min(point.loss, lowest.get(point.model, math.inf))
    return tuple(sorted(lowest, key=lambda model: lowest[model]))


def losses_of(fit: ScanFit, model: str) -> tuple[float, float]:
    """Lowest and highest loss at which batches lie on both sides of the model's B_crit.

    Raises:
      UserError: if there is no such loss.
    """
    losses = [point.loss for point in _points(fit, model)]
    return min(losses), max(losses)


def goal(fit: ScanFit, loss: float, model: str | None = None, *, extrapolate: bool = False) -> Goal:
    """The trade-off at a loss, log-linear between the neighbouring target losses of the scan.

    Args:
      fit: of a scan.
      loss: to be reached, nats per token.
      model: whose steps are asked for; by default the one that got to the lowest loss.
      extrapolate: allow losses that no trade-off was measured at.

    Raises:
      UserError: for a model that isn't there, or a loss outside of the range measured unless `extrapolate`.
    """
    if not (math.isfinite(loss) and loss > 0):
        raise UserError(f"target loss {loss:g}: give a positive loss in nats per token")
    if model is None:
        model = next(iter(models_of(fit)), "")
    points = sorted(_points(fit, model), key=lambda point: -point.loss)
    low, high = points[-1].loss, points[0].loss
    inside = low * (1 - 1e-9) <= loss <= high * (1 + 1e-9)
    if not inside and not (extrapolate and fit.law and len(points) >= 2):
        way_out = "pass --extrapolate to go on without measurements" if fit.law else "there is no law to extrapolate by"
        raise UserError(
            f"loss {loss:g} is outside of {low:g} to {high:g}, where model {model} was measured with batches on both "
            f"sides of B_crit: choose one inside, measure there, or {way_out}"
        )
    neighbours = _neighbours(points, loss) if inside else ()
    if inside:
        log_s_min = sum(w * math.log(p.tradeoff.s_min) for w, p in neighbours)
        log_e_min = sum(w * math.log(p.tradeoff.e_min) for w, p in neighbours)
        interval = tuple(
            math.exp(sum(w * math.log(p.tradeoff.b_crit_interval[end]) for w, p in neighbours)) for end in (0, 1)
        )
    else:
        assert fit.law is not None
        nearest = points[-NEAREST:] if loss < low else points[:NEAREST]
        x, y = np.log([[p.loss, p.tradeoff.s_min] for p in nearest]).T
        log_s_min = float(np.polyval(np.polyfit(x, y, 1), math.log(loss)))
        log_e_min = log_s_min + math.log(fit.law(loss))
        interval = tuple(float(end) for end in fit.band(loss))
    batches = np.concatenate([point.tradeoff.batch_tokens for point in points])
    return Goal(
        model=model,
        loss=loss,
        s_min=math.exp(log_s_min),
        e_min=math.exp(log_e_min),
        b_crit=math.exp(log_e_min - log_s_min),
        b_crit_interval=(interval[0], interval[1]),
        law_b_crit=float(fit.law(loss)) if fit.law else None,
        law_interval=(float(fit.band(loss)[0]), float(fit.band(loss)[1])) if fit.law else None,
        batch_range=(float(batches.min()), float(batches.max())),
        extrapolated=not inside,
        neighbours=neighbours,
    )


def _usable(points) -> list[CriticalBatch]:
    return [point for point in points if point.in_law and not point.tradeoff.one_sided]


def _points(fit: ScanFit, model: str) -> list[CriticalBatch]:
    points = [point for point in _usable(fit.points) if point.model == model]
    if points:
        return points
    there = models_of(fit)
    one_sided = [point for point in fit.points if point.model == model or not there]
    others = f"choose from {', '.join(there)}" if there else ""
    if not fit.points:
        raise UserError(
            "no loss has steps at three batch sizes, so no trade-off: give more batches for the same losses"
        )
    if not one_sided:
        raise UserError(f"no trade-off of a model {model!r} to advise from: {others}")
    losses = [point.loss for point in one_sided]
    batches = np.concatenate([point.tradeoff.batch_tokens for point in one_sided])
    middle = math.sqrt(batches.min() * batches.max())
    missing = "smaller" if np.median([point.tradeoff.b_crit for point in one_sided]) < middle else "larger"
    raise UserError(
        f"model {', '.join(dict.fromkeys(point.model for point in one_sided))}: batches of {batches.min():,.0f} to "
        f"{batches.max():,.0f} tokens aren't sure to lie on both sides of B_crit at any of its losses, {min(losses):g} "
        f"to {max(losses):g}: scan again with {missing} ones as well" + (f", or {others}" if others else "")
    )


def _neighbours(points, loss) -> tuple[tuple[float, CriticalBatch], ...]:
    for point in points:
        if math.isclose(point.loss, loss, rel_tol=1e-9):
            return ((1.0, point),)
    k = next(i for i, point in enumerate(points) if point.loss < loss)
    above, below = points[k - 1], points[k]
    share = math.log(above.loss / loss) / math.log(above.loss / below.loss)
    return (1.0 - share, above), (share, below)


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Devices that share each batch."""

    devices: int
    tokens_per_second: float  # of one device
    device_batch_tokens: float = 0.0  # a device that is given fewer tokens a step takes no less time for them

    def __post_init__(self):
        if self.devices < 1 or not 0 < self.tokens_per_second < math.inf:
            raise UserError(
                f"{self.devices} devices at {self.tokens_per_second:g} tokens_per_second: both should be positive"
            )
        if not 0 <= self.device_batch_tokens < math.inf:
            raise UserError(f"device_batch_tokens = {self.device_batch_tokens} must be positive and finite, or 0")

    def seconds(self, batch_tokens: float, steps: float) -> float:
        """Wall time, without time lost to communication."""
        return steps * max(batch_tokens / self.devices, self.device_batch_tokens) / self.tokens_per_second


@dataclasses.dataclass(frozen=True)
class Choice:
    """One batch size on the way to a goal."""

    batch_tokens: float
    steps: float
    steps_interval: tuple[float, float]
    tokens: float
    excess_compute: float  # tokens over E_min, less 1: B/B_crit
    excess_steps: float  # steps over S_min, less 1: B_crit/B
    seconds: float | None  # None without hardware
    tested: bool  # False: smaller or larger than any batch that was run
    within_budget: bool  # tokens; True without a budget


def choices(to: Goal, batches, hardware: Hardware | None = None, budget_tokens: float = math.inf) -> tuple[Choice, ...]:
    """What each batch size, in tokens, costs."""
    rows = []
    for batch in batches:
        steps, tokens = float(to.steps(batch)), float(to.tokens(batch))
        low, high = to.steps_interval(batch)
        rows.append(
            Choice(
                batch_tokens=batch,
                steps=steps,
                steps_interval=(float(low), float(high)),
                tokens=tokens,
                excess_compute=batch / to.b_crit,
                excess_steps=to.b_crit / batch,
                seconds=None if hardware is None else hardware.seconds(batch, steps),
                tested=to.batch_range[0] * (1 - 1e-9) <= batch <= to.batch_range[1] * (1 + 1e-9),
                within_budget=tokens <= budget_tokens,
            )
        )
    return tuple(rows)


def powers_around(to: Goal) -> tuple[int, ...]:
    """Powers of two from an eighth of B_crit to eight times it."""
    middle = round(math.log2(to.b_crit))
    return tuple(2**k for k in range(max(middle - 3, 0), middle + 4))


def largest_within(to: Goal, budget_tokens: float) -> float:
    """Largest batch, in tokens, that reaches the goal within a budget of tokens: B_crit·(budget/E_min - 1).

    Raises:
      UserError: if no batch size does.
    """
    if not budget_tokens > to.e_min:
        raise UserError(
            f"model {to.model} needs more than {to.e_min:.3g} tokens to loss {to.loss:g} at any batch size; "
            f"the budget is {budget_tokens:.3g}"
        )
    return to.b_crit * (budget_tokens / to.e_min - 1.0)


def fastest(to: Goal, hardware: Hardware, budget_tokens: float = math.inf) -> float | None:
    """Batch in tokens with the least wall time; None if only the limit of small batches has it.

    Up to the batch that fills all devices a step's time is constant, so that fewer steps are faster; beyond it time
    goes with tokens, so that smaller batches are.
    """
    if hardware.device_batch_tokens == 0:
        return None
    return min(hardware.devices * hardware.device_batch_tokens, largest_within(to, budget_tokens))


class Adjusted(NamedTuple):
    """A value with the interval that it inherits from B_crit's."""

    value: float
    low: float
    high: float


def fewest_steps(steps, batch_tokens, b_crit, b_crit_interval=None) -> Adjusted:
    """S_min = S/(1 + B_crit/B): steps to the same loss if the batch were far above B_crit.

    Args:
      steps: of a run at `batch_tokens` tokens a step.
      b_crit, b_crit_interval: tokens, at the loss that the run reached; no interval is an interval of no width.
    """
    low, high = (b_crit, b_crit) if b_crit_interval is None else b_crit_interval
    value, at_low, at_high = (steps / (1.0 + b / batch_tokens) for b in (b_crit, low, high))
    return Adjusted(value, at_high, at_low)


def least_compute(compute, batch_tokens, b_crit, b_crit_interval=None) -> Adjusted:
    """C_min = C/(1 + B/B_crit): compute to the same loss if the batch were far below B_crit, in the unit of `compute`.

    Args:
      compute: of a run at `batch_tokens` tokens a step; tokens or FLOPs alike.
      b_crit, b_crit_interval: tokens, at the loss that the run reached; no interval is an interval of no width.
    """
    low, high = (b_crit, b_crit) if b_crit_interval is None else b_crit_interval
    # b/(b + B), not 1/(1 + B/b), so that an interval from 0 needs no division by it.
    value, at_low, at_high = (
        compute * (b / (b + batch_tokens) if b < float("inf") else 1.0) for b in (b_crit, low, high)
    )
    return Adjusted(value, at_low, at_high)
