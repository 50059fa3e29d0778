"""How fast is a training step, next to plain PyTorch's of the same model?

    pip install -e '.[bench]'
    python benchmarks/step.py [--also PYTHON] [4x256:16384 ...]

Tokens per second on all cores of this machine. Ours is `Program.steps`, noise scale measured at every step, in one
process: "threads" is one device whose operations share the cores, "devices" a device a core that shares the batch
(pmap), "fsdp" the same with the parameters, their sums and Adam's state divided over the devices. PyTorch takes the
whole batch at once, without a noise scale, with its fused attention and Adam. Rounds are interleaved; the ratio is to
eager or compiled, to whichever the median of rounds is smaller. Name cases to run fewer. PYTHON is the interpreter of
another environment, with another JAX, that is measured beside this one's.

Peak is the floating-point rate of a large matrix product in JAX, measured in each round; "share" is the part of it that
"devices" reaches, counting 6 FLOP per token and weight and 12·layers·T·D for attention.
"""

import argparse
import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import time

SIZES = {"2x64": (2, 64, 2, 256, 64), "4x128": (4, 128, 4, 256, 64), "4x256": (4, 256, 4, 512, 256)}  # V, T last
CASES = [f"{size}:{batch}" for size in SIZES for batch in (512, 4_096)] + ["4x256:16384"]
ROUNDS = 9
SECONDS = 0.5  # a measurement
# Each call takes its memory anew, and a run's calls are long: this many steps at least, unless they take longer than
# MOST_SECONDS.
FEWEST_STEPS = 8
MOST_SECONDS = 4.0
ROWS = 2_000


def model_of(case: str):
    from scaling_jax.tasks import ModelConfig

    n_layer, d_model, n_head, vocab_size, context = SIZES[case.split(":")[0]]
    return ModelConfig(n_layer, d_model, n_head, vocab_size=vocab_size, context=context)


def flop_per_token(case: str) -> float:
    m = model_of(case)
    return 6 * (m.num_params + m.d_model * m.vocab_size) + 12 * m.n_layer * m.context * m.d_model


def data_of(case: str, steps: int):
    import numpy as np

    model, batch = model_of(case), int(case.split(":")[1])
    draws = np.random.default_rng(0)
    rows = draws.integers(0, model.vocab_size, (ROWS, model.context + 1)).astype(np.uint16)
    return rows, draws.integers(0, ROWS, (steps, batch // model.context))


def ours(case: str, sharding: str):
    """`num_steps -> takes them`."""
    import jax

    from scaling_jax.parallel import replicate
    from scaling_jax.training import Run
    from scaling_jax.training.program import program_for

    num_devices = jax.local_device_count()
    run = Run(model_of(case), int(case.split(":")[1]), 1e-3, max_steps=1)
    program = program_for(run, num_devices, sharding=sharding)
    rows, order = data_of(case, program.steps_per_call)
    rows, state = replicate(rows, num_devices), program.first_state(0)

    def steps(count):
        nonlocal state
        for start in range(0, count, len(order)):
            state, _ = program.steps(state, rows, order[: count - start], 1e-3, 1)

    return steps


def can_be_sharded(case: str) -> bool:
    """False if a device has one sequence: then no part of the batch is smaller than what all devices take at once."""
    import jax

    return int(case.split(":")[1]) // model_of(case).context >= 2 * jax.local_device_count()


def pytorch(case: str, compiled: bool):
    import torch
    from torch_gpt import training_step

    step = training_step(model_of(case), compiled)
    rows, order = (torch.from_numpy(x) for x in data_of(case, 64))

    def steps(count):
        for i in range(count):
            step(rows[order[i % len(order)]].long())

    return steps


def matmul_flop_per_second() -> float:
    import jax
    import numpy as np

    matmul = jax.jit(lambda x: x @ x)
    x = jax.device_put(np.ones((2_048, 2_048), np.float32))
    matmul(x).block_until_ready()
    start = time.perf_counter()
    for _ in range(3):
        matmul(x).block_until_ready()
    return 3 * 2 * 2_048**3 / (time.perf_counter() - start)


def measure() -> None:
    """The worker: "case variant" is answered with tokens per second; a new case or variant is compiled first."""
    steps, count = {}, {}
    for line in sys.stdin:
        request = line.strip()
        if request in ("version", "torch"):
            print(importlib.metadata.version("jax" if request == "version" else "torch"), flush=True)
            continue
        if request == "matmul":
            print(matmul_flop_per_second(), flush=True)
            continue
        case, variant = request.split()
        if variant == "fsdp" and not can_be_sharded(case):
            print(math.nan, flush=True)
            continue
        if request not in steps:
            if variant in ("eager", "compiled"):
                steps[request] = pytorch(case, variant == "compiled")
            else:
                steps[request] = ours(case, "fsdp" if variant == "fsdp" else "replicated")
            steps[request](2)
            start = time.perf_counter()
            steps[request](2)
            seconds_per_step = (time.perf_counter() - start) / 2
            count[request] = max(
                2, round(SECONDS / seconds_per_step), min(FEWEST_STEPS, round(MOST_SECONDS / seconds_per_step))
            )
        start = time.perf_counter()
        steps[request](count[request])
        print(json.dumps(count[request] * int(case.split(":")[1]) / (time.perf_counter() - start)), flush=True)


def worker(python: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen(
        [python, __file__, "worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
    )


def ask(process: subprocess.Popen, request: str) -> str:
    process.stdin.write(request + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def to_the_better(ours: list[float], *baselines: list[float]) -> list[float]:
    """Round by round. Not to the best of each round, which would be whichever the machine disturbed less."""
    ratios = [[a / b for a, b in zip(ours, baseline, strict=True)] for baseline in baselines]
    return min(ratios, key=statistics.median)


def spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def main(pythons: list[str], cases: list[str]) -> None:
    cores = len(os.sched_getaffinity(0))
    one_thread_a_device = f"--xla_force_host_platform_device_count={cores} --xla_cpu_multi_thread_eigen=false"
    torch = worker(sys.executable, OMP_NUM_THREADS=str(cores))
    workers = {("eager", ""): torch, ("compiled", ""): torch}
    for python in pythons:
        devices = worker(python, XLA_FLAGS=one_thread_a_device)
        jax = ask(devices, "version")
        workers |= {("threads", jax): worker(python), ("devices", jax): devices, ("fsdp", jax): devices}
    first = next(jax for _, jax in workers if jax)
    print(
        f"{cores} cores; PyTorch {ask(torch, 'torch')}; thousands of tokens per second, medians of {ROUNDS} rounds; "
        "ratio to the better PyTorch [lowest, highest]"
    )
    for case in cases:
        rates = {key: [] for key in workers}
        peaks = []
        for (variant, _), process in workers.items():
            ask(process, f"{case} {variant}")  # compiles
        for _ in range(ROUNDS):
            peaks.append(float(ask(workers["threads", first], "matmul")))
            for (variant, jax), process in workers.items():
                rates[variant, jax].append(float(ask(process, f"{case} {variant}")))
        torch_rates = rates["eager", ""], rates["compiled", ""]
        k_tokens = {key: f"{statistics.median(values) / 1e3:.1f}" for key, values in rates.items()}
        flop = flop_per_token(case)
        share = flop * statistics.median(r / p for r, p in zip(rates["devices", first], peaks, strict=True))
        print(
            f"{case}: eager {k_tokens['eager', '']}, compiled {k_tokens['compiled', '']}; share {share:.0%} of "
            f"{statistics.median(peaks) / 1e9:.0f} GFLOP/s"
        )
        for (variant, jax), values in rates.items():
            if jax:
                ratio = spread(to_the_better(values, *torch_rates))
                print(f"    {jax:10} {variant:8} {k_tokens[variant, jax]:>7}   {ratio}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["worker"]:
        measure()
    else:
        parser = argparse.ArgumentParser()
        parser.add_argument("--also", action="append", default=[])
        parser.add_argument("cases", nargs="*", default=CASES)
        asked = parser.parse_args()
        main([sys.executable, *asked.also], asked.cases)
