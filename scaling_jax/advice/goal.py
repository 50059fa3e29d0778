"""The trade-off of one model at one loss, and what each batch size costs there.

Values come from the fitted trade-offs; losses outside the measured range need `extrapolate`.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from scaling_jax.fitting import CriticalBatch, ScanFit
from scaling_jax.io import UserError

NEAREST = 4  # number of points for the straight line of an extrapolated S_min


@dataclasses.dataclass(frozen=True, eq=False)
class Goal:
    """A target loss and the model's trade-off there: S_min in steps, E_min and B_crit in tokens."""

    model: str
    loss: float  # nats per token
    s_min: float
    e_min: float
    b_crit: float  # e_min/s_min
    b_crit_interval: tuple[float, float]
    law_b_crit: float | None  # by the law through all models and losses; None without a law
    law_interval: tuple[float, float] | None
    hyperbolas: bool  # False if the scan's trade-offs are no hyperbolas
    batch_range: tuple[float, float]  # smallest and largest batch of the runs, in tokens
    extrapolated: bool  # True if the loss is outside the measured range: S_min by a straight line, B_crit by the law
    neighbours: tuple[tuple[float, CriticalBatch], ...] = dataclasses.field(repr=False)  # weights and points

    def steps(self, batch_tokens):
        """Steps to the loss at a batch size in tokens: S_min·(1 + B_crit/B)."""
        return self.s_min * (1.0 + self.b_crit / np.asarray(batch_tokens, float))

    def tokens(self, batch_tokens):
        """Tokens to the loss at a batch size in tokens: E_min·(1 + B/B_crit)."""
        return self.e_min * (1.0 + np.asarray(batch_tokens, float) / self.b_crit)

    def steps_interval(self, batch_tokens) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) of `steps`; 0 and infinity if the goal is extrapolated."""
        steps = self.steps(batch_tokens)
        if self.extrapolated:
            return np.zeros_like(steps), np.full_like(steps, np.inf)
        below, above = np.zeros_like(steps), np.zeros_like(steps)
        for weight, point in self.neighbours:
            low, high = point.tradeoff.steps_interval(batch_tokens)
            middle = point.tradeoff.steps_at(batch_tokens)
            below, above = below + weight * np.log(low / middle), above + weight * np.log(high / middle)
        return steps * np.exp(below), steps * np.exp(above)


@dataclasses.dataclass(frozen=True)
class Hardware:
    """Devices over which each batch is split."""

    devices: int
    tokens_per_second: float  # of one device at full speed
    device_batch_tokens: float = 0.0  # tokens per step at which a device reaches full speed; fewer take the same time

    def __post_init__(self):
        if self.devices < 1 or not 0 < self.tokens_per_second < math.inf:
            raise UserError(
                f"{self.devices} devices at {self.tokens_per_second:g} tokens_per_second: both must be positive"
            )
        if not 0 <= self.device_batch_tokens < math.inf:
            raise UserError(f"device_batch_tokens = {self.device_batch_tokens} must be 0 or positive, and finite")

    def seconds(self, batch_tokens: float, steps: float) -> float:
        """Wall time of a run, without communication."""
        return steps * max(batch_tokens / self.devices, self.device_batch_tokens) / self.tokens_per_second


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one batch size costs to reach a goal."""

    batch_tokens: float
    steps: float
    steps_interval: tuple[float, float]
    tokens: float
    excess_compute: float  # tokens/E_min - 1 = B/B_crit
    excess_steps: float  # steps/S_min - 1 = B_crit/B
    seconds: float | None  # None without hardware
    tested: bool  # True if the batch size lies in the range of the runs
    within_budget: bool  # True also without a budget


class Adjusted(NamedTuple):
    """A value, and its interval from the interval of B_crit."""

    value: float
    low: float
    high: float


def models_of(fit: ScanFit) -> tuple[str, ...]:
    """The models with a usable trade-off. The model with the lowest loss comes first."""
    lowest: dict[str, float] = {}
    for point in _usable(fit.points):
        lowest[point.model] = min(point.loss, lowest.get(point.model, math.inf))
    return tuple(sorted(lowest, key=lambda model: lowest[model]))


def losses_of(fit: ScanFit, model: str) -> tuple[float, float]:
    """(lowest, highest) loss at which batches lie on both sides of the model's B_crit.

    Raises:
      UserError: if there is no such loss.
    """
    losses = [point.loss for point in _points(fit, model)]
    return min(losses), max(losses)


def goal(fit: ScanFit, loss: float, model: str | None = None, *, extrapolate: bool = False) -> Goal:
    """The trade-off at a loss, interpolated log-linearly between the neighbouring target losses of the scan.

    Args:
      fit: of a scan.
      loss: target loss in nats per token.
      model: None takes the model with the lowest loss.
      extrapolate: allow a loss outside the measured range.

    Raises:
      UserError: for an unknown model, or a loss outside the measured range without `extrapolate`.
    """
    if not (math.isfinite(loss) and loss > 0):
        raise UserError(f"target loss {loss:g} must be positive, in nats per token")
    if model is None:
        model = next(iter(models_of(fit)), "")
    points = sorted(_points(fit, model), key=lambda point: -point.loss)
    low, high = points[-1].loss, points[0].loss
    inside = low * (1 - 1e-9) <= loss <= high * (1 + 1e-9)
    if not inside and not (extrapolate and fit.law and len(points) >= 2):
        way_out = ", or pass --extrapolate" if fit.law else "; there is no law to extrapolate with"
        raise UserError(
            f"loss {loss:g} is outside {low:g} to {high:g}, where model {model} has batches on both sides of B_crit: "
            f"choose a loss inside, or scan with other target losses{way_out}"
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
        hyperbolas=not any(point.free_shape for point in points),
        law_interval=(float(fit.band(loss)[0]), float(fit.band(loss)[1])) if fit.law else None,
        batch_range=(float(batches.min()), float(batches.max())),
        extrapolated=not inside,
        neighbours=neighbours,
    )


def choices(to: Goal, batches, hardware: Hardware | None = None, budget_tokens: float = math.inf) -> tuple[Choice, ...]:
    """The cost of each batch size (in tokens)."""
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
    """Largest batch in tokens that reaches the goal within a budget of tokens: B_crit·(budget/E_min - 1).

    Raises:
      UserError: if no batch size does.
    """
    if not budget_tokens > to.e_min:
        raise UserError(
            f"model {to.model} needs more than {to.e_min:.3g} tokens to loss {to.loss:g} at any batch size, but the "
            f"budget is {budget_tokens:.3g}: give a larger budget or a higher loss"
        )
    return to.b_crit * (budget_tokens / to.e_min - 1.0)


def fastest(to: Goal, hardware: Hardware, budget_tokens: float = math.inf) -> float | None:
    """Batch in tokens with the least wall time; None if the smallest batch is the fastest.

    Up to the batch at which all devices reach full speed, each step takes the same time, so larger batches are faster.
    Above it, time is proportional to tokens, so smaller batches are faster.
    """
    if hardware.device_batch_tokens == 0:
        return None
    return min(hardware.devices * hardware.device_batch_tokens, largest_within(to, budget_tokens))


def fewest_steps(steps, batch_tokens, b_crit, b_crit_interval=None) -> Adjusted:
    """S_min = S/(1 + B_crit/B): steps to the same loss with a batch far above B_crit.

    Args:
      steps: of a run with `batch_tokens` tokens per step.
      b_crit, b_crit_interval: in tokens, at the loss that the run reached; without an interval, b_crit is exact.
    """
    low, high = (b_crit, b_crit) if b_crit_interval is None else b_crit_interval
    value, at_low, at_high = (steps / (1.0 + b / batch_tokens) for b in (b_crit, low, high))
    return Adjusted(value, at_high, at_low)


def least_compute(compute, batch_tokens, b_crit, b_crit_interval=None) -> Adjusted:
    """C_min = C/(1 + B/B_crit): compute to the same loss with a batch far below B_crit.

    Args:
      compute: of a run with `batch_tokens` tokens per step; in tokens or FLOPs, and so is the result.
      b_crit, b_crit_interval: in tokens, at the loss that the run reached; without an interval, b_crit is exact.
    """
    low, high = (b_crit, b_crit) if b_crit_interval is None else b_crit_interval
    # b/(b + B) instead of 1/(1 + B/b), because the interval may start at 0.
    value, at_low, at_high = (
        compute * (b / (b + batch_tokens) if b < float("inf") else 1.0) for b in (b_crit, low, high)
    )
    return Adjusted(value, at_low, at_high)


def _usable(points) -> list[CriticalBatch]:
    return [point for point in points if point.identified and not point.tradeoff.one_sided]


def _points(fit: ScanFit, model: str) -> list[CriticalBatch]:
    points = [point for point in _usable(fit.points) if point.model == model]
    if points:
        return points
    there = models_of(fit)
    one_sided = [point for point in fit.points if point.model == model or not there]
    others = f"choose from {', '.join(there)}" if there else ""
    if not fit.points:
        raise UserError(
            "no loss has steps at three batch sizes, so there is no trade-off: add batch sizes for the same losses"
        )
    if not one_sided:
        raise UserError(f"model {model!r} has no trade-off at any loss: {others}")
    losses = [point.loss for point in one_sided]
    batches = np.concatenate([point.tradeoff.batch_tokens for point in one_sided])
    middle = math.sqrt(batches.min() * batches.max())
    missing = "smaller" if np.median([point.tradeoff.b_crit for point in one_sided]) < middle else "larger"
    raise UserError(
        f"model {', '.join(dict.fromkeys(point.model for point in one_sided))}: the data do not show batches on both "
        f"sides of B_crit, with batches of {batches.min():,.0f} to {batches.max():,.0f} tokens at losses of "
        f"{min(losses):g} to {max(losses):g}: add {missing} batch sizes" + (f", or {others}" if others else "")
    )


def _neighbours(points, loss) -> tuple[tuple[float, CriticalBatch], ...]:
    for point in points:
        if math.isclose(point.loss, loss, rel_tol=1e-9):
            return ((1.0, point),)
    k = next(i for i, point in enumerate(points) if point.loss < loss)
    above, below = points[k - 1], points[k]
    share = math.log(above.loss / loss) / math.log(above.loss / below.loss)
    return (1.0 - share, above), (share, below)
