"""Where do a scan's tokens buy the narrowest honest interval: seeds, batch sizes, learning rates or losses?

    python experiments/scan_designs.py

Scans of noisy quadratics (quadratic_scan.py) whose runs differ by luck as those of small models do, about 5 % in steps.
Each line is a design: its tokens, as a multiple of the first line's; the median width of the 95 % intervals of B_crit,
in logs; how many of them hold the truth; the median and the spread of log(measured/true); and width·√tokens, which is
the same for all designs that only average more: smaller is better.

Takes eight minutes on a CPU core. Expect no design to be much better per token, but some not to be honest: with 2^¼
between rates large batches come out too slow and B_crit 4 % too small, which the intervals of one seed hold, those of
four seeds don't. 2^⅛ holds with two seeds, 2^1/16 with four. docs/measuring.md has the table.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from quadratic_scan import NoisyTraining, draw, fitted, scan_experiment, true_tradeoff

from scaling_jax.scanning import Experiment, log_spaced
from scaling_jax.scanning.search import search_all

SCANS = 20
MULTIPLICITY = 100  # parameters of an eigenvalue: few, so that runs differ
LOW, HIGH = 64, 65_536


class Design(NamedTuple):
    """How a scan spends its tokens."""

    name: str
    seeds: int = 1
    per_doubling: float = 1.0  # batch sizes
    places: int = 4
    rate_tolerance: float = 0.02
    losses: int = 3

    def experiment(self) -> Experiment:
        count = round(math.log2(HIGH / LOW) * self.per_doubling) + 1
        batches = tuple(round(x) for x in np.geomspace(LOW, HIGH, count))
        losses = log_spaced(0.25, 0.1, self.losses) if self.losses > 1 else (0.1,)
        found = scan_experiment(losses, batches, places=self.places, rate_tolerance=self.rate_tolerance)
        return dataclasses.replace(found, seeds=tuple(range(self.seeds)))


DESIGNS = (
    Design("the default"),
    Design("2 seeds", seeds=2),
    Design("4 seeds", seeds=4),
    Design("2 batches a doubling", per_doubling=2.0),
    Design("a batch every 2 doublings", per_doubling=0.5),
    Design("the same, 2 seeds", per_doubling=0.5, seeds=2),
    Design("rates at 2^½", places=2),
    Design("rates at 2^⅛", places=8),
    Design("rates at 2^⅛, 2 seeds", places=8, seeds=2),
    Design("rates at 2^⅛, 4 seeds", places=8, seeds=4),
    Design("rates at 2^1/16", places=16),
    Design("rates at 2^1/16, 2 seeds", places=16, seeds=2),
    Design("rates at 2^1/16, 4 seeds", places=16, seeds=4),
    Design("rate_tolerance 0.005", rate_tolerance=0.005),
    Design("rate_tolerance 0.08", rate_tolerance=0.08),
    Design("1 loss", losses=1),
    Design("9 losses", losses=9),
)


class Measured(NamedTuple):
    """One B_crit of one scan."""

    tokens: int  # of the whole scan
    error: float  # log(measured/true)
    width: float  # log of the ratio of the interval's ends; infinite if it is open
    holds: bool


def measured(design: Design) -> Iterator[Measured]:
    experiment = design.experiment()
    losses = experiment.subjects[0].target_losses
    for number in range(SCANS):
        problem = draw(number, MULTIPLICITY)
        train = NoisyTraining(problem, number)
        tried = search_all(experiment, train).values()
        tokens = sum(t.result.tokens for cell in tried for t in cell)
        fit = fitted(experiment, train.records, resamples=50)
        truths = {loss: true_tradeoff(problem, (LOW, HIGH), loss).b_crit for loss in losses}
        for point in fit.points:
            true, (low, high) = truths[point.loss], point.tradeoff.b_crit_interval
            width = math.log(high / low) if low > 0 and high < math.inf else math.inf
            yield Measured(tokens, math.log(point.tradeoff.b_crit / true), width, low <= true <= high)


def main() -> None:
    print(f"{'':26}{'tokens':>8}{'width':>8}{'hold':>7}{'error':>8}{'spread':>8}{'width·√tokens':>15}")
    first = None
    for design in DESIGNS:
        rows = list(measured(design))
        tokens, errors = np.mean([row.tokens for row in rows]), np.array([row.error for row in rows])
        first = tokens if first is None else first
        width = float(np.median([row.width for row in rows]))
        spread = np.subtract(*np.quantile(errors, (0.84, 0.16))) / 2
        print(
            f"{design.name:26}{tokens / first:8.2f}{width:8.3f}{np.mean([row.holds for row in rows]):7.1%}"
            f"{np.median(errors):8.3f}{spread:8.3f}{width * math.sqrt(tokens / first):15.3f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
