"""How long does the uncertainty of a law take: 4,000 resamples of a scan, two-stage and joint?

    python benchmarks/fit.py

A planted scan of 7 batches, 14 losses and 2 sizes with 5 % noise. The baseline redoes the two-stage chain one resample
at a time through the public functions, as a script of one's own would (they find each trade-off's own interval, too);
all are timed in the same rounds. Vectorised numpy, nothing is compiled, so that the first call costs what every call
does; it takes one core.

Takes about half a minute. Seen on two cores shared with others: two-stage 0.55 s (worst 0.82 s), joint 0.44 s (worst
0.51 s), one at a time 27 minutes. The two-stage kernel as one jitted, vmapped program instead took 0.86 s, after 9 s of
compiling, where numpy took 1.23 s in the same rounds on a busy machine.
"""

import statistics
import time

import numpy as np

from scaling_jax.fitting import fit_joint, fit_loss_law, fit_scan, fit_tradeoff

RESAMPLES = 4_000
BASELINE_RESAMPLES = 8  # timed, and scaled up to RESAMPLES
ROUNDS = 5
BATCHES = 256 * 2 ** np.arange(7)
LOSSES = np.geomspace(2.9, 1.75, 14)


def planted_scan(seed: int = 0) -> dict[str, np.ndarray]:
    """Columns of `fit_scan`: B_crit = 1,800 tokens at the middle of the losses, exponent -4.8."""
    m, b, t = (index.ravel() for index in np.indices((2, len(BATCHES), len(LOSSES))))
    b_crit = 1_800 * (LOSSES / np.sqrt(LOSSES[0] * LOSSES[-1])) ** -4.8
    noise = np.random.default_rng(seed).standard_normal(m.shape)
    steps = 300 * (LOSSES[0] / LOSSES[t]) ** 6 * (1 + b_crit[t] / BATCHES[b]) * np.exp(0.05 * noise)
    models = np.array(["small", "large"])[m]
    return {"model": models, "batch_tokens": BATCHES[b], "target_loss": LOSSES[t], "steps": steps}


def one_at_a_time(columns: dict[str, np.ndarray], resamples: int) -> None:
    """The chain of `fit_scan` in a loop: trade-offs at each loss, then the law through them."""
    rng = np.random.default_rng(0)
    for _ in range(resamples):
        steps = columns["steps"] * np.exp(0.05 * rng.standard_normal(columns["steps"].shape))
        points = []
        for model in ("small", "large"):
            for loss in LOSSES:
                rows = (columns["model"] == model) & (columns["target_loss"] == loss)
                points.append((loss, fit_tradeoff(columns["batch_tokens"][rows], steps[rows]).b_crit))
        fit_loss_law(*np.transpose(points))


def seconds(function, *args, **kwargs) -> float:
    start = time.perf_counter()
    function(*args, **kwargs)
    return time.perf_counter() - start


def main() -> None:
    columns = planted_scan()
    first = seconds(fit_scan, **columns, resamples=RESAMPLES)
    rounds = [
        (
            seconds(fit_scan, **columns, resamples=RESAMPLES),
            seconds(fit_joint, **columns, resamples=RESAMPLES),
            seconds(one_at_a_time, columns, BASELINE_RESAMPLES) * RESAMPLES / BASELINE_RESAMPLES,
        )
        for _ in range(ROUNDS)
    ]
    print(f"first call, two-stage: {first:.2f} s")
    for name, times in zip(("two-stage", "joint", "one at a time"), zip(*rounds, strict=True), strict=True):
        print(f"{name}, {RESAMPLES:,} resamples: median {statistics.median(times):.2f} s, worst {max(times):.2f} s")


if __name__ == "__main__":
    main()
