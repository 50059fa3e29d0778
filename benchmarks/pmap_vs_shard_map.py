"""Does it matter whether the step is wrapped by pmap or by shard_map?

    python benchmarks/pmap_vs_shard_map.py

`Program.steps` of one batch over a virtual CPU device a core, both backends in interleaved rounds in one process: the
ratio of their tokens per second, and the time a call of one step of a tiny model takes, which is all overhead.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={len(os.sched_getaffinity(0))} --xla_cpu_multi_thread_eigen=false"
)

import statistics
import time

import jax
import numpy as np

from scaling_jax.parallel import replicate
from scaling_jax.tasks import model_config
from scaling_jax.training import Run
from scaling_jax.training.program import program_for

CASES = [("1x16", 512, 1), ("2x64", 512, 16), ("2x64", 4_096, 8), ("4x128", 4_096, 2)]  # model, batch tokens, steps
ROUNDS = 9


def timed(model: str, batch_tokens: int, num_steps: int, backend: str):
    """`() -> seconds` of a call, compiled."""
    num_devices = jax.local_device_count()
    run = Run(model_config(model), batch_tokens, 1e-3, max_steps=1)
    program = program_for(run, num_devices, backend)
    draws = np.random.default_rng(0)
    rows = replicate(draws.integers(0, 256, (2_000, 65)).astype(np.uint16), num_devices)
    order = draws.integers(0, 2_000, (num_steps, run.batch_sequences))
    state = replicate(program.init(0), num_devices)

    def seconds():
        nonlocal state
        start = time.perf_counter()
        state, _ = program.steps(state, rows, order, 1e-3, 1)
        return time.perf_counter() - start

    seconds()
    return seconds


def main() -> None:
    print(f"{jax.local_device_count()} CPU devices; medians of {ROUNDS} interleaved rounds")
    print("model   batch  steps a call  pmap ms  shard_map ms  shard_map / pmap")
    for model, batch_tokens, num_steps in CASES:
        pmap, shard_map = (timed(model, batch_tokens, num_steps, backend) for backend in ("pmap", "shard_map"))
        pairs = [(pmap(), shard_map()) for _ in range(ROUNDS)]
        ratios = [b / a for a, b in pairs]
        a, b = (1e3 * statistics.median(x) for x in zip(*pairs, strict=True))
        print(
            f"{model:6} {batch_tokens:6,} {num_steps:13} {a:8.2f} {b:13.2f}  "
            f"{statistics.median(ratios):5.2f} [{min(ratios):.2f}, {max(ratios):.2f}]",
            flush=True,
        )


if __name__ == "__main__":
    main()
