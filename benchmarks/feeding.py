"""What does feeding cost? The 3M model at batches of 65,536 tokens, from a small corpus and from a large one.

    python -m benchmarks.feeding [--steps 3] [--model 4x256] [--batch-tokens 65536]

In turns: a step on rows that already lie on the device, in an order made beforehand (nothing is fed), a step fed from a
small corpus, and one from a memory-mapped corpus above `RESIDENT_BYTES` whose next rows are read meanwhile. Prints the
wait for each batch as a share of the step's time. Then the whole work of feeding a step, with nothing to hide behind,
over many batches: a bound that the noise between minute-long steps doesn't blur. Takes about 10 minutes on two cores.
Ours, with `--steps 1` and other work on both cores: no wait above 0.2 ms in steps of 15 … 44 s; all work of feeding
19 ms a step, 0.06 %.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from scaling_jax.data import Corpus, rows_of
from scaling_jax.data.feeding import RESIDENT_BYTES, Feeder, Span, is_resident
from scaling_jax.parallel import replicate
from scaling_jax.tasks import model_config
from scaling_jax.training import Run
from scaling_jax.training.program import program_for


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--model", default="4x256")
    parser.add_argument("--batch-tokens", type=int, default=65_536)
    options = parser.parse_args()
    run = Run(model_config(options.model), options.batch_tokens, 1e-3, max_steps=1, steps_per_call=1)
    with tempfile.TemporaryDirectory() as folder:
        large = made_up_corpus(Path(folder) / "tokens", run.model.context)
        small = Corpus(np.array(large.train_RxT1[:200_000]), large.test_RxT1, 256, {"sha256": "made up, small"})
        assert is_resident(small)
        assert not is_resident(large)
        corpora = {"small, resident": small, "large, read ahead": large}
        steps = {kind: take_steps(run, corpus, options.steps) for kind, corpus in corpora.items()}
        nothing_fed = take_steps(run, None, options.steps)
        seconds, waits = {}, {}
        for _ in range(options.steps):
            seconds.setdefault("nothing fed", []).append(next(nothing_fed)[0])
            for kind, taken in steps.items():
                step, wait = next(taken)
                seconds.setdefault(kind, []).append(step)
                waits.setdefault(kind, []).append(wait)
        fixed = statistics.median(seconds["nothing fed"])
        print(f"{run.model.name}, {run.batch_tokens:,} tokens a step: {fixed:.2f} s with nothing fed")
        for kind, corpus in corpora.items():
            shares = [100 * wait / step for wait, step in zip(waits[kind], seconds[kind], strict=True)]
            print(
                f"{kind:18} step {statistics.median(seconds[kind]):.2f} s; wait for the batch "
                f"{max(waits[kind]) * 1e3:.1f} ms at most = {max(shares):.3f} % of the step"
            )
            for at_once in (1, 16):
                work = feeding_seconds(corpus, run.batch_sequences, at_once)
                print(
                    f"{'':18} all work of feeding, {at_once:2} steps at once: {work * 1e3:.1f} ms a step "
                    f"= {100 * work / fixed:.3f} %"
                )


def take_steps(run: Run, corpus: Corpus | None, count: int):
    """Yields seconds of a step and of its wait for the batch; the first, which compiles, isn't counted."""
    program = program_for(run)
    state = replicate(program.init(0), 1)
    batch = run.batch_sequences
    if corpus is None:
        draws = np.random.default_rng(0)
        rows = replicate(draws.integers(0, 256, (batch, run.model.context + 1)).astype(np.uint16), 1)
        order = np.arange(batch)[None]
        for step in range(count + 1):
            start = time.perf_counter()
            state, _ = program.steps(state, rows, order, run.learning_rate, 10)
            if step:
                yield time.perf_counter() - start, 0.0
        return
    with Feeder(corpus, 0, 1) as feeder:
        for step in range(count + 1):
            start = time.perf_counter()
            fed = feeder.batches(Span(step * batch, 1, batch))
            waited = time.perf_counter() - start
            feeder.expect(Span((step + 1) * batch, 1, batch))
            state, _ = program.steps(state, fed.rows, fed.order_SxB, run.learning_rate, 10, fed.own_rows)
            if step:
                yield time.perf_counter() - start, waited


def feeding_seconds(corpus: Corpus, batch: int, at_once: int, spans: int = 20) -> float:
    """Seconds of feeding a step when each batch is asked for without notice."""
    with Feeder(corpus, 0, at_once) as feeder:
        feeder.batches(Span(0, at_once, batch))
        start = time.perf_counter()
        for k in range(1, spans + 1):
            feeder.batches(Span(k * at_once * batch, at_once, batch))
        return (time.perf_counter() - start) / spans / at_once


def made_up_corpus(path: Path, context: int) -> Corpus:
    """Random tokens on disk, a tenth above `RESIDENT_BYTES`."""
    draws = np.random.default_rng(0)
    with path.open("wb") as file:
        for _ in range(RESIDENT_BYTES * 11 // 10 // (16 << 20) + 1):
            file.write(draws.integers(0, 256, 8 << 20).astype(np.uint16).data)
    rows = rows_of(np.memmap(path, np.uint16, "r"), context)
    return Corpus(rows, rows[:16], 256, {"sha256": "made up, large"})


if __name__ == "__main__":
    main()
