"""A whole scan as the project runs it against the same runs one after the other.

    python -m benchmarks.scan [--quick] [--rounds 1]      # from the repository; 30 minutes on two cores, --quick 6

Baseline: one process with all cores to itself trains every run of every cell in turn. Against it: `scan`, which on
CPUs keeps a process on each core, and on accelerators trains runs that share a program together. Both start with no
compiled programs; rounds alternate. Threads round differently, so that a search may try a rate more here or there: the
ratio is of tokens trained per second.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_ONE_BY_ONE = """
import sys
from pathlib import Path
from scaling_jax.scanning.cells import train_cell
from scaling_jax.parallel.devices import keep_compiled_programs
from benchmarks.scan import experiment
keep_compiled_programs()
chosen = experiment(sys.argv[1] == "quick")
for cell in chosen.cells:
    train_cell(chosen, cell, Path(sys.argv[2]), lambda: False, lambda _: None)
"""
_TOGETHER = """
import sys
from scaling_jax.scanning import scan
from benchmarks.scan import experiment
scan(experiment(sys.argv[1] == "quick"), sys.argv[2])
"""


def experiment(quick: bool):
    from scaling_jax.scanning.experiment import DEMO, QUICK

    return QUICK if quick else DEMO


def timed(code: str, quick: bool, keep: Path | None = None) -> tuple[float, int, int]:
    """Wall time of a scan in a fresh folder, its runs and their tokens; `keep` is where its results stay."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/compiled"}
        results = keep or Path(folder, "results")
        start = time.perf_counter()
        command = [sys.executable, "-c", code, "quick" if quick else "demo", str(results)]
        subprocess.run(command, check=True, env=environment)
        seconds = time.perf_counter() - start
        ended = [json.loads(path.read_text()) for path in (results / "runs").glob("*/result.json")]
        return seconds, len(ended), sum(result["tokens"] for result in ended)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a new folder for the last scan's results")
    options = parser.parse_args()
    ratios = []
    print(f"{'round':>5} {'one by one, s':>14} {'runs':>5} {'scan, s':>9} {'runs':>5} {'ratio':>6}")
    for n in range(options.rounds):
        one_by_one, runs, tokens = timed(_ONE_BY_ONE, options.quick)
        keep = options.keep if n == options.rounds - 1 else None
        together, more_runs, more_tokens = timed(_TOGETHER, options.quick, keep)
        ratios.append(more_tokens / together / (tokens / one_by_one))
        print(
            f"{n + 1:>5} {one_by_one:>14.0f} {runs:>5} {together:>9.0f} {more_runs:>5} {ratios[-1]:>6.2f}", flush=True
        )
    print(f"median {statistics.median(ratios):.2f} on {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
