"""How long does a ramp's change of stage keep training waiting, with and without compiling ahead?

    python -m benchmarks.ramp_switch [--model 2x64] [--rounds 3]

Trains a ramp of two stages, each time in a fresh process: with an empty cache of compiled programs or with the one that
the process before filled, and with the second stage's program compiled ahead or not. The switch is the time from the
end of a stage's last step to the end of the next stage's first call, without what that many later steps take. The trace
of JAX tells how much of it went into compiling, or into reading the cache. Three rounds took twelve minutes beside
other work; docs/performance.md has ours.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

CASES = [(cache, ahead) for ahead in (False, True) for cache in ("empty", "filled")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="2x64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=2, metavar=("CACHE", "AHEAD"), help="one process: prints its switches as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(switches(options.model, Path(options.one[0]), options.one[1] == "ahead")))
        return
    found = {case: [] for case in CASES}
    for _ in range(options.rounds):
        for ahead in (False, True):
            with tempfile.TemporaryDirectory() as cache:
                for filled in ("empty", "filled"):
                    arguments = ["--model", options.model, "--one", cache, "ahead" if ahead else "without"]
                    command = [sys.executable, "-m", "benchmarks.ramp_switch", *arguments]
                    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                    found[filled, ahead] += json.loads(done.stdout.splitlines()[-1])
    print("compiled ahead   cache    switch, seconds [lowest, highest]   of these in the trace of compiling")
    for (cache, ahead), seen in found.items():
        seconds, traced = zip(*seen, strict=True)
        print(
            f"{'yes' if ahead else 'no':14}   {cache:6}   {statistics.median(seconds):7.2f} "
            f"[{min(seconds):.2f}, {max(seconds):.2f}]                {statistics.median(traced):.2f}"
        )


def switches(model: str, cache: Path, ahead: bool) -> list[tuple[float, float]]:
    """(seconds of waiting, seconds of compiling in the training thread) at each change of stage of a ramp."""
    import jax

    from scaling_jax.tasks import model_config
    from scaling_jax.training import Run, Stage, train
    from scaling_jax.training.program import Program

    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    traced: list[tuple[float, float]] = []  # (end, seconds) in the training thread
    calls: list[tuple[int, int, float, float]] = []  # (sequences, steps, start, end)

    def listen(name: str, seconds: float, **_) -> None:
        if threading.current_thread() is threading.main_thread() and "/compile/" in name:
            traced.append((time.perf_counter(), seconds))

    def timed(self, state, rows, order, *options):
        start = time.perf_counter()
        found = steps(self, state, rows, order, *options)
        calls.append((self.batch_sequences, len(order), start, time.perf_counter()))
        return found

    steps, Program.steps = Program.steps, timed
    jax.monitoring.register_event_duration_secs_listener(listen)
    run = Run(
        model=model_config(model),
        batch_tokens=512,
        learning_rate=1e-3,
        ramp=(Stage(600_000, 1_024, 2**0.5),),
        max_tokens=900_000,
        eval_growth=3.0,  # few evaluations, and none at a switch
    )
    with tempfile.TemporaryDirectory() as folder:
        train(run, folder, num_devices=1, compile_ahead=ahead)
    return [
        waited(calls[k - 1], call, [c for c in calls if c[0] == call[0]][1:], traced)
        for k, call in enumerate(calls)
        if k and call[0] != calls[k - 1][0]
    ]


def waited(before, call, later, traced) -> tuple[float, float]:
    """Seconds between two calls, and of the second beyond its steps; seconds of compiling meanwhile."""
    a_step = statistics.median((end - start) / steps for _, steps, start, end in later)
    _, steps, _, end = call
    compiling = sum(seconds for at, seconds in traced if before[3] < at <= end)
    return end - before[3] - steps * a_step, compiling


if __name__ == "__main__":
    main()
