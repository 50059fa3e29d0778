"""Kills the quick demo, a guided scan and a run with a ramp again and again; their ends must be the undisturbed ones.

    python -m tests.robustness.soak --kills 30

Takes about 20 minutes on two CPU cores. What gets to its end before its next kill is compared, and the next kind is
begun, with an empty cache. So kills meet packing, compilation, training, evaluations, stages of the ramp, fits, figures
and the report. Exit code 0: everything ended with the same bytes.
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SIGNALS = (signal.SIGINT, signal.SIGKILL, signal.SIGTERM)
_OF_SCANS = (
    *("measurements.csv", "fit.json", "noise_scale.csv", "experiment.json", "figures/*.svg", "figures/*.png"),
    *("report.html", "cells/*.json", "runs/*/metrics.jsonl", "runs/*/result.json"),
)
COMPARED = {  # files that each ends with
    "demo": _OF_SCANS,
    "scan": _OF_SCANS,
    "train": ("runs/*/metrics.jsonl", "runs/*/result.json", "runs/*/config.json"),
}
GUIDED = """
import dataclasses
from scaling_jax.scanning import LearningRates
from scaling_jax.scanning.experiment import QUICK
subject = dataclasses.replace(QUICK.subjects[0], learning_rates=LearningRates(1.6e-2, 2_048))
EXPERIMENT = dataclasses.replace(QUICK, subjects=(subject,), batch_tokens=(256, 512, 1_024, 2_048))
"""  # a search that each batch's neighbours guide, and ends that go on until both limits show
STAGES = [{"tokens": 100_000 * k, "batch_tokens": 128 << k} for k in range(4)]
LONGEST_SECONDS = 15.0  # until a kill
EXPECTED_CODES = (0, 130, -signal.SIGKILL, -signal.SIGTERM)


def start(kind: str, place: Path) -> subprocess.Popen:
    """Starts a command, or continues it, in a folder with its results and its cache."""
    place.mkdir(exist_ok=True)
    arguments = ["--quick"]
    if kind == "scan":
        (place / "guided.py").write_text(GUIDED)
        arguments = [str(place / "guided.py"), "--min-batch-tokens", "128", "--max-batch-tokens", "4096"]
    if kind == "train":
        (place / "ramp.json").write_text(json.dumps(STAGES))
        arguments = ["--model", "1x16", "--learning-rate", "1e-2", "--max-tokens", "600k"]
        arguments += ["--ramp", str(place / "ramp.json"), "--set", "steps_per_call=8"]
    return subprocess.Popen(
        [sys.executable, "-m", "scaling_jax.cli.main", kind, *arguments, "--results", str(place / "results")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"SCALING_JAX_CACHE": str(place / "cache")},
    )


def finish(process: subprocess.Popen) -> int | None:
    """None at the command's end; otherwise the exit code, if the documentation knows it and no traceback was shown."""
    output, errors = process.communicate(timeout=600)
    if process.returncode not in EXPECTED_CODES or "Traceback" in errors:
        raise SystemExit(f"exit code {process.returncode}:\n{errors}")
    ended = process.returncode == 0 and "saved; run the same command again" not in output  # as SIGTERM has it
    return None if ended else process.returncode


def ends(kind: str, place: Path) -> dict[str, bytes]:
    """{name: content} of the files that are compared."""
    results = place / "results"
    paths = [path for pattern in COMPARED[kind] for path in results.glob(pattern)]
    return {path.relative_to(results).as_posix(): path.read_bytes() for path in paths}


def soak(folder: Path, kinds: list[str], kills: int, seed: int) -> None:
    draws, began = random.Random(seed), time.monotonic()

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {line}", flush=True)

    say(f"seed {seed}, folder {folder}")
    undisturbed = {}
    for kind in kinds:
        if finish(start(kind, folder / f"undisturbed-{kind}")) is not None:
            raise SystemExit(f"the undisturbed {kind} was disturbed")
        undisturbed[kind] = ends(kind, folder / f"undisturbed-{kind}")
        say(f"undisturbed {kind} done, {len(undisturbed[kind])} files")
    done = 0
    for finished, kind in enumerate(itertools.cycle(kinds), 1):
        place = folder / f"disturbed-{finished}"
        while True:
            process, how, after = start(kind, place), draws.choice(SIGNALS), draws.uniform(1, LONGEST_SECONDS)
            if done < kills:
                try:
                    process.wait(after)
                except subprocess.TimeoutExpired:
                    process.send_signal(how)
            if (code := finish(process)) is None:
                break
            done += 1
            say(f"kill {done}, of {kind}: {how.name} after {after:.1f} s, exit code {code}")
        found = ends(kind, place)
        if names := [name for name in found | undisturbed[kind] if found.get(name) != undisturbed[kind].get(name)]:
            raise SystemExit(f"{place} differs in {', '.join(names)}")
        say(f"{kind} ended with the same bytes")
        if done >= kills and finished >= len(kinds):
            return


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--kinds", nargs="+", choices=COMPARED, default=list(COMPARED))
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--folder", type=Path, help="keeps all results; a temporary one unless given")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        soak(arguments.folder or Path(temporary), arguments.kinds, arguments.kills, arguments.seed)


if __name__ == "__main__":
    main()
