"""Kills the quick demo again and again, and compares what it ends with to a run that nobody disturbed.

    python -m tests.robustness.soak --kills 20

Takes about ten minutes on two CPU cores. A demo that gets to its end before its next kill is compared, and another is
begun. Exit code 0: every one ended with the same bytes.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGKILL, signal.SIGTERM)
COMPARED = ("measurements.csv", "fit.json", "noise_scale.csv", "experiment.json")
LONGEST_SECONDS = 15.0  # until a kill
EXPECTED_CODES = (0, 130, -signal.SIGKILL, -signal.SIGTERM)


def start(results: Path, cache: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-m", "scaling_jax.cli.main", "demo", "--quick", "--results", str(results)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SCALING_JAX_CACHE": str(cache)},
    )


def finish(process: subprocess.Popen) -> int | None:
    """None at the demo's end; otherwise the exit code, if the documentation knows it and no traceback was shown."""
    output, errors = process.communicate(timeout=600)
    if process.returncode not in EXPECTED_CODES or "Traceback" in errors:
        raise SystemExit(f"exit code {process.returncode}:\n{errors}")
    ended = process.returncode == 0 and "saved; run the same command again" not in output  # as SIGTERM has it
    return None if ended else process.returncode


def differing(results: Path, undisturbed: Path) -> list[str]:
    """Names of the files that aren't byte for byte the same."""
    return [name for name in COMPARED if (results / name).read_bytes() != (undisturbed / name).read_bytes()]


def soak(folder: Path, kills: int, seed: int) -> None:
    draws, cache, began = random.Random(seed), folder / "cache", time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {line}", flush=True)

    say(f"seed {seed}, folder {folder}")
    if finish(start(folder / "undisturbed", cache)) is not None:
        raise SystemExit("the undisturbed demo was disturbed")
    say("undisturbed demo done")
    done = finished = 0
    while True:
        results = folder / f"disturbed-{finished}"
        process, how, after = start(results, cache), draws.choice(SIGNALS), draws.uniform(1, LONGEST_SECONDS)
        if done < kills:
            try:
                process.wait(after)
            except subprocess.TimeoutExpired:
                process.send_signal(how)
        if (code := finish(process)) is not None:
            done += 1
            say(f"kill {done}: {how.name} after {after:.1f} s, exit code {code}")
            continue
        if names := differing(results, folder / "undisturbed"):
            raise SystemExit(f"{results} differs in {', '.join(names)}")
        finished += 1
        say(f"demo {finished} ended with the same bytes")
        if done >= kills:
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--folder", type=Path, help="keeps all results; a temporary one unless given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        soak(arguments.folder or Path(temporary), arguments.kills, arguments.seed)


if __name__ == "__main__":
    main()
