"""How fast this machine trains: a few steps of each model, timed as the scan would take them.

On CPUs they run in pinned worker processes, one on each core, as the scan's own. Compiled programs are kept, so the
scan doesn't compile them again.
"""

import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scaling_jax.data import example_order
from scaling_jax.data.examples import count
from scaling_jax.data.feeding import is_resident, resident_rows
from scaling_jax.io import UserError
from scaling_jax.io.config import from_dict, to_dict
from scaling_jax.io.workers import Command, Message, run_jobs, serve
from scaling_jax.scanning.experiment import Cell, Experiment
from scaling_jax.scanning.records import load_experiment, source_of
from scaling_jax.scanning.worker import worker_environment
from scaling_jax.training.program import program_for

START_SECONDS = 5.0  # after this time, no further model is timed
TIMED_SECONDS = 0.2  # of steps, for each program
_WORKER = "from scaling_jax.scanning.speed import main; main()"


class StepTime(NamedTuple):
    """Seconds of a training step: a line in the batch size, and never below its smaller point."""

    at_zero: float
    per_token: float
    compiling: float  # seconds until the first step of a program; little if it was compiled before

    def seconds(self, batch_tokens: int) -> float:
        return self.at_zero + self.per_token * batch_tokens


def time_steps(
    experiment: Experiment, cells: Sequence[Cell], cores: Sequence[int | None] | None
) -> dict[str, StepTime]:
    """{model: time of a step}, from the smallest and the largest batch of each model; without slow models.

    Args:
      cells: to be trained; smaller models are timed first.
      cores: one worker process for each; None times in this process.
    """
    seconds: dict[tuple[str, int], float] = {}
    compiling: dict[str, float] = {}
    until = time.time() + START_SECONDS
    source, importable = source_of(experiment)
    if not importable:
        return {}
    jobs = [
        {"experiment": to_dict(experiment), "cell": cell, "until": until, "source": source and str(source)}
        for cell in _ends(experiment, cells)
    ]

    def take(message: Message) -> None:
        model = message["model"]
        seconds[model, message["batch_tokens"]] = message["seconds"]
        compiling[model] = max(message["compiling"], compiling.get(model, 0.0))

    with contextlib.suppress(UserError, OSError):  # an estimate isn't worth an error
        if cores is None:
            for job in jobs:
                _time(job, take)
        else:
            environment = worker_environment("cpu")
            commands = [Command(("-c", _WORKER), environment=environment, core=core) for core in cores]
            run_jobs(jobs, commands, on_done=lambda _: None, on_message=take)
    found = {}
    for model in dict.fromkeys(model for model, _ in seconds):
        points = sorted((batch, t) for (name, batch), t in seconds.items() if name == model)
        (low, least), (high, most) = points[0], points[-1]
        per_token = max((most - least) / (high - low), 0.0) if high > low else least / low
        found[model] = StepTime(max(least - per_token * low, 0.0), per_token, compiling[model])
    return found


def main() -> None:
    """The main function of a worker process."""
    from scaling_jax.parallel.devices import keep_compiled_programs

    keep_compiled_programs()

    def work(job: dict[str, Any], send: Callable[[Message], None]) -> bool:
        _time(job, send)
        return True

    serve(work, lambda: None)


def _ends(experiment: Experiment, cells: Sequence[Cell]) -> Iterable[Cell]:
    """The smallest and the largest batch of each model, small models first."""
    for model in sorted({cell.model for cell in cells}, key=lambda name: experiment.subject(name).model.num_params):
        own = sorted((cell for cell in cells if cell.model == model), key=lambda cell: cell.batch_tokens)
        yield from dict.fromkeys((own[0], own[-1]))


@functools.cache
def _loaded(source: str) -> Experiment:
    return load_experiment(Path(source))


def _time(job: dict[str, Any], send: Callable[[Message], None]) -> None:
    import jax

    from scaling_jax.scanning.cells import corpus_of

    experiment, cell = from_dict(Experiment, job["experiment"]), Cell(*job["cell"])
    if time.time() > job["until"]:
        return
    if job["source"] is not None:
        experiment = experiment.with_tasks_of(_loaded(job["source"]))
    run, corpus = experiment.run(cell, 0), corpus_of(experiment, cell)
    num_devices = math.gcd(run.batch_sequences, jax.local_device_count())
    if not is_resident(corpus):
        return
    program, rows = program_for(run, num_devices), resident_rows(corpus, num_devices)
    state = program.first_state(0)
    none = np.empty((0, program.batch_sequences), np.int32)
    start = time.perf_counter()
    state, _ = program.steps(state, rows, none, 0.0, 1)  # compiles
    compiling = time.perf_counter() - start

    def seconds_of(num_steps: int) -> float:
        nonlocal state
        num_drawn = num_steps * program.batch_sequences
        order = example_order(0, 0, num_drawn, count(corpus.train)).reshape(num_steps, -1)
        start = time.perf_counter()
        state, _ = program.steps(state, rows, order, 0.0, 1)
        return time.perf_counter() - start

    num_steps, passed = 1, seconds_of(1)
    while passed < TIMED_SECONDS and num_steps < program.steps_per_call:
        num_steps = min(program.steps_per_call, 2 + math.ceil(num_steps * TIMED_SECONDS / max(passed, 1e-6)))
        passed = seconds_of(num_steps)
    send(
        {"model": cell.model, "batch_tokens": cell.batch_tokens, "seconds": passed / num_steps, "compiling": compiling}
    )
