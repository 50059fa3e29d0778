"""The critical batch size measured in three ways on the same runs: noise scale, batch-size scan, branches.

    python experiments/three_measurements.py [RESULTS]      # results/demo unless given

The demo, whose results it continues: the scan with a tuned learning rate at every batch size, the noise scale that its
runs measured at every step, and branches of its runs of 256 tokens at 2 to 32 times the batch size (Merrill et al.
2025), four replicates of each from up to eight points along each run. Writes three_measurements.csv (all at the same
losses, tokens) and the figures, of which three_measurements.png is the one to look at. `SEEDS = (0, 1)` also writes
seeds.csv, how far seeds lie apart.

Takes 5 to 12 minutes on two CPU cores after the demo; interrupted, the same command continues. What came out is in
experiments/results/three_measurements.
"""

import dataclasses
import sys
from pathlib import Path

from scaling_jax.cli.results import show
from scaling_jax.console import commands
from scaling_jax.results import read_results
from scaling_jax.scanning.experiment import DEMO

SEEDS = (0,)
EXPERIMENT = dataclasses.replace(DEMO, seeds=SEEDS)
BRANCHED_BATCH_TOKENS = 256
FACTORS = (2, 4, 8, 16, 32)
REPLICATES = 4  # of each branch, and of the run itself from each point on
BETAS = "run"  # Adam's β stay those of the run; "half-life" would make β1 = 0.03 at 32 times the batch
TOLERANCE = 0.02  # nats per token that a branch may fall behind


def main(results: Path) -> None:
    commands.scan_on_console(EXPERIMENT, results)
    models = [subject.model.name for subject in EXPERIMENT.subjects]
    commands.branch_on_console(
        read_results(results),
        models,
        BRANCHED_BATCH_TOKENS,
        TOLERANCE,
        factors=FACTORS,
        branch_steps=8,
        replicates=REPLICATES,
        betas=BETAS,
    )
    show(results)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("results/demo"))
