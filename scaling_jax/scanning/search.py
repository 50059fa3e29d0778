"""The learning-rate search of one cell: which runs come next, by those that have ended."""

from collections.abc import Callable, Iterable, Mapping
from functools import partial

from scaling_jax.scanning import grid_search, guided_search
from scaling_jax.scanning.experiment import Cell, Experiment
from scaling_jax.scanning.guided_search import Inner
from scaling_jax.scanning.tried import Outcome, Tried, best_at, best_of, look_at
from scaling_jax.training import Run


def search(experiment: Experiment, cell: Cell, train: Callable[[Run], Outcome], inner: Inner = ()) -> list[Tried]:
    """Runs the learning-rate search of a cell. Which runs it makes depends only on the results; see `next_wave`.

    Args:
      train: returns the outcome of a run.
      inner: what was tried in each of `Experiment.inner(cell)`.
    """
    tried: dict[int, Tried] = {}
    while wave := next_wave(experiment, cell, tried, inner):
        for index, run in wave.items():
            tried[index] = look_at(experiment.subject(cell.model).target_losses, train(run))
    return list(tried.values())


def search_all(experiment: Experiment, train: Callable[[Run], Outcome]) -> dict[Cell, list[Tried]]:
    """`search` for every cell, each after those that guide it."""
    found: dict[Cell, list[Tried]] = {}
    for cell in in_order(experiment, experiment.cells):
        found[cell] = search(experiment, cell, train, [found[inner] for inner in experiment.inner(cell)])
    return found


def in_order(experiment: Experiment, cells: Iterable[Cell]) -> list[Cell]:
    """The cells, each after those of its `Experiment.inner` that are among them, otherwise in their order."""
    left, found = list(cells), []
    while left:
        found.append(next(cell for cell in left if not set(experiment.inner(cell)) & set(left)))
        left.remove(found[-1])
    return found


def next_wave(experiment: Experiment, cell: Cell, tried: Mapping[int, Tried], inner: Inner = ()) -> dict[int, Run]:
    """The next runs of the search, {rate index: run}; empty when the search has ended.

    The first runs are at the middle of the grid, or where `inner` predicts the best rate. Then the search takes the
    best rate at the lowest target and tries its neighbours, until both sides are tried, then places between them. It
    goes on with the same for each higher target. A run that is made for a target ends at that target. It ends earlier
    once it can no longer be the best: after the steps of the best run, after `LearningRates.give_up_factor` times the
    best run's steps to some target on the way, or when it is `too_late` at some loss.
    """
    subject = experiment.subject(cell.model)
    rates, targets = subject.learning_rates, subject.target_losses
    guided = rates.search == "guided"
    if not tried:
        return guided_search.first(experiment, cell, inner) if guided else grid_search.first(experiment, cell)
    wanted, challenger = grid_search.wanted, grid_search.challenger
    if guided:
        wanted = partial(guided_search.wanted, inner=inner)
        challenger = partial(guided_search.challenger, inner=inner, num_tried=len(tried))
    last = len(targets) - 1
    for target in range(last, -1, -1):
        # Leave out runs that were made for a higher target and ended there.
        as_far = {i: t for i, t in tried.items() if t.goal <= targets[target]}
        best = best_at(as_far.values(), target)
        if best is None:
            if target < last:
                continue
            best = best_of(as_far.values())
        room = min(rates.together, rates.most - len(tried))
        if new := [index for index in wanted(rates, as_far, best, target) if index not in tried]:
            return {index: challenger(experiment, cell, index, best, target) for index in new[:room]}
    return {}
