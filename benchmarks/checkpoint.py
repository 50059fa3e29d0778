"""What does a checkpoint cost the step loop? The demo's models, saved as often as the demo saves: once in 60 seconds.

    python -m benchmarks.checkpoint [--model 2x64] [--batch-tokens 2048] [--pairs 8]

In turns: two seconds of steps with a save at their start, whose writing goes on meanwhile, and two seconds without. The
difference of their times is what the save cost, waiting and writing together. Takes a minute. Ours, with other work on
both cores: 23 ms of waiting, 67 ms in all, 0.11 %.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from scaling_jax.parallel import replicate
from scaling_jax.tasks import model_config
from scaling_jax.training import Run
from scaling_jax.training.checkpoints import Checkpoints
from scaling_jax.training.program import program_for

SECONDS_BETWEEN_SAVES = 60.0
BLOCK_SECONDS = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="2x64")
    parser.add_argument("--batch-tokens", type=int, default=2_048)
    parser.add_argument("--pairs", type=int, default=8)
    options = parser.parse_args()
    run = Run(model_config(options.model), options.batch_tokens, 1e-3, max_steps=1)
    with tempfile.TemporaryDirectory() as folder:
        with_save, without, waits = measure(run, Path(folder), options.pairs)
    cost = statistics.median(a - b for a, b in zip(with_save, without, strict=True))
    print(
        f"{options.model}, {options.batch_tokens:,} tokens: a save keeps the loop waiting for "
        f"{1e3 * statistics.median(waits):.0f} ms and costs it {1e3 * cost:.0f} ms in all, "
        f"{100 * cost / SECONDS_BETWEEN_SAVES:.2f} % at one in {SECONDS_BETWEEN_SAVES:.0f} s"
    )


def measure(run: Run, folder: Path, pairs: int) -> tuple[list[float], list[float], list[float]]:
    """Seconds of blocks with a save, of blocks without, and of the wait for each save."""
    program = program_for(run)
    state = replicate(program.init(0), 1)
    rows = replicate(np.random.default_rng(0).integers(0, 256, (4_096, run.model.context + 1)).astype(np.uint16), 1)
    order = np.arange(run.steps_per_call * run.batch_sequences).reshape(run.steps_per_call, -1) % 4_096
    checkpoints = Checkpoints(folder)

    def block(calls: int, save: bool) -> tuple[float, float]:
        nonlocal state
        start = time.perf_counter()
        if save:
            checkpoints.save(state, "")
        waited = time.perf_counter() - start
        for _ in range(calls):
            state, _ = program.steps(state, rows, order, run.learning_rate, 10)
        return time.perf_counter() - start, waited

    block(1, save=True)  # compiles
    calls = max(1, round(BLOCK_SECONDS / block(1, save=False)[0]))
    found = [(block(calls, save=True), block(calls, save=False)) for _ in range(pairs)]
    checkpoints.close()
    return [a for (a, _), _ in found], [b for _, (b, _) in found], [waited for (_, waited), _ in found]


if __name__ == "__main__":
    main()
