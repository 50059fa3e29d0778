"""The trade-off of one model at one loss: measured there, between measured losses, or continued beyond them."""

import dataclasses
import math

import numpy as np

from scaling_jax.advice.measured import exponent, models_of, neighbours_of, points_of, steps_interval
from scaling_jax.fitting import CriticalBatch, LossLaw, ScanFit
from scaling_jax.fitting.linear_scaling import OVERHEAD, largest_batch_of
from scaling_jax.io import UserError

NEAREST = 4  # number of points for the straight line of an extrapolated S_min
# Steps get brackets up to this part of the measured range of log L beyond it. On the demo, cut at ten losses, the
# brackets then held the steps of 94 to 100 % of the batches beyond the cut. They are a factor of three wide.
REACH = 0.5
FARTHEST = 10  # times outside the measured losses; powers of the loss would overflow


@dataclasses.dataclass(frozen=True, eq=False)
class Goal:
    """A target loss and the model's trade-off there: S_min in steps, E_min and B_crit in tokens.

    Steps are S_min·(1 + (B_crit/B)^a). Between measured losses, the logs of S_min and of what small batches need beyond
    it, and a, are linear in log L.
    """

    model: str
    loss: float  # nats per token
    s_min: float
    e_min: float  # s_min·b_crit; NaN if the trade-offs are no hyperbolas, as tokens then have no minimum
    b_crit: float  # with twice S_min
    a: float  # 1 for hyperbolas
    b_crit_interval: tuple[float, float]  # if extrapolated, the hull of the law's band and of its refits
    law_b_crit: float | None  # by the law through all models and losses; None without a law
    law_interval: tuple[float, float] | None
    local_b_crit: float  # of the next bit of loss; NaN where it wasn't measured
    local_interval: tuple[float, float]
    hyperbolas: bool  # False if the scan's trade-offs are no hyperbolas: then they have a free shape
    batch_range: tuple[float, float]  # smallest and largest batch of the runs, in tokens
    extrapolated: bool  # True if the loss is outside the measured range: S_min by straight lines, B_crit by the law
    s_min_range: tuple[float, float] = dataclasses.field(repr=False)  # of an extrapolated goal; 0, infinity: unknown
    neighbours: tuple[tuple[float, CriticalBatch], ...] = dataclasses.field(repr=False)  # weights and points

    def steps(self, batch_tokens):
        """Steps to the loss at a batch size in tokens."""
        return self.s_min * (1.0 + (self.b_crit / np.asarray(batch_tokens, float)) ** self.a)

    def tokens(self, batch_tokens):
        """Tokens to the loss at a batch size in tokens."""
        return np.asarray(batch_tokens, float) * self.steps(batch_tokens)

    def cbs20(self, reference_batch_tokens: float | None = None) -> float:
        """CBS20 in tokens, as in `fitting.cbs20`; NaN without a reference batch if the trade-offs are no hyperbolas."""
        if reference_batch_tokens is None:
            return OVERHEAD * self.b_crit if self.hyperbolas else math.nan
        tokens = (1 + OVERHEAD) * float(self.tokens(reference_batch_tokens))
        return largest_batch_of(self.steps, tokens, reference_batch_tokens)

    def steps_interval(self, batch_tokens) -> tuple[np.ndarray, np.ndarray]:
        """(low, high) of `steps`. For an extrapolated goal a bracket of what the data allow; 0, infinity far away."""
        batch_tokens = np.asarray(batch_tokens, float)
        if self.extrapolated:
            ends = zip(self.s_min_range, self.b_crit_interval, strict=True)
            low, high = (s_min * (1.0 + (b_crit / batch_tokens) ** self.a) for s_min, b_crit in ends)
            return low, high
        steps = self.steps(batch_tokens)
        below, above = np.zeros_like(steps), np.zeros_like(steps)
        for weight, point in self.neighbours:
            low, high = steps_interval(point, batch_tokens)
            middle = point.steps_at(batch_tokens)
            below, above = below + weight * np.log(low / middle), above + weight * np.log(high / middle)
        return steps * np.exp(below), steps * np.exp(above)


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
    points = points_of(fit, model)
    low, high = points[-1].loss, points[0].loss
    inside = low * (1 - 1e-9) <= loss <= high * (1 + 1e-9)
    if not inside and not (extrapolate and fit.law and len(points) >= 2):
        way_out = ", or pass --extrapolate" if fit.law else "; there is no law to extrapolate with"
        raise UserError(
            f"loss {loss:g} is outside {low:g} to {high:g}, where model {model} has batches on both sides of B_crit: "
            f"choose a loss inside, or scan with other target losses{way_out}"
        )
    if not low / FARTHEST <= loss <= high * FARTHEST:
        raise UserError(
            f"loss {loss:g} is too far outside {low:g} to {high:g} to extrapolate to: choose one from "
            f"{low / FARTHEST:.3g} to {high * FARTHEST:.3g}"
        )
    s_min_range = (0.0, math.inf)
    neighbours = neighbours_of(points, loss) if inside else ()
    if inside:
        s_min = _mean([(weight, point.s_min) for weight, point in neighbours])
        shares = [(weight * exponent(point), point) for weight, point in neighbours]
        a = sum(share for share, _ in shares)
        b_crit = _mean([(share / a, point.b_crit) for share, point in shares])
        interval = tuple(_mean([(share / a, point.b_crit_interval[end]) for share, point in shares]) for end in (0, 1))
    else:
        assert fit.law is not None
        s_min, *others = (_s_min_by_line(points, loss, count) for count in (NEAREST, len(points)))
        beyond = math.log(low / loss if loss < low else loss / high)
        if beyond <= REACH * math.log(high / low):
            s_min_range = (min(s_min, *others), max(s_min, *others))
        a = 1.0 if fit.law.shapes is None else fit.law.shapes[int(loss < low)]
        b_crit, interval = float(fit.law(loss)), _hull(fit, fit.law, loss)
    batches = np.concatenate([point.tradeoff.batch_tokens for point in points])
    hyperbolas = not any(point.free_shape for point in points)
    local, local_low, local_high = (float(x) for x in fit.local_b_crit(model, loss))
    return Goal(
        model=model,
        loss=loss,
        s_min=s_min,
        e_min=s_min * b_crit if hyperbolas else math.nan,
        b_crit=b_crit,
        b_crit_interval=(interval[0], interval[1]),
        law_b_crit=float(fit.law(loss)) if fit.law else None,
        law_interval=(float(fit.band(loss)[0]), float(fit.band(loss)[1])) if fit.law else None,
        local_b_crit=local,
        local_interval=(local_low, local_high),
        hyperbolas=hyperbolas,
        batch_range=(float(batches.min()), float(batches.max())),
        extrapolated=not inside,
        a=a,
        s_min_range=s_min_range,
        neighbours=neighbours,
    )


def _mean(values: list[tuple[float, float]]) -> float:
    """Geometric mean of (weight, value)."""
    return math.exp(sum(weight * math.log(value) for weight, value in values))


def _s_min_by_line(points: list[CriticalBatch], loss: float, count: int) -> float:
    """S_min along a straight line in logs through the points nearest to a loss outside of them."""
    nearest = points[-count:] if loss < points[-1].loss else points[:count]
    x, y = np.log([[point.loss, point.s_min] for point in nearest]).T
    return math.exp(float(np.polyval(np.polyfit(x, y, 1), math.log(loss))))


def _hull(fit: ScanFit, law: LossLaw, loss: float) -> tuple[float, float]:
    """The range of the law's band, and of the laws of parts of the data."""
    relative = loss / math.sqrt(law.loss_range[0] * law.loss_range[1])
    ends = [float(end) for end in fit.band(loss)]
    ends += [refit.b_crit * relative**refit.exponent for refit in law.systematic]
    return min(ends), max(ends)
