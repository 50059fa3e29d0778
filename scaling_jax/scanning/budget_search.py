"""The learning-rate search of a budget scan: at every horizon, the best rate is to lie between two others.

One learning rate gives the losses at all horizons of a batch size, so one search serves them all. Which rates it tries
depends only on losses of finished runs. So a scan that is killed and continued tries the same ones.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from scaling_jax.scanning.budget_scan import BudgetScan
from scaling_jax.scanning.experiment import Cell, LearningRates

Losses = Sequence[float]  # at each horizon of a cell, nats per token; infinite where the run diverged
Find = Callable[[Cell, int], Losses | None]  # of a cell and a rate index; None if its runs aren't done


class CellSearch(NamedTuple):
    """How far the search of a cell is."""

    tried: dict[int, Losses]  # {rate index: losses}
    wanted: tuple[int, ...]  # rate indices that are to be trained now; () once the search has ended


def search_all(scan: BudgetScan, find: Find) -> dict[Cell, CellSearch]:
    """The searches of all cells that have begun.

    For each model and seed, the search of the middle batch size starts at the rule, with rates a whole factor apart.
    Those of further batch sizes start at the best place of their neighbour, which stands for its best rate times the
    rule, with the nearest places. They begin when the neighbour's search has ended.
    """
    found: dict[Cell, CellSearch] = {}
    batches = sorted(scan.batch_tokens)
    middle = len(batches) // 2
    for subject in scan.subjects:
        rates = subject.learning_rates
        for seed in scan.seeds:

            def search(
                batch: int, start: int, first_step: int, rates=rates, name=subject.model.name, seed=seed
            ) -> int | None:
                cell = Cell(name, batch, seed)
                found[cell] = search_cell(rates, start, first_step, lambda index: find(cell, index))
                return None if found[cell].wanted else middle_place(found[cell].tried)

            best = search(batches[middle], 0, rates.places)
            for further in (batches[middle + 1 :], batches[:middle][::-1]):
                start = best
                for batch in further:
                    if start is None:
                        break
                    start = search(batch, start, 1)
    return found


def search_cell(rates: LearningRates, start: int, first_step: int, find: Callable[[int], Losses | None]) -> CellSearch:
    """The search of one cell, from its finished runs.

    Args:
      start: the rate index to start at.
      first_step: rate indices between the first neighbours.
      find: the losses at a rate index, or None if its runs aren't done.
    """
    tried: dict[int, Losses] = {}
    while wave := next_places(rates, tried, start, first_step):
        found = {index: find(index) for index in wave}
        tried.update({index: losses for index, losses in found.items() if losses is not None})
        if missing := tuple(index for index in wave if found[index] is None):
            return CellSearch(tried, missing)
    return CellSearch(tried, ())


def next_places(rates: LearningRates, tried: Mapping[int, Losses], start: int, first_step: int) -> list[int]:
    """The rate indices to try next; [] when the search has ended.

    The best rate at each horizon gets neighbours on both sides, `first_step` places apart, then half as many, down to
    one place. At most `LearningRates.most` rates are tried; those that the longest horizon asks for come first.
    """
    room = rates.most - len(tried)
    if not tried:
        return [start, start + first_step, start - first_step][:room]
    step = first_step
    while step:
        wanted = []
        for losses in reversed(list(zip(*tried.values(), strict=True))):  # the longest horizon first
            of_index = dict(zip(tried, losses, strict=True))
            best = best_place(of_index)
            wanted += [min(tried) - rates.places] if best is None else [best + step, best - step]
        if new := [index for index in dict.fromkeys(wanted) if index not in tried]:
            return new[: max(room, 0)]
        step //= 2
    return []


def best_place(of_index: Mapping[int, float]) -> int | None:
    """The rate index with the lowest loss, the lower one of two; None if all runs diverged."""
    best = min(sorted(of_index), key=lambda index: of_index[index])
    return best if math.isfinite(of_index[best]) else None


def middle_place(tried: Mapping[int, Losses]) -> int:
    """The best rate index at the middle horizon; if all runs diverged there, the lowest that was tried."""
    losses = list(zip(*tried.values(), strict=True))
    best = best_place(dict(zip(tried, losses[len(losses) // 2], strict=True)))
    return min(tried) if best is None else best
