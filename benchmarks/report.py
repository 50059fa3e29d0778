"""How long do `fit` and `report` take over a folder of 2,000 runs, and how much memory?

    python benchmarks/report.py --runs 2000

Makes the runs up: no training. Needs no accelerator, a minute or two on one core. Reports seconds and the peak of
memory of a process of its own for each step.
"""

import argparse
import json
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from scaling_jax.scanning import Experiment, LearningRates, Subject, log_spaced, powers_of_two
from scaling_jax.scanning.records import write_experiment, write_search
from scaling_jax.scanning.search import search_all
from scaling_jax.scanning.tried import Outcome
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import Run, RunResult
from scaling_jax.training.metrics import MetricsLine, course
from scaling_jax.training.records import write_metrics, write_result, write_run_config

STEPS = ("read", "fit", "report")


def b_crit(loss):
    return 1e5 * loss**-5.0


def make_up(folder: Path, num_runs: int) -> int:
    """A finished scan of about so many runs, from a known law; returns how many."""
    rates = LearningRates(1e-2, 1_000)
    subjects = tuple(Subject(ModelConfig(1, width, 1), log_spaced(3.0, 2.0, 14), rates) for width in (16, 32))
    batches = powers_of_two(128, 8_192)
    seeds = tuple(range(max(1, round(num_runs / (5 * len(subjects) * len(batches))))))
    experiment = Experiment("made-up", subjects, batches, max_tokens=100_000_000, seeds=seeds)
    write_experiment(folder, experiment)
    draws = np.random.default_rng(0)
    losses = np.geomspace(4, 1.95, 70)

    def train(run: Run) -> Outcome:
        rate = rates.rate(run.batch_tokens, 0)
        slower = 1.3 ** abs(math.log2(run.learning_rate / rate)) * (1 + 0.01 * draws.normal())
        steps = np.unique((10 * (3.5 / losses) ** 6 * (1 + b_crit(losses) / run.batch_tokens) * slower).astype(int))
        lines, last = [], 0
        for step, loss in zip(steps[steps > 0].tolist(), losses, strict=False):
            trace_cov = b_crit(loss)
            sizes = np.array([[64.0], [run.batch_tokens]])
            norms = (1 + trace_cov / sizes) * draws.normal(1, 1e-2, (2, step - last))
            values = {"step": step, "tokens": step * run.batch_tokens, "epoch": 0.0, "batch_tokens": run.batch_tokens}
            values |= {"small_batch_tokens": 64, "train_loss": [float(loss)] * (step - last)}
            values |= {"small_sq_norm": norms[0].tolist(), "big_sq_norm": norms[1].tolist(), "test_loss": float(loss)}
            for size, of_size in zip(("small", "big"), norms, strict=True):
                values[f"{size}_sq_norm_by_layer"] = [float(of_size.mean()) / 3] * 3
            lines.append(MetricsLine.read(values))
            last = step
        result = RunResult(run.run_id, "reached", last, last * run.batch_tokens, lines[-1].test_loss, "")
        place = folder / "runs" / run.run_id
        write_run_config(place, run, {"source": "made up", "sha256": ""})
        write_metrics(place, lines)
        write_result(place, result)
        found = course(lines)
        return Outcome(run, result, found.eval_steps.tolist(), found.eval_losses.tolist())

    count = 0
    for cell, tried in search_all(experiment, train).items():
        write_search(folder, experiment, cell, [t.result.run_id for t in tried])
        count += len(tried)
    return count


def measure(step: str, folder: Path) -> None:
    """One step, in this process: prints its seconds, of a clock and of the processor, and its peak of memory in MiB."""
    from scaling_jax.report import write_figures, write_report
    from scaling_jax.results import analyse, read_results

    start = time.perf_counter()
    results = read_results(folder)
    if step != "read":
        analysis = analyse(results)
    if step == "report":
        write_figures(analysis)
        write_report(analysis)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    seconds = {"seconds": round(time.perf_counter() - start, 1), "cpu_seconds": round(time.process_time(), 1)}
    print(json.dumps({"step": step, **seconds, "peak_mib": round(peak)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=2_000)
    parser.add_argument("--folder", type=Path, help="keep the runs there, or measure those that are there")
    parser.add_argument("--step", choices=STEPS, help="measure this one in this process")
    options = parser.parse_args()
    if options.step:
        return measure(options.step, options.folder)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        if not (folder / "experiment.json").exists():
            print(f"{make_up(folder, options.runs):,} runs")
        for step in STEPS:
            subprocess.run([sys.executable, __file__, "--step", step, "--folder", str(folder)], check=True)


if __name__ == "__main__":
    main()
