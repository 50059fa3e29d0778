"""Does giving up slow learning rates change what a scan measures? Trains those that were given up to their end.

    python experiments/giving_up.py results/demo

A rate that needs `LearningRates.give_up_factor` (2) times the best one's steps to some loss on the way is given up.
This trains each such run of a finished scan again without that rule, in its folder's to_the_end, and prints at how many
target losses it would have been the best of its batch size. Expect none: then every measurement, and B_crit with it, is
what it would have been. In the demo 9 of 68 runs are given up. Takes two minutes on two CPU cores.
"""

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np

from scaling_jax.parallel.devices import keep_compiled_programs
from scaling_jax.results import read_results
from scaling_jax.scanning.cells import find_outcome
from scaling_jax.scanning.tried import best_at, look_at
from scaling_jax.training import train


def main(results: Path) -> None:
    cells, workdir = read_results(results).cells, results / "to_the_end"
    keep_compiled_programs()
    print("given up                       steps to the lowest loss / the best rate's   targets at which it is best")
    for cell in cells:
        targets = cell.subject.target_losses
        for t in cell.tried:
            if t.result.status != "given up":
                continue
            # Long enough to see whether it comes from behind.
            run = dataclasses.replace(t.run, deadlines=(), max_steps=2 * t.run.max_steps if t.run.max_steps else None)
            train(run, workdir, keep_checkpoint=False)
            outcome = find_outcome(run, workdir)
            assert outcome is not None
            whole = look_at(targets, outcome)
            bests = [best_at(cell.tried, k) for k in range(len(targets))]
            ratios = np.array(
                [
                    whole.steps_to_target[k] / b.steps_to_target[k] if b is not None else math.nan
                    for k, b in enumerate(bests)
                ]
            )
            reached = ratios[np.isfinite(ratios)]
            last = f"{reached[-1]:.2f}" if len(reached) else "never there"
            print(f"{cell.name} at {run.learning_rate:g}".ljust(34) + f"{last:>36}{int(np.sum(ratios < 1)):>26}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
