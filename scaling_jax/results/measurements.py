"""The measurements of a scan: steps to each target loss, noise scales, and the spread between seeds.

They are the rows of measurements.csv, noise_scale.csv and seeds.csv.
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from scaling_jax.fitting import CriticalBatch
from scaling_jax.noise_scale import Estimate, estimate
from scaling_jax.results.runs import CellRuns, moments_by_step
from scaling_jax.scanning.experiment import FEWEST_STEPS
from scaling_jax.scanning.tried import best_at, is_tuned

MEANINGLESS = 0.25  # standard deviation of log steps between seeds, above which a crossing means little
WARNED_BY_CHANCE = 0.1  # of noise-scale windows: white noise in 4 to 20 steps warns up to this often


class Measurement(NamedTuple):
    """Steps of one model, batch size and seed to one target loss, at the best learning rate."""

    model: str
    batch_tokens: int
    seed: int
    target_loss: float  # nats per token
    steps: float  # NaN: no run reached the target within `steps_tried`
    tokens: float
    learning_rate: float  # of the run with the fewest steps; NaN if no run reached the target
    tuned: bool  # False: a better rate may lie beyond the rates tried
    steps_tried: int  # steps of the longest run
    passed_early: bool = False  # a run was below the target at its first evaluation, so its steps are unknown


class NoiseMeasurement(NamedTuple):
    """The noise scale B_simple of one run while its loss fell from one target loss to the next, in tokens."""

    model: str
    batch_tokens: int
    seed: int
    loss: float  # geometric middle of both target losses
    b_simple: float  # NaN if unresolved
    low: float
    high: float  # inf if unresolved
    resolved: bool
    steps: int


class SeedSpread(NamedTuple):
    """How far the best runs of several seeds lie apart at one target loss."""

    model: str
    batch_tokens: int
    target_loss: float  # nats per token
    seeds: int  # number of seeds that reached the target
    steps_spread: float  # standard deviation between seeds of log steps to the target
    test_loss_std: float  # standard deviation of the test loss at the geometric mean of these steps; nats per token


def measure(cells: Sequence[CellRuns]) -> list[Measurement]:
    """The steps to each target loss, for every cell in order."""
    return [row for cell in cells for row in _measure_cell(cell)]


def early_losses(measurements: Sequence[Measurement]) -> set[tuple[str, float]]:
    """The (model, target loss) for which some run was below the target at its first evaluation."""
    return {(m.model, m.target_loss) for m in measurements if m.passed_early}


def columns(measurements: Sequence[Measurement]) -> dict[str, Any]:
    """Keyword arguments of `fitting.fit_scan`, `fit_joint` and `compare_forms`. Leaves out losses passed early."""
    early = early_losses(measurements)
    used = [m for m in measurements if (m.model, m.target_loss) not in early]
    return {
        "model": [m.model for m in used],
        "batch_tokens": [m.batch_tokens for m in used],
        "target_loss": [m.target_loss for m in used],
        "steps": [m.steps for m in used],
        "run": [m.seed for m in used],
        "steps_tried": [m.steps_tried for m in used],
    }


def measurement_notes(measurements: Sequence[Measurement]) -> tuple[str, ...]:
    """Notes on losses that were left out or not reached, and on learning rates that weren't tuned."""
    early = early_losses(measurements)
    notes, models = [], list(dict.fromkeys(m.model for m in measurements))
    for model in models:
        losses = sorted((loss for name, loss in early if name == model), reverse=True)
        if losses:
            what = f"losses {losses[0]:g} to {losses[-1]:g} are" if losses[1:] else f"loss {losses[0]:g} is"
            notes.append(f"model {model}: {what} left out, some run was below when it was first evaluated")
    for model in models:
        at_edge, missed = [], []  # places of this model, in words
        own = [m for m in measurements if m.model == model]
        used = [m for m in own if (model, m.target_loss) not in early]
        if not any(math.isfinite(m.steps) for m in own):
            high = max((m.target_loss for m in used), default=None)
            why = "runs were below all of them at first" if high is None else f"no run reached {high:g} or below"
            notes.append(f"model {model}: no target loss was measured ({why}): it has no part in the fits")
        for batch, seed in dict.fromkeys((m.batch_tokens, m.seed) for m in used):
            rows = [m for m in used if (m.batch_tokens, m.seed) == (batch, seed)]
            where = f"{batch:,} tokens" + (f", seed {seed}" if seed else "")
            edges = [m for m in rows if math.isfinite(m.steps) and not m.tuned]
            if edges:
                rates = ", ".join(dict.fromkeys(f"{m.learning_rate:g}" for m in edges))
                at_edge.append(f"{where} ({rates}; {len(edges)} of {len(rows)} losses)")
            if above := [m for m in rows if math.isnan(m.steps)]:
                highest = max(m.target_loss for m in above)
                missed.append(f"{where} ({highest:g} and below, in {above[0].steps_tried:,} steps)")
        if at_edge:
            notes.append(
                f"model {model}: the best learning rate is at the edge of those tried at {'; '.join(at_edge)}. "
                "A better one may lie beyond"
            )
        if missed:
            notes.append(f"model {model}: losses weren't reached at {'; '.join(missed)}")
    return tuple(notes)


def few_steps_notes(points: Sequence[CriticalBatch]) -> tuple[str, ...]:
    """One note for each model on its losses whose S_min is below `FEWEST_STEPS`."""
    notes = []
    for model in dict.fromkeys(point.model for point in points):
        own = [point for point in points if point.model == model]
        # Unless batches lie on both sides of B_crit, S_min may be anything below the fewest steps that were measured.
        few = [
            point.loss
            for point in own
            if min(point.tradeoff.steps) < FEWEST_STEPS
            or (point.shown and not point.tradeoff.one_sided and point.s_min < FEWEST_STEPS)
        ]
        if few:
            notes.append(
                f"model {model}: S_min is below {FEWEST_STEPS} steps at {some_losses(few, len(own))}: warm-up, first "
                "evaluations and rounding weigh there; give lower targets"
            )
    return tuple(notes)


def some_losses(losses: Sequence[float], of: int) -> str:
    """Some of a model's losses, in words."""
    if len(losses) == 1:
        return f"loss {losses[0]:.4g}"
    return f"{len(losses)} of {of} losses, {max(losses):.4g} to {min(losses):.4g}"


def measure_noise(cells: Sequence[CellRuns]) -> list[NoiseMeasurement]:
    """The noise scale of each cell's best run, between each two neighbouring target losses that it passed."""
    return [
        NoiseMeasurement(
            model=cell.model,
            batch_tokens=cell.batch_tokens,
            seed=cell.cell.seed,
            loss=loss,
            b_simple=found.value,
            low=found.low,
            high=found.high,
            resolved=found.resolved,
            steps=found.steps,
        )
        for cell in cells
        for loss, found in _between_targets(cell)
    ]


def noise_notes(cells: Sequence[CellRuns]) -> tuple[str, ...]:
    """A note if more intervals of the noise scale than by chance may be too narrow."""
    found = [noise for cell in cells for _, noise in _between_targets(cell)]
    narrow = sum(noise.warning is not None for noise in found)
    if narrow <= WARNED_BY_CHANCE * len(found):
        return ()
    return (
        f"the interval of the noise scale may be too narrow in {narrow} of {len(found)} windows: few steps dominate "
        "there, or correlated steps are few",
    )


def measure_spread(cells: Sequence[CellRuns]) -> list[SeedSpread]:
    """One row for each model, batch size and target loss that two seeds or more reached."""
    alike = defaultdict(list)
    for cell in cells:
        alike[cell.model, cell.batch_tokens].append(cell)
    rows = []
    for (model, batch_tokens), seeds in alike.items():
        for k, target in enumerate(seeds[0].subject.target_losses):
            best = [t for cell in seeds if (t := best_at(cell.tried, k)) is not None]
            if len(best) < 2:
                continue
            log_steps = np.log([t.steps_to_target[k] for t in best])
            losses = [np.interp(log_steps.mean(), np.log(t.steps), t.losses) for t in best]
            spread = float(log_steps.std(ddof=1)), float(np.std(losses, ddof=1))
            rows.append(SeedSpread(model, batch_tokens, target, len(best), *spread))
    return rows


def seed_notes(spreads: Sequence[SeedSpread]) -> tuple[str, ...]:
    """Notes on batch sizes at which seeds differ so much that steps to a loss mean little."""
    notes = []
    for model, batch in dict.fromkeys((s.model, s.batch_tokens) for s in spreads):
        wide = [s for s in spreads if (s.model, s.batch_tokens) == (model, batch) and s.steps_spread > MEANINGLESS]
        if wide:
            worst = max(wide, key=lambda s: s.steps_spread)
            notes.append(
                f"model {model} at {batch:,} tokens: seeds differ by {math.expm1(worst.steps_spread):.0%} in steps "
                f"(±{worst.test_loss_std:.3f} nats) at loss {worst.target_loss:g}; its crossings at {len(wide)} losses "
                "mean little"
            )
    return tuple(notes)


def _measure_cell(cell: CellRuns) -> list[Measurement]:
    rows = []
    for k, target in enumerate(cell.subject.target_losses):
        early = any(bool(t.passed_early[k]) for t in cell.tried)
        best = None if early else best_at(cell.tried, k)
        steps = float(best.steps_to_target[k]) if best else math.nan
        rows.append(
            Measurement(
                model=cell.model,
                batch_tokens=cell.batch_tokens,
                seed=cell.cell.seed,
                target_loss=target,
                steps=steps,
                tokens=steps * cell.batch_tokens,
                learning_rate=best.run.learning_rate if best else math.nan,
                tuned=is_tuned(cell.tried, k),
                steps_tried=max(t.result.steps for t in cell.tried),
                passed_early=early,
            )
        )
    return rows


def _between_targets(cell: CellRuns) -> list[tuple[float, Estimate]]:
    """(geometric middle of two target losses, noise scale while the loss fell from one to the other)."""
    targets, crossings = cell.subject.target_losses, cell.best.steps_to_target
    step = cell.record.course.step
    grad_sq_norm, trace_cov = moments_by_step(cell.record.course)
    found = []
    for k in range(len(targets) - 1):
        if not np.all(np.isfinite(crossings[k : k + 2])):
            continue
        ends = int(crossings[k]), max(int(crossings[k + 1]), int(crossings[k]) + 2)
        window = slice(*np.searchsorted(step, ends, side="right"))
        if len(step[window]) < 2:  # another trainer measured too few
            continue
        found.append((math.sqrt(targets[k] * targets[k + 1]), estimate(grad_sq_norm[window], trace_cov[window])))
    return found
