"""Plans a budget scan without training: the tokens of trunks and decays, the runs, and the time."""

from pathlib import Path
from typing import NamedTuple

import jax

from scaling_jax.io.workers import available_cores
from scaling_jax.scanning.budget_records import check_same_scan, finder
from scaling_jax.scanning.budget_scan import BudgetScan
from scaling_jax.scanning.budget_search import CellSearch, search_all
from scaling_jax.scanning.experiment import Cell
from scaling_jax.scanning.plan import LEAST_RATES, MOST_WORKERS, plan_scan
from scaling_jax.training import Run, next_evaluation

USUAL_RATES = 4  # of a batch size: three, and often one more
_START_SECONDS = 1.0  # of each run, on its own core: reads the state, writes records
_EVALUATION = 1 / 3  # time of a token in an evaluation, against one in a training step


class CellCost(NamedTuple):
    """What one learning rate of a cell takes, and how many rates are tried."""

    cell: Cell
    horizons: int
    trunk_tokens: int
    decay_tokens: int  # of all decays together
    longest_tokens: int  # of the run to the last horizon alone
    separate_tokens: int  # of a run of its own for each horizon
    eval_tokens: int
    tried: int  # learning rates that are done
    most: int

    @property
    def tokens(self) -> int:
        return self.trunk_tokens + self.decay_tokens

    @property
    def runs(self) -> int:
        """The trunk and its decays."""
        return 1 + self.horizons

    @property
    def least_left(self) -> int:
        return max(min(LEAST_RATES, self.most) - self.tried, 1)

    @property
    def usual_left(self) -> int:
        return max(min(USUAL_RATES, self.most) - self.tried, 1)

    @property
    def most_left(self) -> int:
        return max(self.most - self.tried, 1)


class BudgetPlan(NamedTuple):
    """What a budget scan still takes on this machine."""

    cells: tuple[CellCost, ...]  # that aren't done
    cells_done: int
    workers: int
    seconds_per_rate: tuple[float, ...]  # of one worker, for each of `cells`
    timed: tuple[str, ...]  # models of which steps were timed
    bytes_needed: int  # of one worker, at most
    bytes_available: int

    @property
    def usual_tokens(self) -> int:
        return sum(c.usual_left * c.tokens for c in self.cells)

    @property
    def most_tokens(self) -> int:
        return sum(c.most_left * c.tokens for c in self.cells)

    @property
    def usual_seconds(self) -> float:
        return self._seconds([c.usual_left for c in self.cells])

    @property
    def most_seconds(self) -> float:
        return self._seconds([c.most_left for c in self.cells])

    def _seconds(self, rates: list[int]) -> float:
        together = sum(n * seconds for n, seconds in zip(rates, self.seconds_per_rate, strict=True))
        return max(together / self.workers, max(self.seconds_per_rate, default=0.0))


def plan_budget_scan(scan: BudgetScan, workdir: Path) -> BudgetPlan:
    """What `scan_budgets` would still do in a folder. Trains nothing but a few steps, and packs the text if needed.

    Raises:
      UserError: if a run needs more memory than there is, the text isn't there or doesn't fit a model, or the folder
        holds another scan.
    """
    check_same_scan(workdir, scan)
    searches = search_all(scan, finder(scan, workdir))
    waiting = [cell for cell in scan.cells if cell not in searches or searches[cell].wanted]
    costs = tuple(_cost(scan, cell, searches.get(cell)) for cell in waiting)
    steps = plan_scan(scan.to_a_loss(), workdir)
    alone = {p.cell[:2]: steps._replace(cells=(p,)) for p in steps.cells}
    per_token = {key: plan.most_seconds / plan.most_tokens for key, plan in alone.items()}
    largest = max(scan.batch_tokens)
    seconds = tuple(
        c.tokens * per_token[c.cell[:2]]
        + c.eval_tokens * _EVALUATION * per_token[c.cell.model, largest]
        + c.runs * _START_SECONDS
        for c in costs
    )
    on_cpu = jax.default_backend() == "cpu"
    return BudgetPlan(
        costs,
        len(scan.cells) - len(costs),
        min(len(available_cores()), MOST_WORKERS) if on_cpu else 1,
        seconds,
        steps.timed,
        max((p.bytes_needed for p in steps.cells), default=0),
        steps.bytes_available,
    )


def _cost(scan: BudgetScan, cell: Cell, search: CellSearch | None) -> CellCost:
    plan = scan.plan(cell, 0)
    assert plan.trunk.max_tokens is not None
    return CellCost(
        cell,
        horizons=len(plan.horizons),
        trunk_tokens=plan.trunk.max_tokens,
        decay_tokens=plan.num_tokens - plan.trunk.max_tokens,
        longest_tokens=plan.horizons[-1],
        separate_tokens=sum(plan.horizons),
        eval_tokens=scan.eval_tokens * (_evaluations(plan.trunk) + 2 * len(plan.horizons)),
        tried=0 if search is None else len(search.tried),
        most=scan.subject(cell.model).learning_rates.most,
    )


def _evaluations(run: Run) -> int:
    assert run.max_tokens is not None
    step, count = 0, 0
    while (step := next_evaluation(step, run.eval_growth)) < run.max_tokens // run.batch_tokens:
        count += 1
    return count + 1
