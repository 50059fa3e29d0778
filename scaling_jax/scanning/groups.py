"""Training of groups: their learning-rate searches, run by run or many runs at once."""

from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path

import jax

from scaling_jax.data import Corpus, prepare
from scaling_jax.data.feeding import is_resident
from scaling_jax.parallel import from_first, is_first
from scaling_jax.scanning.experiment import Experiment, Group
from scaling_jax.scanning.search import Evaluations, Tried, evaluations, look_at, next_wave, search
from scaling_jax.training import Progress, Run, RunResult, train, train_many


def run_group(
    experiment: Experiment,
    group: Group,
    workdir: Path,
    should_stop: Callable[[], bool],
    on_progress: Callable[[Progress], None],
    num_devices: int = 1,
) -> None:
    """Trains what is missing of a group, a run after the other, and leaves its runs' results in `workdir`.

    Several processes all call this, and take the same decisions.

    Args:
      should_stop, on_progress: see `train`.
      num_devices: that share each batch.

    Raises:
      Interrupted, UserError: see `train`.
    """
    corpus = _corpus(experiment, group)

    def train_one(run: Run) -> RunResult:
        return train(
            run,
            workdir,
            corpus=corpus,
            num_devices=num_devices,
            keep_checkpoint=False,
            should_stop=should_stop,
            on_progress=on_progress,
        )

    def read(folder: Path) -> Evaluations:
        return from_first(evaluations(folder) if is_first() else ([], []))

    search(experiment, group, workdir, train_one, read)


def run_alike(
    experiment: Experiment,
    groups: Sequence[Group],
    workdir: Path,
    should_stop: Callable[[], bool],
    on_progress: Callable[[Progress], None],
    num_devices: int = 1,
) -> None:
    """Like `run_group` for groups that differ in seed alone: their runs share one program, many at once.

    In a single process only; several train one run after the other (`run_group`).

    Args:
      num_devices: over which the runs are spread; each run has one.
    """
    searches = {group: _Search() for group in groups}
    owner: dict[Run, tuple[Group, int]] = {}
    waiting: deque[Run] = deque()

    def plan(group: Group) -> None:
        for index, run in next_wave(experiment, group, searches[group].tried).items():
            owner[run] = group, index
            searches[group].running += 1
            waiting.append(run)

    def on_result(run: Run, result: RunResult) -> None:
        group, index = owner[run]
        found = searches[group]
        found.tried[index] = look_at(group, workdir, index, run, result)
        found.running -= 1
        if not found.running:
            plan(group)

    for group in groups:
        plan(group)
    train_many(
        lambda: waiting.popleft() if waiting else None,
        on_result,
        workdir,
        _corpus(experiment, groups[0]),
        num_slots=len(groups) * groups[0].subject.learning_rates.together,
        num_devices=num_devices,
        should_stop=should_stop,
        on_progress=on_progress,
    )


def can_run_together(experiment: Experiment, group: Group) -> bool:
    """Whether the group's runs can be spread over one process's devices: several at a time, on text that they hold."""
    several = len(experiment.seeds) * group.subject.learning_rates.together > 1
    return jax.process_count() == 1 and several and is_resident(_corpus(experiment, group))


class _Search:
    def __init__(self) -> None:
        self.tried: dict[int, Tried] = {}
        self.running = 0


def _corpus(experiment: Experiment, group: Group) -> Corpus:
    return prepare(experiment.text, group.subject.model.context, experiment.tokenizer)
