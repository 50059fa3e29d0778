"""The learning-rate search of a cell that knows the searches of batches nearer to the middle one.

The middle batch of a model is searched first, then the others outwards. What the search assumes, and uses:

- The best rate changes smoothly with the batch. So the first rate is what the two batches before it predict.
- A larger batch needs no more steps, a smaller one no more tokens. So a first run ends when it needs more than that.
- Near its minimum, log steps is a parabola in log rate, until a cliff above which training is unstable. So a neighbour
  at √2 on either side says where the minimum is, to a few per cent of steps, and no run between need be trained.
- A run that is late makes up for little of that: the less, the nearer its rate is to the best (`_CATCH_UP`).

Noisy quadratics and the demo need 2.5 times as many tokens as their best runs alone, against 24 and 4 times with the
search of each cell on its own (experiments/quadratic_scan.py, docs/measuring.md).
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from scaling_jax.scanning.experiment import Cell, Experiment, LearningRates
from scaling_jax.scanning.grid_search import vertex
from scaling_jax.scanning.tried import Tried, best_of, contender, index_of, too_late, two_evaluations_on
from scaling_jax.training import Deadline, Run

_CATCH_UP = 0.08  # part of the way left, in log steps, that half or twice the best rate may make up
_EARLY_STEP, _EARLY_GAIN = 8, 0.1  # runs that are so late so early are given up: at large batches all of a run is early
_EARLY_PART = 0.1
_SLACK = 1.05  # times the steps or tokens of the batch before
_TREND = 0.7  # part of the last change of the best rate that is expected to go on
_CURVATURE = 0.6  # of log steps in log rate, where it isn't known; Adam's in the demo is about this

MOST_GUIDES = 2
Inner = Sequence[Sequence[Tried]]  # what was tried at the batches before, the nearest first


def first(experiment: Experiment, cell: Cell, inner: Inner) -> dict[int, Run]:
    """The first runs, {rate index: run}: `LearningRates.together` rates around the one that `inner` predicts."""
    rates = experiment.subject(cell.model).learning_rates
    count, step = min(rates.together, rates.most), _step(rates, inner)
    predicted = predict(rates, cell.batch_tokens, inner)
    around = [predicted] + [predicted + sign * step * k for k in range(1, count) for sign in (1, -1)]
    return {index: _limited(experiment, cell, index, inner, 0) for index in around[:count]}


def predict(rates: LearningRates, batch_tokens: int, inner: Inner) -> int:
    """The rate index at which to begin."""
    if not inner:
        return 0
    best = [best_of(tried).run for tried in inner[:MOST_GUIDES]]
    per_log = rates.places / math.log(rates.factor)
    places = [per_log * math.log(run.learning_rate / rates.rate(run.batch_tokens, 0)) for run in best]
    if len(best) < 2:
        return round(places[0])
    per_batch = (places[0] - places[1]) / math.log(best[0].batch_tokens / best[1].batch_tokens)
    change = _TREND * per_batch * math.log(batch_tokens / best[0].batch_tokens)
    return round(places[0] + max(-rates.places, min(rates.places, round(change))))


def wanted(rates: LearningRates, tried: Mapping[int, Tried], best: Tried, target: int, inner: Inner) -> list[int]:
    """Rate indices to try next for a target: beyond the tried rates, or between the best rate and a neighbour."""
    here, step = index_of(tried, best), _step(rates, inner)
    beyond = [here + step] * (max(tried) == here) + [here - step] * (min(tried) == here)
    if not math.isfinite(best.steps_to_target[target]):
        return beyond[::-1]  # most runs that don't reach a target were too fast for its noise
    if beyond:
        return beyond
    known = {index: x for index, t in tried.items() if (x := _log_steps(t, best, target)) is not None}
    below, above = max(i for i in tried if i < here), min(i for i in tried if i > here)
    if below not in known:
        return []
    if above in known:
        between = vertex(known, set(tried), below, here, above, rates.rate_tolerance)
    else:  # a cliff: a run nearer to it pays if the minimum isn't below the best rate
        distance = (here - below) * math.log(rates.factor) / rates.places
        minimum = (known[below] - known[here]) / (_CURVATURE * distance) - distance / 2  # above the best, in log rate
        gain = _CURVATURE * max(minimum, 0.0) ** 2 / 2
        between = (here + above) // 2 if gain > rates.rate_tolerance and above - here > 1 else None
    return [] if between is None else [between]


def challenger(
    experiment: Experiment, cell: Cell, index: int, best: Tried, target: int, inner: Inner, num_tried: int
) -> Run:
    """The run at a rate index, which ends once it can't be the best."""
    steps, rates = best.steps_to_target[target], experiment.subject(cell.model).learning_rates
    if not math.isfinite(steps):
        return _limited(experiment, cell, index, inner, num_tried)
    octaves = abs(math.log2(rates.rate(cell.batch_tokens, index) / best.run.learning_rate))
    catch_up = _CATCH_UP if rates.catch_up is None else rates.catch_up
    late = guided_deadlines(best, steps, octaves, catch_up, rates.rate_tolerance)
    return contender(experiment, cell, index, best, target, late)


def guided_deadlines(
    best: Tried, steps: float, octaves: float, catch_up: float, tolerance: float
) -> tuple[Deadline, ...]:
    """`too_late` for a run whose rate is so many octaves away from the best; see `LearningRates` for the rest."""
    early = max(_EARLY_STEP, _EARLY_PART * steps)
    return too_late(best, steps, min(1.0, catch_up * octaves), tolerance, early, _EARLY_GAIN)


def _step(rates: LearningRates, inner: Inner) -> int:
    """Grid places from the best rate to its neighbours: a whole factor only where nothing is known."""
    return max(1, rates.places // 2) if inner else rates.places


def _limited(experiment: Experiment, cell: Cell, index: int, inner: Inner, num_tried: int) -> Run:
    """A run to the lowest target that ends when it needs more steps and tokens than the batch before did.

    The limit grows if several runs didn't reach the target.
    """
    best = best_of(inner[0]) if inner else None
    if best is None or not math.isfinite(steps := best.steps_to_target[-1]):
        return experiment.run(cell, index)
    slack = _SLACK * 2 ** max(0, num_tried - 2)
    smaller = max(1.0, best.run.batch_tokens / cell.batch_tokens)
    most = two_evaluations_on(slack * smaller * steps, best.run)
    most = min(most, experiment.run(cell, index).steps_left(0, 0, cell.batch_tokens))
    return experiment.run(cell, index, max_steps=most)


def _log_steps(t: Tried, best: Tried, target: int) -> float | None:
    """log(steps to a target); if a run below the best rate ended above it, an estimate from its delay at its end.

    None for a run that diverged, or whose rate is higher than the best: it might never reach the target.
    """
    least = math.log(best.steps_to_target[target])
    if math.isfinite(t.steps_to_target[target]):
        return math.log(t.steps_to_target[target])
    if t.run.learning_rate > best.run.learning_rate or t.result.status == "diverged" or len(t.losses) < 2:
        return None
    passed = np.flatnonzero(best.losses <= t.losses.min())
    delay = math.log(t.steps[-1] / best.steps[passed[0]]) if len(passed) else 0.0
    return max(least + max(delay, 0.0), math.log(t.result.steps))
