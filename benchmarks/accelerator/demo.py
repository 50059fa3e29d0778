"""Stage "demo": how long the demo's scan takes here, how much of that is compiling, and whether the law is the same.

The learning rates of a batch size train at once, as many as `TOGETHER`. The committed results of the demo, for
comparison, are from two CPU cores and the sources of another Python.
"""

import contextlib
import dataclasses
import json
import sys
import tempfile
import threading
import time
from pathlib import Path
from unittest import mock

import jax
from figures import arguments

from scaling_jax.results import analyse
from scaling_jax.scanning import powers_of_two, scan
from scaling_jax.scanning.experiment import DEMO, QUICK, Experiment

OURS = Path(__file__).parents[2] / "experiments" / "results" / "demo" / "fit.json"
TOGETHER = 4


def together(experiment: Experiment, count: int) -> Experiment:
    """The experiment with `count` learning rates of a batch size at a time."""
    subjects = tuple(
        dataclasses.replace(subject, learning_rates=dataclasses.replace(subject.learning_rates, together=count))
        for subject in experiment.subjects
    )
    return dataclasses.replace(experiment, subjects=subjects)


def law(fit: dict) -> dict | None:
    found = fit["law"]
    return found and {name: found[name] for name in ("exponent", "exponent_interval", "b_star", "loss_range")}


def main() -> None:
    given = arguments()
    compiling, lock = [0.0], threading.Lock()

    def heard(event: str, seconds: float, **_) -> None:
        if event.endswith("backend_compile_duration"):
            with lock:
                compiling[0] += seconds

    jax.monitoring.register_event_duration_secs_listener(heard)
    experiment = DEMO
    if given.toy:
        experiment = dataclasses.replace(
            QUICK,
            subjects=tuple(dataclasses.replace(s, target_losses=(3.6, 3.4, 3.3)) for s in QUICK.subjects[:1]),
            batch_tokens=powers_of_two(256, 1_024),
            max_tokens=50_000,
        )
    workdir = Path(tempfile.mkdtemp()) / "demo"
    start, cells = time.monotonic(), []

    def on_event(event) -> None:
        if event.cell is not None and event.progress is None:
            cells.append([event.cell.name, round(time.monotonic() - start, 1)])
            given.figures.add("cells done at, seconds", cells)
            given.figures.add("compiling, seconds of all threads", round(compiling[0], 1))

    # A rehearsal also takes the way of accelerators, in this process.
    with mock.patch("jax.default_backend", return_value="gpu") if given.toy else contextlib.nullcontext():
        scan(together(experiment, TOGETHER), workdir, on_event=on_event)
    given.figures.add("scan, seconds", round(time.monotonic() - start, 1))
    analysis = analyse(workdir)
    runs = [record.result for record in analysis.results.runs if record.result is not None]
    given.figures.add("runs", {"number": len(runs), "tokens": sum(run.tokens for run in runs)})
    given.figures.add("law", law(json.loads((workdir / "fit.json").read_text())))
    given.figures.add("law of the committed demo", law(json.loads(OURS.read_text())))
    points = [
        [p.model, p.loss, round(p.tradeoff.b_crit), [round(x) if x < 1e9 else None for x in p.tradeoff.b_crit_interval]]
        for p in analysis.fit.points
    ]
    given.figures.add("points: model, loss, B_crit, interval", points)


if __name__ == "__main__":
    sys.exit(main())
