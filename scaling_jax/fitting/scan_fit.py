"""The two-stage fit of a batch-size scan: B_crit at each model and loss, then the power law through them.

First stage: McCandlish et al. 2018 (arXiv 1812.06162), eq. 2.11. Second stage: Kaplan et al. 2020 (arXiv 2001.08361),
eq. 1.4. Intervals of the law come from resampled runs. If all trade-offs together are no hyperbolas (`shapes`), the law
is that of `shape_law`, and each B_crit that of a free shape.
"""

import dataclasses
from collections.abc import Iterator

import numpy as np

from scaling_jax.fitting.local import local_table
from scaling_jax.fitting.loss_law import LossLaw
from scaling_jax.fitting.models_compared import compare_models
from scaling_jax.fitting.resampling import LawErrors, LawFit, fewer_for, law_errors, resamples_for
from scaling_jax.fitting.scan_table import ScanTable, scan_table
from scaling_jax.fitting.shape_law import ShapeLawErrors, fit_shape_law
from scaling_jax.fitting.shapes import Shape, p_of_hyperbolas
from scaling_jax.fitting.systematics import refits
from scaling_jax.fitting.tradeoff import Tradeoff, fit_tradeoffs

FEWEST_BATCHES = 5  # at a loss of the law; with fewer, intervals that look two-sided hold the truth too seldom
REJECTED = 0.05  # p below which a trade-off is no hyperbola
MOST_BENT_BY_CHANCE = 0.25  # share of a model's losses at which hyperbolas may look U-shaped
FEWEST_TO_JUDGE = 4  # losses of a model to judge that share by; with fewer, all models' losses


@dataclasses.dataclass(frozen=True, eq=False)
class CriticalBatch:
    """One point of B_crit(L)."""

    model: str
    loss: float  # target loss, nats per token
    tradeoff: Tradeoff
    not_reached: int  # number of the model's runs that didn't reach the target
    bounds: int  # number of these that entered the fit as a bound: more steps than they had
    identified: bool  # False if the interval of the hyperbola's B_crit is open on a side, or tokens are U-shaped
    in_law: bool  # True if the law was fitted to it; a law takes five batch sizes
    free_shape: bool  # True if the scan's trade-offs are no hyperbolas: then `b_crit` is B_half of a free shape
    local_b_crit: float = np.nan  # dE_min/dS_min at the loss, between the windows of `ScanFit.local`; NaN outside them
    local_b_crit_interval: tuple[float, float] = (0.0, np.inf)

    @property
    def shown(self) -> bool:
        """True if tables and charts show its B_crit."""
        return self.in_law or (self.identified and not self.free_shape)

    @property
    def b_crit(self) -> float:
        """The batch size in tokens at which a run needs 2·S_min steps."""
        return self.tradeoff.shape.b_half if self.free_shape else self.tradeoff.b_crit

    @property
    def s_min(self) -> float:
        """The least number of steps, with very large batches."""
        return self.tradeoff.shape.s_min if self.free_shape else self.tradeoff.s_min

    def steps_at(self, batch_tokens):
        """Steps to the loss at a batch size in tokens."""
        return (self.tradeoff.shape if self.free_shape else self.tradeoff).steps_at(batch_tokens)

    @property
    def residuals(self) -> np.ndarray:
        """log(steps measured/steps fitted), in the order of `tradeoff.batch_tokens`."""
        return np.log(self.tradeoff.steps / self.steps_at(self.tradeoff.batch_tokens))

    @property
    def b_crit_interval(self) -> tuple[float, float]:
        """0 or infinity at an end if the data reject no smaller or no larger `b_crit`."""
        return self.tradeoff.shape.b_half_interval if self.free_shape else self.tradeoff.b_crit_interval


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class ScanFit(LawFit):
    """The trade-off at every model and target loss, and one law through their B_crit."""

    points: tuple[CriticalBatch, ...]  # by model in order of appearance, then by falling loss
    notes: tuple[str, ...]  # what was left out, and why
    table: ScanTable = dataclasses.field(repr=False)  # a row for each point
    shape_p: float  # p of a test that all trade-offs are hyperbolas (`shapes.p_of_hyperbolas`); NaN with few runs
    local: "ScanFit | None" = None  # the same between two losses (`local`); None if no window has three batches

    def local_b_crit(self, model: str, loss) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(local B_crit, low, high) in tokens at losses, interpolated between a model's windows; NaN outside them."""
        shown = [] if self.local is None else [p for p in self.local.points if p.model == model and p.shown]
        if not shown:
            nothing = np.full(np.shape(loss), np.nan)
            return nothing, nothing, nothing
        x = np.log([point.loss for point in shown[::-1]])
        columns = np.array([(point.b_crit, *point.b_crit_interval) for point in shown[::-1]]).T
        with np.errstate(divide="ignore"):
            logs = np.log(columns)
        value, low, high = (np.exp(_interpolated(np.log(loss), x, y)) for y in logs)
        return value, low, high

    @property
    def table_of_law(self) -> ScanTable | None:
        """The rows of `table` that the law was fitted to; None without a law, or if they are no hyperbolas."""
        if self.law is None or self.law.shapes is not None:
            return None
        return self.table.select(np.array([point.in_law for point in self.points], bool))


def fit_scan(
    model,
    batch_tokens,
    target_loss,
    steps,
    *,
    run=None,
    steps_tried=None,
    offset_steps=None,
    above_minimum: bool = False,
    confidence: float = 0.95,
    resamples: int | None = None,
    seed: int = 0,
) -> ScanFit:
    """Fits a whole scan. The arguments are the columns of a table with one row for each run and target loss.

    Args:
      model: `[rows]`, names.
      batch_tokens: `[rows]`, tokens per step.
      target_loss: `[rows]`, nats per token.
      steps: `[rows]`, optimizer steps to the target; NaN if the run didn't reach it.
      run: `[rows]`, names that tell apart runs of one model and batch size (seeds); None if there is one run of each.
      steps_tried: `[rows]`, total steps of a run that didn't reach the target. The fit then knows that the target needs
        more steps. Used only where `steps` is NaN; None or NaN if unknown.
      offset_steps: `[rows]`, S_0: steps that a run lost before the trade-off, as by a warm-up. They are taken out of
        `steps` and `steps_tried`, so B_crit is E_min/S_min and not E_min/(S_min + S_0). None: 0.
      above_minimum: where tokens are U-shaped, fit the batches above the minimum, B_opt, instead of none.
      confidence: of all intervals.
      resamples: number of resamples for the law's intervals; None takes 4,000, and down to 1,000 for large tables.
      seed: of the resamples; the same seed gives the same result.

    Raises:
      ValueError: for values out of range, columns of unequal length, or two rows for one run and target. Names the row.
    """
    table = scan_table(model, batch_tokens, target_loss, steps, run, steps_tried, offset_steps)
    fit = _fit(table, confidence, resamples, seed)
    if above_minimum and (upper := _above_minimum(fit)) is not None:
        of_all = tuple(note for note in fit.notes if "U-shaped" in note)
        table, fit = upper, _fit(upper, confidence, resamples, seed)
        fit = dataclasses.replace(fit, notes=(*of_all, "fitted to the batches above that minimum", *fit.notes))
    windows = local_table(table)
    if not (windows.num_batches >= 3).any():
        return fit
    local = _fit(windows, confidence, resamples or fewer_for(windows), seed)
    of_losses = tuple(f"model {model} at loss" for model in set(windows.models))  # too many to list
    notes = fit.notes + tuple(f"local B_crit: {note}" for note in local.notes if not note.startswith(of_losses))
    fit = dataclasses.replace(fit, local=local, notes=notes)
    at_losses = (fit.local_b_crit(point.model, point.loss) for point in fit.points)
    points = (
        dataclasses.replace(point, local_b_crit=float(value), local_b_crit_interval=(float(low), float(high)))
        for point, (value, low, high) in zip(fit.points, at_losses, strict=True)
    )
    return dataclasses.replace(fit, points=tuple(points))


def _fit(table: ScanTable, confidence: float, resamples: int | None, seed: int) -> ScanFit:
    notes = []
    num_batches = table.num_batches
    for place, few in _places(table, np.flatnonzero(num_batches < 3)):
        least, most = min(num_batches[few]), max(num_batches[few])
        what = f"{least} to {most}" if least < most else f"{least}"
        notes.append(f"{place}: {what} batch sizes reached it, too few to fit")
    table = table.select(num_batches >= 3)

    tradeoffs = (
        fit_tradeoffs(table.log_batch, table.log_steps, table.mask, confidence, table.bound) if table.models else []
    )
    identified = np.array(
        [np.isfinite(tradeoff.b_crit_interval[1]) and tradeoff.b_crit_interval[0] > 0 for tradeoff in tradeoffs], bool
    )
    enough = num_batches[num_batches >= 3] >= FEWEST_BATCHES
    shape_p = p_of_hyperbolas(table) if table.models else np.nan
    bent = _bent(table.models, [tradeoff.shape for tradeoff in tradeoffs])
    free_shape = bool(shape_p < REJECTED)
    usable = (identified | free_shape) & enough & ~bent
    points = []
    if not free_shape:  # else said for all losses together
        notes += _of_intervals(table, tradeoffs, identified)
    for g, tradeoff in enumerate(tradeoffs):
        points.append(
            CriticalBatch(
                model=table.models[g],
                loss=float(table.losses[g]),
                tradeoff=tradeoff,
                not_reached=int(table.not_reached[g]),
                bounds=int(table.bound[g].sum()),
                identified=bool(identified[g] and not bent[g]),
                in_law=bool(usable[g]),
                free_shape=free_shape,
            )
        )

    # Of 95 % intervals, some are bounded by chance, even at many losses at once, as losses share runs. So a law also
    # takes `one_sided`, a stricter test, or with a free shape, intervals that are bounded although a is free.
    both_sides = {
        point.loss
        for point in points
        if point.in_law and (np.isfinite(point.b_crit_interval[1]) if free_shape else not point.tradeoff.one_sided)
    }
    notes = [*_of_shapes(points, bent), *notes]
    if not enough.all():
        notes.append(f"a law takes only losses that {FEWEST_BATCHES} batch sizes reached: without {(~enough).sum()}")
    law: LossLaw | None = None
    errors: LawErrors | ShapeLawErrors | None = None
    used = table.select(usable)
    if len(both_sides) < 3:
        notes.append(f"no law: batches lie on both sides of B_crit at {len(both_sides)} losses, and a law takes 3")
    elif free_shape:
        errors = fit_shape_law(used)
        if errors is None:
            notes.append("no law: the runs are no hyperbolas, and too few to fit a law with another shape")
        else:
            law = dataclasses.replace(
                errors.law(confidence, used.losses),
                shapes=(float(errors.a(used.losses.max())), float(errors.a(used.losses.min()))),
            )
    else:
        errors = law_errors(used, resamples or resamples_for(used), seed)
        law = errors.law(confidence, used.losses)
    if law is not None:
        law = dataclasses.replace(law, systematic=refits(used, free_shape))
        if len(set(used.models)) == len(used.models):
            notes.append(
                "every model has one loss in the law: the effects of loss, model size and data can't be told apart"
            )
        if not free_shape:
            notes += _of_models(used, confidence)
    return ScanFit(
        points=tuple(points),
        law=law,
        notes=tuple(notes),
        confidence=confidence,
        errors=errors,
        table=table,
        shape_p=shape_p,
    )


def _interpolated(x, known_x, known_y) -> np.ndarray:
    """Linear between neighbours, whose values may be infinite; NaN outside of them."""
    right = np.clip(np.searchsorted(known_x, x), 1, max(len(known_x) - 1, 1))
    if len(known_x) == 1:
        return np.where(x == known_x[0], known_y[0], np.nan)
    share = (x - known_x[right - 1]) / (known_x[right] - known_x[right - 1])
    with np.errstate(invalid="ignore"):
        between = np.where(share == 0, 0.0, share * known_y[right]) + np.where(
            share == 1, 0.0, (1 - share) * known_y[right - 1]
        )
    return np.where((share >= 0) & (share <= 1), between, np.nan)


def _above_minimum(fit: ScanFit) -> ScanTable | None:
    """The table without the batches below B_opt where tokens are U-shaped; None if they nowhere are."""
    bent = _bent(fit.table.models, [point.tradeoff.shape for point in fit.points])
    if not bent.any():
        return None
    b_opt = np.where(bent, [point.tradeoff.shape.b_opt for point in fit.points], 0.0)
    above = np.exp(fit.table.log_batch) >= b_opt[:, None]
    return fit.table._replace(mask=fit.table.mask & above, bound=fit.table.bound & above)


def _bent(models: tuple[str, ...], shapes: list[Shape]) -> np.ndarray:
    """True for the losses with U-shaped tokens, where there are many of them: one alone may be chance."""
    bent = np.array([shape.u_shaped for shape in shapes], bool)
    names = np.array(models)
    often = np.zeros_like(bent)
    for name in set(models):
        own = names == name
        often |= own & (bent[own if own.sum() >= FEWEST_TO_JUDGE else slice(None)].mean() > MOST_BENT_BY_CHANCE)
    return bent & often


def _of_shapes(points: list[CriticalBatch], bent: np.ndarray) -> list[str]:
    """What the free shapes say of each model: where tokens are U-shaped, and where the runs are no hyperbola."""
    notes = []
    for model in dict.fromkeys(point.model for point in points):
        own = [point for point in points if point.model == model]
        curved = [point for point, u in zip(points, bent, strict=True) if u and point.model == model]
        if curved:
            b_opt = sorted(point.tradeoff.shape.b_opt for point in curved)
            notes.append(
                f"model {model}: tokens are U-shaped at {_losses(curved, own)}: fewest at {b_opt[0]:,.0f} to "
                f"{b_opt[-1]:,.0f} tokens a batch, more with smaller ones. So there is B_opt and no B_crit; left out "
                "of the law"
            )
        rejected = [point for point in own if point.tradeoff.shape_p < REJECTED and point not in curved]
        if rejected and rejected[0].free_shape:
            a = sorted(point.tradeoff.shape.a for point in rejected)
            notes.append(
                f"model {model}: no hyperbola (p < {REJECTED:g}) at {_losses(rejected, own)}: with steps as "
                f"1 + (B_half/B)^a, a is {a[0]:.2f} to {a[-1]:.2f}. So B_crit is B_half, where a run needs twice S_min"
            )
        far = [point for point in own if not point.tradeoff.shape.both_ends and point not in curved]
        if far and far[0].free_shape:
            notes.append(
                f"model {model}: the batches end before steps scale linearly, or before they saturate, at "
                f"{_losses(far, own)}: B_crit rests on the form there"
            )
    return notes


def _of_models(table: ScanTable, confidence: float) -> list[str]:
    """Says if B_crit differs between models at the same loss."""
    compared = compare_models(table, confidence)
    different = [found for found in compared.ratios if found.differs] if compared is not None else []
    if compared is None or not different:
        return []
    ratios = ", ".join(
        f"of {found.model} is {found.ratio:.2f} [{found.low:.2f}, {found.high:.2f}] times that of {found.first}"
        for found in different
    )
    low, high = compared.exponent_interval
    return [
        f"models differ: at the same loss, B_crit {ratios}. So it isn't a function of the loss alone. With a level for "
        f"each model the exponent is {compared.exponent:.2f} [{low:.2f}, {high:.2f}]"
    ]


def _losses(some: list[CriticalBatch], of: list[CriticalBatch]) -> str:
    losses = [point.loss for point in some]
    if len(losses) == 1:
        return f"loss {losses[0]:.4g}"
    return f"{len(some)} of {len(of)} losses, {max(losses):.4g} to {min(losses):.4g}"


def _of_intervals(table: ScanTable, tradeoffs: list[Tradeoff], identified: np.ndarray) -> list[str]:
    """Where batches don't lie, or don't surely lie, on both sides of a hyperbola's B_crit."""
    notes = []
    one_sided = np.array([tradeoff.one_sided for tradeoff in tradeoffs], bool)
    for place, own in _places(table, np.flatnonzero(~identified)):
        low, high = np.array([tradeoffs[g].b_crit_interval for g in own]).T
        where = "below" if (low <= 0).all() else "above" if np.isinf(high).all() else "below or above"
        interval = f"B_crit has no bound {where}"
        if len(own) == 1:
            interval = f"B_crit is in [{low[0]:,.0f}, {high[0]:,.0f}] tokens"
        notes.append(f"{place}: {interval}, left out of the law")
    for place, own in _places(table, np.flatnonzero(identified & one_sided)):
        b_crit = [f"{end:,.0f}" for end in sorted(tradeoffs[g].b_crit for g in own)]
        around = " to ".join(dict.fromkeys((b_crit[0], b_crit[-1])))
        notes.append(f"{place}: too uncertain to be sure of batches on both sides of {around}")
    return notes


def _places(table: ScanTable, rows: np.ndarray) -> Iterator[tuple[str, list[int]]]:
    """(where, rows) for the rows of each model: one note for all its losses."""
    for model in dict.fromkeys(table.models):
        own = [int(g) for g in rows if table.models[g] == model]
        losses = [table.losses[g] for g in own]
        if len(own) == 1:
            yield f"model {model} at loss {losses[0]:g}", own
        elif own:
            yield f"model {model} at losses {max(losses):g} to {min(losses):g} ({len(own)} of them)", own
