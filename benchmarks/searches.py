"""What does each search of learning rates cost the demo, and how near does it come to all rates together?

    python -m benchmarks searches        (or: python benchmarks/searches.py FOLDER)

Replays searches on the runs of experiments/demo_dense.py, which it first trains if FOLDER (results/demo-dense) doesn't
hold them: half an hour on two cores. A run at a rate that wasn't trained is that of the nearest one, as much slower as
a parabola of curvature 1.2 says. Each line: the runs and tokens of a search, the latter also as a multiple of those of
its best runs; the width of the intervals of B_crit, in logs; and how far B_crit lies from that of all runs together.

Then: of two runs whose rates differ by a factor of 1.25 to 2, how often would the guided search give up the second for
the first, how often would the second have needed 2 % fewer steps all the same, and how many steps do all stops cost?
"""

import dataclasses
import itertools
import math
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np

from experiments.demo_dense import EXPERIMENT
from experiments.quadratic_scan import fitted
from scaling_jax.fitting import ScanFit
from scaling_jax.results import Results, RunRecord, read_results
from scaling_jax.scanning import Experiment, scan
from scaling_jax.scanning.experiment import DEMO
from scaling_jax.scanning.guided_search import guided_deadlines
from scaling_jax.scanning.search import search_all
from scaling_jax.scanning.tried import Outcome, best_of
from scaling_jax.training import Run, RunResult, next_evaluation
from scaling_jax.training.journal import ending
from scaling_jax.training.metrics import MetricsLine, course

CURVATURE = 1.2  # of log steps in log rate, of the recorded runs about their best rate
SAME_RATE = 0.01  # in logs


class Replay:
    """A `train` for `search_all` that plays recorded runs."""

    def __init__(self, results: Results):
        self.recorded: dict[tuple[str, int, int], list[tuple[float, np.ndarray, np.ndarray]]] = defaultdict(list)
        for record in results.runs:
            if record.result is not None and record.result.status == "reached":
                run, outcome = record.run, record.outcome
                curve = math.log(run.learning_rate), np.array(outcome.steps, float), np.array(outcome.losses)
                self.recorded[run.model.name, run.batch_tokens, run.seed].append(curve)
        self.records: list[RunRecord] = []

    def __call__(self, run: Run) -> Outcome:
        curves, log_rate = self.recorded[run.model.name, run.batch_tokens, run.seed], math.log(run.learning_rate)
        there, steps, losses = min(curves, key=lambda curve: abs(curve[0] - log_rate))
        if abs(there - log_rate) > SAME_RATE:
            best, _, _ = min(curves, key=lambda curve: curve[1][-1])
            farther = (log_rate - best) ** 2 - (there - best) ** 2
            steps = steps * math.exp(CURVATURE / 2 * max(farther, 0.0))
        lines, status, step = [], None, 0
        while status is None:
            before, step = step, min(next_evaluation(step, run.eval_growth), run.steps_left(0, 0, run.batch_tokens))
            loss = float(np.interp(math.log(step), np.log(steps), losses))
            lines.append(MetricsLine.told(before, step, run.batch_tokens, loss))
            status = ending(run, lines[-2:])
        result = RunResult(run.run_id, status, step, step * run.batch_tokens, loss, "")
        self.records.append(RunRecord(Path(run.run_id), run, {}, result, course(lines)))
        return self.records[-1].outcome


def with_rates(**changes) -> Experiment:
    """The demo with other settings of its searches."""
    subjects = (
        dataclasses.replace(s, learning_rates=dataclasses.replace(s.learning_rates, **changes)) for s in DEMO.subjects
    )
    return dataclasses.replace(DEMO, subjects=tuple(subjects))


SEARCHES = {
    "the demo's": DEMO,
    "seed 0": dataclasses.replace(DEMO, seeds=(0,)),
    "seed 1": dataclasses.replace(DEMO, seeds=(1,)),
    "every other batch": dataclasses.replace(DEMO, batch_tokens=DEMO.batch_tokens[::2]),
    "places = 2": with_rates(places=2),
    "places = 8": with_rates(places=8),
    "catch_up = 0.04": with_rates(catch_up=0.04),
    "catch_up = 0.16": with_rates(catch_up=0.16),
    "rate_tolerance = 0.01": with_rates(rate_tolerance=0.01),
    "rate_tolerance = 0.04": with_rates(rate_tolerance=0.04),
    "grid, catch_up = 0.15": with_rates(search="grid", catch_up=0.15),
}


def stops(results: Results, batches: tuple[int, ...], faster: bool, catch_up: float) -> tuple[float, float, float]:
    """(share of runs given up, share of these that would have won by 2 %, mean loss in log steps by giving up).

    Args:
      faster: the second run has the higher rate.
    """
    given_up, wrong, loss = [], [], []
    for cell in results.cells:
        ended = [t for t in cell.tried if math.isfinite(t.steps_to_target[-1])] if cell.batch_tokens in batches else []
        for first, second in itertools.permutations(ended, 2):
            octaves = math.log2(second.run.learning_rate / first.run.learning_rate)
            if not 0.3 <= abs(octaves) <= 1.05 or (octaves > 0) != faster:
                continue
            steps = float(first.steps_to_target[-1])
            late = guided_deadlines(
                first, steps, abs(octaves), catch_up, DEMO.subjects[0].learning_rates.rate_tolerance
            )
            given_up.append(any((second.losses[second.steps <= d.step] > d.loss).all() for d in late))
            gain = math.log(steps / second.steps_to_target[-1])
            wrong.append(given_up[-1] and gain > 0.02)
            loss.append(max(gain, 0.0) * given_up[-1])
    return float(np.mean(given_up)), sum(wrong) / max(sum(given_up), 1), float(np.mean(loss))


def width(fit: ScanFit) -> float:
    return float(np.median([math.log(p.b_crit_interval[1] / p.b_crit_interval[0]) for p in fit.points]))


def main(folder: Path) -> None:
    results = read_results(scan(EXPERIMENT, folder))
    dense = fitted(EXPERIMENT, results.runs, resamples=50)
    of_all = {(point.model, point.loss): point.b_crit for point in dense.points}
    print(f"{'':24}{'runs':>6}{'tokens':>9}{'/ best':>8}{'width':>8}{'median off':>12}{'most':>7}{'within 3 %':>12}")
    for name, experiment in SEARCHES.items():
        replay = Replay(results)
        tried = list(search_all(experiment, replay).values())
        tokens = sum(t.result.tokens for cell in tried for t in cell)
        fit = fitted(experiment, replay.records, resamples=50)
        off = np.abs([math.log(point.b_crit / of_all[point.model, point.loss]) for point in fit.points])
        print(
            f"{name:24}{sum(map(len, tried)):6}{tokens / 1e6:8.1f}M"
            f"{tokens / sum(best_of(cell).result.tokens for cell in tried):8.2f}{width(fit):8.3f}"
            f"{np.median(off):11.1%}{off.max():8.1%}{f'{(off < 0.03).sum()} of {len(off)}':>11}",
            flush=True,
        )
    tokens = sum(record.result.tokens for record in results.runs if record.result is not None)
    print(f"{'all rates together':24}{len(results.runs):6}{tokens / 1e6:8.1f}M{'':8}{width(dense):8.3f}")
    print(f"\n{'the second run':40}{'given up':>10}{'wrongly':>10}{'log steps lost':>17}")
    for batches in (DEMO.batch_tokens[:2], DEMO.batch_tokens[2:4], DEMO.batch_tokens[4:]):
        for faster in (False, True):
            for catch_up in (0.08, 0.3):
                what = f"{batches[0]:,} to {batches[-1]:,}, {'higher' if faster else 'lower'} rate, {catch_up:g}"
                shares = stops(results, batches, faster, catch_up)
                print(f"{what:40}{shares[0]:10.0%}{shares[1]:10.0%}{shares[2]:17.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if sys.argv[1:] else "results/demo-dense"))
