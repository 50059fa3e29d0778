"""Does giving up slow learning rates change what a scan measures? Trains those that were given up to their end.

    python experiments/giving_up.py results/demo

A rate that needs `LearningRates.give_up_factor` (2) times the best one's steps to some loss on the way is given up.
This trains each such run of a finished scan again without that rule, and prints at how many target losses it would have
been the best of its batch size. Expect none: then every measurement, and B_crit with it, is what it would have been. In
the demo 9 of 68 runs are given up. Takes two minutes on two CPU cores.
"""

import dataclasses
import math
import sys
from pathlib import Path

import numpy as np

from scaling_jax.parallel.devices import keep_compiled_programs
from scaling_jax.results import read_experiment
from scaling_jax.scanning.search import best_at, finished, look_at
from scaling_jax.training import train


def main(results: Path) -> None:
    experiment = read_experiment(results)
    keep_compiled_programs()
    print("given up                       steps to the lowest loss / the best rate's   targets at which it is best")
    for group in experiment.groups:
        tried = finished(experiment, group, results) or []
        for t in tried:
            if t.result.status != "given up":
                continue
            # Long enough to see whether it comes from behind.
            run = dataclasses.replace(t.run, deadlines=(), max_steps=2 * t.run.max_steps if t.run.max_steps else None)
            whole = look_at(group, results, t.rate_index, run, train(run, results, keep_checkpoint=False))
            bests = [best_at(tried, k) for k in range(len(group.subject.target_losses))]
            ratios = np.array(
                [
                    whole.steps_to_target[k] / b.steps_to_target[k] if b is not None else math.nan
                    for k, b in enumerate(bests)
                ]
            )
            reached = ratios[np.isfinite(ratios)]
            last = f"{reached[-1]:.2f}" if len(reached) else "never there"
            print(f"{group.name} at {run.learning_rate:g}".ljust(34) + f"{last:>36}{int(np.sum(ratios < 1)):>26}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
