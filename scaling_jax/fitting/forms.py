"""Compares four forms of the law of B_crit: a power of the loss, of the loss above a floor, of data, or of model size.

Each form is fitted to all runs at once (`joint`): log B_crit = level + slope·x. S_min is free at each model and loss.
  loss        x = log L           B_*/L^(1/alpha_B); Kaplan et al. 2020 (arXiv 2001.08361), eq. 1.4
  above floor x = log(L - L_inf)  B_*/(L - L_inf)^(1/alpha)
  data        x = log D_min       ∝ D_min^beta, D_min = E_min; Bergsma et al. 2025 (arXiv 2505.13738)
  size        x = log N           ∝ N^gamma; Zhang et al. 2024 (arXiv 2410.21676) found gamma close to 0

The forms are compared by how well they predict steps that the fit didn't see. Two sets of steps are held out: each run
in turn (with many runs, each of 16 parts of the runs), and the steps at the lowest losses. The criterion is Akaike's
with the correction for few points. The errors of one run at neighbouring losses move together, so the criterion counts
only as many points as their covariance says are independent.
"""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from scaling_jax.fitting.joint import JointFit, JointFits, fit_joint_rows, joint_fit_of, reached_by, shows_both_sides
from scaling_jax.fitting.loss_law import floors_below
from scaling_jax.fitting.resampling import Chain, Variable, fewer_for, fit_chain, law_errors
from scaling_jax.fitting.scan_fit import ScanFit
from scaling_jax.fitting.scan_table import ScanTable, scan_table
from scaling_jax.fitting.tradeoff import fit_rows, loss_of

FLOORS = 48  # values of L_inf to try
MEANS_LITTLE = 2.0  # difference of the criterion
MEANS_LITTLE_HELD_OUT = 0.05  # relative difference of held-out errors
FORMS = ("loss", "above floor", "data", "size")
LOCAL_FORMS = ("loss", "above floor", "size")  # D_min belongs to the way from the start
MOST_FOLDS = 16  # with more runs than this, several runs are held out at once
VARIABLES = {
    "loss": "loss in nats per token",
    "above floor": "loss in nats per token",
    "data": "D_min in tokens",
    "size": "N in parameters",
}


@dataclasses.dataclass(frozen=True)
class FormFit:
    """One form: B_crit = constant·(variable - floor)^exponent in tokens."""

    form: str  # "loss", "above floor", "data" or "size"
    variable: str  # with its unit
    constant: float  # tokens
    exponent: float
    floor: float  # L_inf; 0 in forms without a floor
    valid_range: tuple[float, float]  # range of the variable in which B_crit was measured
    num_parameters: int
    held_out_error: float  # root mean square error of log steps; each run is predicted from the other runs
    exponent_interval: tuple[float, float] | None  # from resampled runs; of "loss" and "data" only
    floors: tuple[tuple[float, float], ...]  # (floor, exponent) that fit about as well; of "above floor" only
    low_loss_error: float  # the same, with the lowest third of losses predicted from the others; NaN if it can't be
    criterion: float  # Akaike's; smaller is better, differences below 2 mean little

    def __call__(self, variable):
        """Critical batch size in tokens."""
        return self.constant * (np.asarray(variable, float) - self.floor) ** self.exponent


def compare_forms(
    model,
    batch_tokens,
    target_loss,
    steps,
    *,
    run=None,
    steps_tried=None,
    num_params: Mapping[str, float] | None = None,
    confidence: float = 0.95,
    resamples: int | None = None,
    seed: int = 0,
) -> tuple[FormFit, ...]:
    """Fits every form that the scan has data for; the smallest held-out error comes first.

    Args:
      model, batch_tokens, target_loss, steps, run, steps_tried: the columns of `fit_scan`. The fits use bounds too; the
        errors are those of measured steps only.
      num_params: {model: non-embedding parameters}. The form "size" needs two models of different size.
      confidence, resamples, seed: of the intervals, as in `fit_scan`.

    Returns:
      tuple of `FormFit`; empty unless batches lie on both sides of B_crit at three losses or more.

    Raises:
      ValueError: as in `fit_scan`, and if a model has no number of parameters.
    """
    table = reached_by(scan_table(model, batch_tokens, target_loss, steps, run, steps_tried), 4)
    return forms_of(table, num_params, FORMS, confidence, resamples, seed)


def forms_of(
    table: ScanTable,
    num_params: Mapping[str, float] | None = None,
    forms: tuple[str, ...] = FORMS,
    confidence: float = 0.95,
    resamples: int | None = None,
    seed: int = 0,
) -> tuple[FormFit, ...]:
    """`compare_forms` of a table whose losses at least four batch sizes reached; `forms` are those to fit."""
    if not shows_both_sides(table):
        return ()
    sizes = None if num_params is None else np.array([_size(num_params, name) for name in table.models])
    if sizes is None or np.unique(sizes).size == 1:
        forms = tuple(form for form in forms if form != "size")
    chain, folds, num_independent = fit_chain(table), _folds(table), _independent_points(table)
    variables: tuple[Variable, ...] = ("loss", "data")
    intervals: dict[str, tuple] = {
        form: law_errors(table, resamples or fewer_for(table), seed, form).interval((0.0, 1.0), confidence)[1:]
        for form in variables
        if form in forms
    }
    fits = (_assess(form, table, sizes, chain, folds, num_independent, intervals.get(form)) for form in forms)
    return tuple(sorted(fits, key=lambda fit: fit.held_out_error))


def further_fits(fit: ScanFit, num_params: Mapping[str, float] | None) -> tuple[JointFit | None, tuple[FormFit, ...]]:
    """The joint fit, and other forms of the law; of the local trade-offs, if only those are hyperbolas."""
    table = fit.table_of_law
    if table is not None:
        return joint_fit_of(table), forms_of(table, num_params)
    local = None if fit.local is None else fit.local.table_of_law
    return None, () if local is None else forms_of(local, num_params, LOCAL_FORMS)


def _size(num_params, name):
    if not num_params.get(name, 0) > 0:
        raise ValueError(f"num_params of model {name} is {num_params.get(name)}; must be positive")
    return float(num_params[name])


class _Fold(NamedTuple):
    """Runs held out together, and what every form's fit to the others starts from."""

    held_out: np.ndarray  # `[G, n]`
    seen: ScanTable
    chain: Chain


def _folds(table: ScanTable) -> list[_Fold]:
    runs = np.unique(table.run_index[table.mask])
    folds = []
    for k in range(count := min(len(runs), MOST_FOLDS)):
        held_out = (table.mask | table.bound) & np.isin(table.run_index, runs[k::count])
        seen = table._replace(mask=table.mask & ~held_out, bound=table.bound & ~held_out)
        folds.append(_Fold(held_out, seen, fit_chain(seen)))
    return folds


def _assess(
    form: str, table: ScanTable, sizes, chain: Chain, folds: list[_Fold], num_independent: float, interval
) -> FormFit:
    x, floors, fits = _fit(form, table, sizes, chain)
    best = int(np.argmin(_loss(fits, table)))
    centre = _centre(x, best)
    residuals = fits.residuals[best]
    count = 3 if form == "above floor" else 2
    variable = {"size": sizes, "data": np.exp(x[0])}.get(form, table.losses)
    return FormFit(
        form=form,
        variable=VARIABLES[form],
        constant=float(np.exp(fits.level[best] - fits.slope[best] * centre)),
        exponent=float(fits.slope[best]),
        floor=float(floors[best]),
        valid_range=(float(variable.min()), float(variable.max())),
        num_parameters=count,
        exponent_interval=None if interval is None else (float(interval[0]), float(interval[1])),
        floors=_floors_as_good(floors, fits, table, num_independent) if form == "above floor" else (),
        held_out_error=_each_run_held_out(form, table, sizes, folds),
        low_loss_error=_low_losses_held_out(form, table, sizes, chain),
        criterion=_criterion(residuals[table.mask], num_independent, count),
    )


def _fit(form: str, table: ScanTable, sizes, chain: Chain) -> tuple[np.ndarray, np.ndarray, JointFits]:
    """x `[K, G]`, floors `[K]` and the fit for each of K floors; one floor, 0, for forms without a floor."""
    floors = np.zeros(1)
    if form == "size":
        x = np.log(sizes)[None]
    elif form == "data":
        x = (chain.hyperbolas.log_b_crit + chain.hyperbolas.log_s_min)[None]
    else:
        if form == "above floor":
            floors = floors_below(table.losses, FLOORS)
        x = np.log(table.losses - floors[:, None])
    centred = x - x.mean(-1, keepdims=True)
    line = chain.line
    slopes = line.slope * np.log(table.losses).std() / np.maximum(centred.std(-1), 1e-12)
    if form in ("data", "size"):
        slopes = np.zeros_like(floors)
    start = np.full(len(floors), float(line.level)), slopes
    steps = np.broadcast_to(table.log_steps, (len(floors), *table.log_steps.shape))
    return x, floors, fit_joint_rows(table, centred, steps, start)


def _centre(x, best):
    return x[best].mean()


def _loss(fits: JointFits, table: ScanTable):
    # One limit and one noise for all floors: otherwise a floor could get a smaller loss through a smaller limit.
    limit, noise = fits.limit.min(), fits.noise.min()
    return loss_of(fits.residuals, table.mask, table.bound, limit, noise).sum((-2, -1))


def _predicted(x, fits: JointFits, best, table, log_s_min):
    log_b_crit = fits.level[best] + fits.slope[best] * (x[best] - _centre(x, best))
    return log_s_min[:, None] + np.logaddexp(0.0, log_b_crit[:, None] - table.log_batch)


def _each_run_held_out(form, table, sizes, folds: list[_Fold]) -> float:
    errors = []
    for held_out, seen, chain in folds:
        x, _, fits = _fit(form, seen, sizes, chain)
        best = int(np.argmin(_loss(fits, seen)))
        predicted = _predicted(x, fits, best, table, fits.log_s_min[best])
        errors.append((table.log_steps - predicted)[held_out & table.mask])
    return float(np.sqrt(np.mean(np.concatenate(errors) ** 2)))


def _low_losses_held_out(form, table, sizes, chain: Chain) -> float:
    """Error at the lowest third of losses, with the law of B_crit fitted at the higher losses.

    No form predicts S_min, so S_min at the lower losses comes from the runs there.
    """
    distinct = np.unique(table.losses)
    low = table.losses < distinct[len(distinct) // 3]
    high = table.select(~low)
    if np.unique(high.losses).size < 3 or not low.any():
        return float("nan")
    x_high, floors, fits = _fit(form, high, None if sizes is None else sizes[~low], fit_chain(high))
    # A floor above the held-out losses predicts nothing there.
    usable = floors < distinct[0] * 0.999
    loss = np.where(usable, _loss(fits, high), np.inf)
    best = int(np.argmin(loss))
    if form == "size":
        x = np.log(sizes)
    elif form == "data":
        x = chain.hyperbolas.log_b_crit + chain.hyperbolas.log_s_min
    else:
        x = np.log(table.losses - floors[best])
    log_b_crit = fits.level[best] + fits.slope[best] * (x - _centre(x_high, best))
    remainder = (table.log_steps - np.logaddexp(0.0, log_b_crit[:, None] - table.log_batch))[low]
    mask = table.mask[low]
    level = (mask * remainder).sum(-1, keepdims=True) / mask.sum(-1, keepdims=True)
    return float(np.sqrt(np.mean((remainder - level)[mask] ** 2)))


def _floors_as_good(
    floors, fits: JointFits, table: ScanTable, num_independent: float
) -> tuple[tuple[float, float], ...]:
    spread = (fits.residuals[:, table.mask] ** 2).mean(-1)
    good = num_independent * np.log(spread / spread.min()) < MEANS_LITTLE
    return tuple((float(floor), float(slope)) for floor, slope in zip(floors[good], fits.slope[good], strict=True))


def _independent_points(table: ScanTable) -> float:
    """Effective number of independent points, from the residuals of trade-offs fitted without any form."""
    fits = fit_rows(table.log_batch, table.log_steps, table.mask, table.bound)
    errors = table.mask * fits.residuals
    covariance = table.sum_over_runs(errors, errors)
    of_a_run = np.trace(covariance) ** 2 / max(np.sum(covariance**2), 1e-300)
    return float((table.mask.sum() - len(table.models)) * min(of_a_run / len(covariance), 1.0))


def _criterion(residuals, count, num_parameters) -> float:
    spread = np.mean(residuals**2)
    return float(count * np.log(spread) + 2 * num_parameters * count / max(count - num_parameters - 1, 1))
