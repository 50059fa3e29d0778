"""Do short decays off one run, whole cosine runs, averaged weights and plain weights give one B_crit?

    python experiments/decays.py [RESULTS] [WORKERS]      # results/decays and 1 unless given

The demo's smaller model (1×32) on Python source, at six batch sizes and three horizons each. At each batch size four
ways to judge a loss after D tokens, each at its own best learning rate, by the search of budget scans:

- annealed: a decay to zero over the last tenth of D, branched off one run with a constant rate. One whole WSD run at
  each batch size tells whether that makes a difference;
- cosine: a whole run to D whose rate falls along a cosine to zero;
- average: a run to D with a constant rate, judged by an average of its weights with a half-life of D/16;
- constant: the plain weights of a run with a constant rate.

Takes 14 minutes with one worker on a free core. Decays and averages need the same steps to a loss within 3 %. Cosine
runs need 1.2 to 1.6 times as many, and their B_crit is 0.73 [0.59, 0.89] times that of decays. Plain weights need up
to 40 % more steps at small batches; theirs is 1.36 [1.12, 1.65] times that of decays: experiments/results/decays.

Writes losses.csv (which `scaling-jax fit losses.csv --to-steps` reads, with the ways as models) and compared.csv.
"""

import concurrent.futures
import itertools
import math
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy import interpolate, optimize

from scaling_jax import LearningRates, Run, Schedule, fitting, model_config, train
from scaling_jax.data import prepare
from scaling_jax.fitting.best_rate import best_losses
from scaling_jax.io.files import write_rows
from scaling_jax.parallel.devices import keep_compiled_programs
from scaling_jax.scanning.annealing import AnnealedLoss, AnnealingPlan, train_annealed
from scaling_jax.scanning.budget_search import Losses, best_place, search_cell
from scaling_jax.training import run_folder
from scaling_jax.training.records import read_course

MODEL = model_config("1x32")
RATES = LearningRates(8e-3, 512, places=2, most=5)
FIRST = 2**17
HORIZONS = {
    256: (1, 2, 4),  # times FIRST
    512: (1, 2, 4),
    1_024: (1, 2, 4),
    2_048: (2, 4, 8),
    4_096: (2, 4, 8),
    8_192: (4, 8, 16),
}
LOSSES = 4  # at which B_crit is compared


def run_of(batch_tokens: int, place: int, tokens: int, **values) -> Run:
    return Run(
        model=MODEL,
        batch_tokens=batch_tokens,
        learning_rate=RATES.rate(batch_tokens, place),
        warmup_steps=0,
        max_tokens=tokens,
        eval_tokens=65_536,
        eval_growth=8.0,
        **values,
    )


def last_loss(run: Run, workdir: Path) -> float:
    result = train(run, workdir, corpus=prepare(run.text, MODEL.context), num_devices=1, keep_checkpoint=False)
    return math.inf if result.test_loss is None or result.status == "diverged" else result.test_loss


def annealed(batch_tokens: int, place: int, horizons: tuple[int, ...], workdir: Path) -> Losses:
    plan = _plan(batch_tokens, place, horizons)
    corpus = prepare(plan.run.text, MODEL.context)
    found = {row.tokens: row.loss for row in train_annealed(plan, workdir, corpus=corpus, num_devices=1)}
    return [found.get(tokens, math.inf) for tokens in horizons]


def cosine(batch_tokens: int, place: int, horizons: tuple[int, ...], workdir: Path) -> Losses:
    return [last_loss(run_of(batch_tokens, place, d, schedule=Schedule("cosine", d)), workdir) for d in horizons]


def average(batch_tokens: int, place: int, horizons: tuple[int, ...], workdir: Path) -> Losses:
    runs = [run_of(batch_tokens, place, d, average_half_life_tokens=d / 16) for d in horizons]
    return [last_loss(run, workdir) for run in runs]


def constant(batch_tokens: int, place: int, horizons: tuple[int, ...], workdir: Path) -> Losses:
    run = run_of(batch_tokens, place, horizons[-1], eval_every_tokens=horizons[0])
    last_loss(run, workdir)
    course = read_course(run_folder(workdir, run))
    found = dict(zip(course.eval_tokens.tolist(), course.eval_losses.tolist(), strict=True))
    return [found.get(tokens, math.inf) for tokens in horizons]


WAYS: dict[str, Callable[[int, int, tuple[int, ...], Path], Losses]] = {
    way.__name__: way for way in (annealed, cosine, average, constant)
}


class Compared(NamedTuple):
    """A way to judge losses: steps to a loss at each batch size, and what they give."""

    way: str
    loss: float
    steps_256: float
    steps_512: float
    steps_1024: float
    steps_2048: float
    steps_4096: float
    steps_8192: float
    s_min: float
    e_min: float
    b_crit: float
    b_crit_low: float
    b_crit_high: float


def measure(job: tuple[str, int], workdir: Path) -> list[AnnealedLoss]:
    """The losses of one way at one batch size, at all learning rates of its search."""
    way, batch_tokens = job
    keep_compiled_programs()
    horizons = tuple(FIRST * n for n in HORIZONS[batch_tokens])
    search = search_cell(RATES, 0, 1, lambda place: WAYS[way](batch_tokens, place, horizons, workdir))
    rows = [
        AnnealedLoss(way, batch_tokens, tokens, loss if loss < math.inf else math.nan, RATES.rate(batch_tokens, k), 0)
        for k, losses in sorted(search.tried.items())
        for tokens, loss in zip(horizons, losses, strict=True)
    ]
    if way == "annealed":
        place = best_place({k: losses[1] for k, losses in search.tried.items()})
        assert place is not None
        whole = _plan(batch_tokens, place, horizons).annealed[1]
        loss, decayed = last_loss(whole, workdir / "whole"), search.tried[place][1]
        print(f"{batch_tokens:,} tokens: whole WSD run {loss:.7g}, decay off a trunk {decayed:.7g}", flush=True)
    return rows


def compare(rows: list[AnnealedLoss]) -> list[Compared]:
    """Steps to losses that all batch sizes reach in all ways, and the trade-off through them."""
    tokens_to = {}
    ranges = []
    for way, batch in itertools.product(WAYS, HORIZONS):
        own = [row for row in rows if (row.model, row.batch_tokens) == (way, batch) and math.isfinite(row.loss)]
        horizons = sorted({row.tokens for row in own})
        lowest = [_best([row for row in own if row.tokens == d]) for d in horizons]
        losses = optimize.isotonic_regression(lowest, increasing=False).x
        loss, first = np.unique(losses, return_index=True)
        tokens_to[way, batch] = interpolate.PchipInterpolator(loss, np.log(horizons)[first])
        ranges.append((loss[-1], loss[0]))
    high, low = min(r[0] for r in ranges), max(r[1] for r in ranges)
    found = []
    for way, target in itertools.product(WAYS, np.geomspace(high, low, LOSSES + 2)[1:-1]):
        steps = [float(np.exp(tokens_to[way, batch](target))) / batch for batch in HORIZONS]
        fit = fitting.fit_tradeoff(list(HORIZONS), steps)
        values = [way, float(target), *steps, fit.s_min, fit.e_min, fit.b_crit, *fit.b_crit_interval]
        found.append(Compared._make(values))
    return found


def main(workdir: Path, workers: int) -> None:
    prepare(run_of(512, 0, FIRST).text, MODEL.context)
    jobs = list(itertools.product(WAYS, HORIZONS))
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, spawn) as pool:
        rows = []
        for job, found in zip(jobs, pool.map(measure, jobs, itertools.repeat(workdir)), strict=True):
            rows += found
            print(f"{job[0]}, {job[1]:,} tokens: {len(found) // 3} learning rates", flush=True)
    write_rows(workdir / "losses.csv", AnnealedLoss, rows)
    compared = compare(rows)
    write_rows(workdir / "compared.csv", Compared, compared)
    for row in compared:
        print(
            f"{row.way:9} {row.loss:.3f} nats: B_crit {row.b_crit:,.0f} [{row.b_crit_low:,.0f}, {row.b_crit_high:,.0f}]"
        )


def _plan(batch_tokens: int, place: int, horizons: tuple[int, ...]) -> AnnealingPlan:
    return AnnealingPlan(run_of(batch_tokens, place, horizons[-1]), horizons, 0.1)


def _best(rows: list[AnnealedLoss]) -> float:
    """The loss at the best learning rate, between those tried."""
    columns = (np.array([float(row[k]) for row in rows]) for k in (1, 3, 4))
    return float(best_losses(*columns).loss[0])


if __name__ == "__main__":
    given = sys.argv[1:]
    main(Path(given[0]) if given else Path("results/decays"), int(given[1]) if len(given) > 1 else 1)
