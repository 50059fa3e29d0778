"""A whole scan: trains what is missing in a results folder, continues what was interrupted."""

import contextlib
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import jax

from scaling_jax.config import from_dict, to_dict
from scaling_jax.data import prepare
from scaling_jax.errors import UserError
from scaling_jax.parallel import from_first, is_first, leave_if_one_is_gone, together
from scaling_jax.scanning.executors import ENGINES, parse_options
from scaling_jax.scanning.experiment import Experiment, Group, Subject
from scaling_jax.scanning.groups import can_run_together, run_alike, run_group
from scaling_jax.scanning.plan import MOST_WORKERS
from scaling_jax.scanning.pool import Event, available_cores, run_groups
from scaling_jax.scanning.search import finished
from scaling_jax.training import Interrupted, Progress, Run
from scaling_jax.training.buckets import in_bucket, publish, working_copy
from scaling_jax.training.compilation import keep_compiled_programs
from scaling_jax.training.locks import locked
from scaling_jax.training.program import program_for
from scaling_jax.training.records import write_json
from scaling_jax.training.stopping import stop_on_signals


def scan(
    experiment: Experiment,
    workdir: str | Path,
    *,
    on_event: Callable[[Event], None] = lambda _: None,
    executor: Literal["local", "ray", "slurm"] = "local",
    executor_options: Sequence[str] = (),
) -> Path:
    """Trains every run of an experiment that `workdir` doesn't hold yet; returns `workdir`, or its copy here.

    On CPUs a worker process a core shares the groups. On accelerators this process drives all devices: with many runs
    at once, spread over them, where the experiment tries several seeds or learning rates together; otherwise with one
    run after the other, its batch split over all devices, or as many as share it evenly. Several processes
    (`parallel.connect`) all call this; they train one run after the other on all of their devices, CPUs too, and the
    first alone writes.

    Args:
      workdir: a folder that all processes see, or gs://bucket/folder.
      on_event: called with {"event": "progress" | "done", "group": number, …} and {"event": "stopping"} as they come,
        in the first process.
      executor: who runs the groups: this machine, or an engine whose machines share `workdir`; see `executors`.
      executor_options: the engine's own, as "key=value".

    Raises:
      UserError: if the folder holds another experiment or is in use, a run is refused, or processes differ.
      KeyboardInterrupt: once all that was trained is saved; the same call continues it.
      Interrupted: the same on SIGTERM, or because another process was asked to stop.
    """
    if executor == "local" and executor_options:
        raise UserError(f"executor options {' '.join(executor_options)} are for --executor ray or slurm")
    with leave_if_one_is_gone(), contextlib.ExitStack() as stack:
        with together():
            workdir = working_copy(workdir)
            if executor != "local" and in_bucket(workdir):
                raise UserError(f"--executor {executor} needs results on a file system with locks, which buckets lack")
        lock, missing = None, []
        given = from_first(to_dict(experiment))
        with together():
            if to_dict(experiment) != given:
                raise UserError("the processes of this scan differ: give all of them the same experiment")
        with together():
            if is_first():
                lock = stack.enter_context(locked(workdir / ".lock", str(workdir)))
                _check_claim(workdir, experiment)
                missing = _missing(experiment, workdir)
        missing = from_first(missing)
        with together():
            for context in {subject.model.context for subject in experiment.subjects} if missing else ():
                prepare(experiment.text, context, experiment.tokenizer)  # once, before workers ask for it together
            if is_first():
                _claim(workdir, experiment)  # now that its text is there: a mistyped one must not keep the folder
                publish(workdir)
        if not missing:
            return workdir
        if executor != "local":
            ENGINES[executor](workdir, missing, on_event, parse_options(executor_options))
        elif jax.default_backend() == "cpu" and jax.process_count() == 1:
            run_groups(workdir, missing, on_event, available_cores()[:MOST_WORKERS], lock)
        else:
            _run_here(experiment, workdir, missing, on_event)
    return workdir


def _missing(experiment: Experiment, workdir: Path) -> list[int]:
    """Groups to train, the longest first, which keeps all cores busy."""
    missing = [n for n, group in enumerate(experiment.groups) if finished(experiment, group, workdir) is None]
    return sorted(missing, key=lambda n: -relative_cost(experiment.groups[n]))


def relative_cost(group: Group) -> float:
    """Expected FLOPs of a group up to a constant: tokens to a loss grow as 1 + B/B_crit (McCandlish et al. 2018)."""
    model = group.subject.model
    typical_b_crit = 2_000  # tokens; small models at the losses that they reach
    per_token = model.num_params + 2 * model.vocab_size * model.d_model
    return per_token * (1 + group.batch_tokens / typical_b_crit)


def _run_here(experiment: Experiment, workdir: Path, missing: list[int], on_event: Callable[[Event], None]) -> None:
    keep_compiled_programs()
    num_devices = {n: _devices_for(experiment.run(experiment.groups[n], 0)) for n in missing}
    waiting = list(missing)
    with stop_on_signals() as should_stop:
        while waiting:
            alike = [n for n in waiting if _program(experiment.groups[n]) == _program(experiment.groups[waiting[0]])]
            waiting = [n for n in waiting if n not in alike]
            groups = {n: experiment.groups[n] for n in alike}

            def report(progress: Progress, groups=groups):
                number = next(n for n, group in groups.items() if f"-s{group.seed}-" in progress.run_id)
                on_event({"event": "progress", "group": number, **progress._asdict()})

            try:
                if can_run_together(experiment, groups[alike[0]]):
                    run_alike(experiment, list(groups.values()), workdir, should_stop, report, jax.device_count())
                else:
                    for number, group in groups.items():
                        run_group(experiment, group, workdir, should_stop, report, num_devices[number])
            except Interrupted:
                if should_stop.by_hand:
                    raise KeyboardInterrupt from None
                raise
            if is_first():
                for number in alike:
                    on_event({"event": "done", "group": number})


def _devices_for(run: Run) -> int:
    """As many as share the run's batch evenly; all of them, or a refusal, where there are several processes."""
    if jax.process_count() > 1:
        return program_for(run, jax.device_count()).num_devices
    return math.gcd(run.batch_sequences, jax.device_count())


def _program(group: Group) -> tuple[Subject, int]:
    return group.subject, group.batch_tokens


def _claim(workdir: Path, experiment: Experiment) -> None:
    path = workdir / "experiment.json"
    if not path.exists():
        write_json(path, to_dict(experiment))


def _check_claim(workdir: Path, experiment: Experiment) -> None:
    path = workdir / "experiment.json"
    if not path.exists():
        return
    try:
        same = from_dict(Experiment, json.loads(path.read_text())) == experiment
    except (ValueError, UserError):  # of another version
        same = False
    if not same:
        raise UserError(f"{workdir} holds another experiment (see {path}): choose another folder with --results")
