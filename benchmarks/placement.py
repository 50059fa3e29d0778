"""Where should independent small runs go: a process pinned to each core, or one process over all of them?

    python benchmarks/placement.py

Interleaves rounds of (a) one worker alone over all cores, (b) a worker on each core, and prints tokens per second of
the whole machine as a ratio to (a). Takes about 4 minutes on two cores.
"""

import json
import os
import statistics
import subprocess
import sys

CASES = [("1x32", 256), ("1x32", 4_096), ("2x64", 256), ("2x64", 4_096)]
ROUNDS = 5
_FLAGS = "--xla_cpu_multi_thread_eigen="


def worker(cores: set[int], threads: bool) -> subprocess.Popen:
    """A process that times a call of every case each time it is given a line."""
    process = subprocess.Popen(
        [sys.executable, __file__, "worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": _FLAGS + str(threads).lower()},
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    process.stdout.readline()
    return process


def measure() -> None:
    """The worker: compiles all cases, then answers each case's number with tokens per second."""
    import time

    import jax
    import numpy as np

    from scaling_jax.tasks import model_config
    from scaling_jax.training import Run
    from scaling_jax.training.program import program_for

    rows = jax.device_put(np.random.default_rng(0).integers(0, 256, (10_000, 65)).astype(np.uint16))
    programs, states = [], []
    for size, batch_tokens in CASES:
        program = program_for(Run(model_config(size), batch_tokens, 1e-3, max_steps=1))
        programs.append(program)
        states.append(program.init(0))
    orders = [np.random.default_rng(0).integers(0, 10_000, (steps_of(b), b // 64)) for _, b in CASES]
    for i, program in enumerate(programs):
        states[i], _ = program.steps(states[i], rows, orders[i], 1e-3, 1)
    print("ready", flush=True)
    for line in sys.stdin:
        i = int(line)
        start = time.perf_counter()
        states[i], _ = programs[i].steps(states[i], rows, orders[i], 1e-3, 1)
        seconds = time.perf_counter() - start
        print(json.dumps(orders[i].size * 64 / seconds), flush=True)


def steps_of(batch_tokens: int) -> int:
    return min(64, max(8, 65_536 // batch_tokens))


def tokens_per_second(workers: list[subprocess.Popen], case: int) -> float:
    for w in workers:
        w.stdin.write(f"{case}\n")
        w.stdin.flush()
    return sum(float(w.stdout.readline()) for w in workers)


def main() -> None:
    cores = os.sched_getaffinity(0)
    together = [worker(cores, threads=True)]
    apart = [worker({core}, threads=False) for core in cores]
    print(f"{len(cores)} cores; ratio of tokens per second, a process on each core / one process over all of them")
    print("model   batch   median   lowest   highest")
    for case, (size, batch_tokens) in enumerate(CASES):
        ratios = []
        for _ in range(ROUNDS):
            one = tokens_per_second(together, case)
            ratios.append(tokens_per_second(apart, case) / one)
        print(
            f"{size}  {batch_tokens:6,}  {statistics.median(ratios):6.2f}×  {min(ratios):6.2f}×  {max(ratios):7.2f}×",
            flush=True,
        )


if __name__ == "__main__":
    measure() if sys.argv[1:] == ["worker"] else main()
