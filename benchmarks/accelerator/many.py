"""Stage "many": how much faster do many small runs train in one program than one by one?

Tokens per second of `population.Slots` with 1 … 64 runs over those of `Program.steps`, which trains a single run; both
with all that happens on the host between calls. Contexts of 64 tokens, 257 ids, float32.
"""

import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
from figures import arguments

from scaling_jax.parallel import replicate
from scaling_jax.parallel.devices import keep_compiled_programs
from scaling_jax.tasks import model_config
from scaling_jax.training import Run
from scaling_jax.training.population import Slots
from scaling_jax.training.program import program_for

CASES = [("1x32", 512, 64), ("2x64", 512, 64), ("2x64", 4_096, 64), ("4x256", 4_096, 16)]  # model, tokens, steps a call
RUNS = (4, 16, 64)
ROUNDS = 3


def main() -> None:
    given = arguments()
    keep_compiled_programs()
    cases, numbers = ([("1x16", 128, 64)], (1, 2)) if given.toy else (CASES, RUNS)
    rows = replicate(np.random.default_rng(0).integers(0, 257, (2_000, 65)).astype(np.uint16), 1)

    def one_by_one(program, order):
        state = replicate(program.init(0), 1)

        def call():
            nonlocal state
            state, _ = program.steps(state, rows, order, 1e-3, 10)

        return call

    def at_once(program, order, num_runs):
        slots = Slots(program, 1, num_runs)
        return lambda: slots.steps(rows, [order] * num_runs, [1e-3] * num_runs, [10] * num_runs)

    def compiled(call):
        start = time.monotonic()
        call()
        return round(time.monotonic() - start, 1)

    calls, compile_seconds = {}, {}
    with ThreadPoolExecutor(16) as pool:
        for name, batch_tokens, num_steps in cases:
            program = program_for(Run(model_config(name), batch_tokens, 1e-3, max_steps=1), 1)
            order = np.random.default_rng(1).integers(0, 2_000, (num_steps, program.batch_sequences))
            calls[name, batch_tokens, 0] = one_by_one(program, order.astype(np.int32))
            for n in numbers:
                calls[name, batch_tokens, n] = at_once(program, order.astype(np.int32), n)
        for key, call in calls.items():
            compile_seconds[key] = pool.submit(compiled, call)
    given.figures.add("first call, seconds", {f"{key}": job.result() for key, job in compile_seconds.items()})

    def seconds(call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    for name, batch_tokens, num_steps in cases:
        for n in numbers:
            pairs = [
                (seconds(calls[name, batch_tokens, 0]), seconds(calls[name, batch_tokens, n])) for _ in range(ROUNDS)
            ]
            given.figures.add(
                f"{name}, {batch_tokens} tokens, {n} runs",
                {
                    "speedup": round(statistics.median(n * one / many for one, many in pairs), 2),
                    "one_by_one_tokens_per_second": round(
                        num_steps * batch_tokens / statistics.median(p[0] for p in pairs)
                    ),
                    "milliseconds_a_step": [
                        round(1e3 / num_steps * statistics.median(p[k] for p in pairs), 3) for k in (0, 1)
                    ],
                },
            )
    jax.clear_caches()


if __name__ == "__main__":
    sys.exit(main())
