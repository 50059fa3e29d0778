"""Which batch size for a budget? The best batch against the horizon, and B_crit, from annealed losses.

    python experiments/horizon.py [RESULTS]      # results/horizon unless given

The demo's smaller model (1×32) on Python source. For each batch size and each of four learning rates, one run at a
constant rate, from which decays to zero over the last tenth of a horizon branch off, at horizons of 131k to 1.05M
tokens. So 28 runs give 100 losses of decayed runs, for 1.08 times the tokens of the longest ones. Then look at them as
losses at budgets (the best batch at each horizon), and as steps to a loss (B_crit):

    scaling-jax fit results/horizon/annealed.csv
    scaling-jax fit results/horizon/annealed.csv --to-steps

Took 29 minutes, with twice as many horizons, on two CPU cores that others used as well. What came out is in
experiments/results/horizon. At every horizon the smallest batches are the best, as far as can be told; 4,096 tokens
cost 0.41 nats at 131k tokens, 0.21 at 1.05M. B_crit is 1.6k tokens [1.3k, 2.0k] at 2.39 nats and 2.1k [1.8k, 2.5k] at
2.19; further down too few batches reach the loss. The demo, at constant rates, has 2.9k at 2.22 nats for this model:
small batches gain more from a decay than large ones do, so B_crit of decayed runs is lower.
"""

import concurrent.futures
import itertools
import multiprocessing
import os
import sys
from pathlib import Path

from scaling_jax.data import prepare
from scaling_jax.io.files import write_rows
from scaling_jax.io.workers import available_cores
from scaling_jax.parallel.devices import keep_compiled_programs
from scaling_jax.scanning import LearningRates, powers_of_two
from scaling_jax.scanning.annealing import AnnealedLoss, AnnealingPlan, log_horizons, train_annealed
from scaling_jax.tasks import model_config
from scaling_jax.training import Run

MODEL = model_config("1x32")
RATES = LearningRates(8e-3, 512, places=2)
PLACES = (-1, 0, 1, 2)  # in steps of √2 around the demo's rule
BATCHES = powers_of_two(256, 16_384)
SHARE = 0.1
HORIZONS = log_horizons(2**17, 2**20, per_doubling=1, largest_batch=BATCHES[-1])


def plans() -> list[AnnealingPlan]:
    """One for each batch size and learning rate, the longest first."""
    found = []
    for batch_tokens, place in itertools.product(BATCHES, PLACES):
        run = Run(
            model=MODEL,
            batch_tokens=batch_tokens,
            learning_rate=RATES.rate(batch_tokens, place),
            warmup_steps=0,
            max_tokens=HORIZONS[-1],
            eval_tokens=65_536,
        )
        horizons = tuple(tokens for tokens in HORIZONS if tokens * SHARE >= 2 * batch_tokens)
        found.append(AnnealingPlan(run, horizons, SHARE))
    return found


def anneal(plan: AnnealingPlan, workdir: Path) -> list[AnnealedLoss]:
    keep_compiled_programs()
    corpus = prepare(plan.run.text, MODEL.context)
    return train_annealed(plan, workdir, corpus=corpus, num_devices=1)


def main(workdir: Path) -> None:
    prepare(plans()[0].run.text, MODEL.context)  # before the workers start, so that one of them packs it
    cores = multiprocessing.get_context("spawn").SimpleQueue()
    for core in available_cores():
        cores.put(core)
    with concurrent.futures.ProcessPoolExecutor(
        len(available_cores()), multiprocessing.get_context("spawn"), _pin, (cores,)
    ) as pool:
        losses = []
        for plan, found in zip(plans(), pool.map(anneal, plans(), itertools.repeat(workdir)), strict=True):
            losses += found
            print(f"{plan.run.label}: {len(found)} horizons", flush=True)
    write_rows(workdir / "annealed.csv", AnnealedLoss, losses)


def _pin(cores) -> None:
    """Gives a worker a core of its own."""
    core = cores.get()
    if core is not None:
        os.sched_setaffinity(0, {core})


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("results/horizon"))
