"""Trains cells: runs their learning-rate searches, one run at a time or many at once, and reuses finished runs."""

import contextlib
import dataclasses
import glob
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from scaling_jax.data.feeding import is_resident, resident_rows
from scaling_jax.io import UserError, note
from scaling_jax.io.config import from_dict, to_dict
from scaling_jax.io.stores import publish
from scaling_jax.parallel import from_first, is_first, together
from scaling_jax.scanning.experiment import FEWEST_BATCHES, Cell, Experiment
from scaling_jax.scanning.guided_search import MOST_GUIDES, Inner
from scaling_jax.scanning.records import is_without_searches, read_search, write_search
from scaling_jax.scanning.search import next_wave, search
from scaling_jax.scanning.tried import Outcome, Tried, look_at
from scaling_jax.training import Progress, Run, RunResult, run_folder, train, train_many
from scaling_jax.training.examples import Data, data_of, held_out
from scaling_jax.training.population import slots_for
from scaling_jax.training.program import program_for
from scaling_jax.training.records import DamagedRecords, read_course, read_run_config, whole_result


def train_cell(
    experiment: Experiment,
    cell: Cell,
    workdir: Path,
    should_stop: Callable[[], bool],
    on_progress: Callable[[Progress], None],
    num_devices: int = 1,
) -> None:
    """Trains the missing runs of a cell, one after another, and writes their results to `workdir`.

    With several processes, all must call this; they make the same decisions.

    Args:
      should_stop, on_progress: see `train`.
      num_devices: number of devices over which each batch is split.

    Raises:
      Interrupted, UserError: see `train`.
    """
    corpus = corpus_of(experiment, cell)

    def train_one(run: Run) -> Outcome:
        found = _shared(lambda: find_outcome(run, workdir))
        if found is None:
            train(
                run,
                workdir,
                corpus=corpus,
                num_devices=num_devices,
                keep_checkpoint=False,
                should_stop=should_stop,
                on_progress=on_progress,
            )
            found = _shared(lambda: find_outcome(run, workdir))
        assert found is not None
        return _on_this_text(found, corpus, workdir)

    tried = search(experiment, cell, train_one, _shared_guides(experiment, cell, workdir))
    _write_down(tried, experiment, cell, workdir)


def train_alike(
    experiment: Experiment,
    cells: Sequence[Cell],
    workdir: Path,
    should_stop: Callable[[], bool],
    on_progress: Callable[[Progress], None],
    num_devices: int = 1,
) -> None:
    """Like `train_cell`, for cells that differ only in their seed: trains many of their runs at once, with one program.

    Works in a single process only.

    Args:
      num_devices: number of devices over which the runs are spread.
    """
    searches = {cell: _Search(guides(experiment, cell, workdir)) for cell in cells}
    owner: dict[Run, tuple[Cell, int]] = {}
    waiting: deque[Run] = deque()
    corpus = corpus_of(experiment, cells[0])

    def take(cell: Cell, index: int, outcome: Outcome) -> None:
        targets = experiment.subject(cell.model).target_losses
        searches[cell].tried[index] = look_at(targets, _on_this_text(outcome, corpus, workdir))

    def plan(cell: Cell) -> None:
        own = searches[cell]
        while not own.running and (wave := next_wave(experiment, cell, own.tried, own.inner)):
            for index, run in wave.items():
                if (found := find_outcome(run, workdir)) is not None:
                    take(cell, index, found)
                else:
                    owner[run] = cell, index
                    searches[cell].running += 1
                    waiting.append(run)

    def on_result(run: Run, result: RunResult) -> None:
        cell, index = owner[run]
        found = find_outcome(run, workdir)
        assert found is not None
        take(cell, index, found)
        searches[cell].running -= 1
        plan(cell)

    for cell in cells:
        plan(cell)
    train_many(
        lambda: waiting.popleft() if waiting else None,
        on_result,
        workdir,
        corpus,
        num_slots=_seats(experiment, cells),
        num_devices=num_devices,
        should_stop=should_stop,
        on_progress=on_progress,
    )
    for cell in cells:
        _write_down(searches[cell].tried.values(), experiment, cell, workdir)


def compile_ahead(experiment: Experiment, cells: Sequence[Cell], num_devices: int, seats_on: int) -> None:
    """Compiles what `train_alike`, or else `train_cell`, will call for these cells, and takes no step.

    Threads may do this for some cells while others train, since XLA compiles without Python.

    Args:
      num_devices: over which `train_cell` splits each batch.
      seats_on: number of devices over which `train_alike` spreads the runs.
    """
    corpus, run = corpus_of(experiment, cells[0]), experiment.run(cells[0], 0)
    if not is_resident(corpus):
        return
    examples = held_out(run, corpus)
    if can_run_together(experiment, cells[0]):
        slots_for(run, _seats(experiment, cells), seats_on).compile(resident_rows(corpus, seats_on), examples)
    else:
        program_for(run, num_devices).compile(resident_rows(corpus, num_devices), examples)


def can_run_together(experiment: Experiment, cell: Cell) -> bool:
    """True if `train_alike` can train the cell: one process, several runs at a time, and data that fit on a device."""
    several = len(experiment.seeds) * experiment.subject(cell.model).learning_rates.together > 1
    return jax.process_count() == 1 and several and is_resident(corpus_of(experiment, cell))


def finished_runs(
    experiment: Experiment, cell: Cell, workdir: Path, find: Callable[[Run], Outcome | None] | None = None
) -> tuple[str, ...] | None:
    """The run ids of a cell whose search has ended. None if it hasn't, or if the experiment now asks for more.

    Args:
      find: gives the outcome of a run; None takes `find_outcome`.
    """
    record = read_search(workdir, cell)
    if record is not None:
        done = _is_done if find is None else _has_result  # what `find` knows was read, and is whole
        complete = all(done(workdir / "runs" / run) for run in record.runs)
        return record.runs if complete and record.answers(experiment) else None
    if not is_without_searches(workdir):
        return None

    class Missing(Exception):
        pass

    def read(run: Run) -> Outcome:
        found = find(run) if find is not None else find_outcome(run, workdir)
        if found is None:
            raise Missing
        return found

    try:  # schema 1 has no search records, so repeat the search and see if all of its runs are there
        return tuple(t.result.run_id for t in search(experiment, cell, read))
    except Missing:
        return None


def done_part(experiment: Experiment, workdir: Path) -> Experiment | None:
    """As many models, and then batch sizes, of an experiment as are done for a fit; None if none has enough."""
    left = {cell[:2] for cell in experiment.cells if finished_runs(experiment, cell, workdir) is None}
    for count in range(len(experiment.subjects), 0, -1):
        parts = []
        for subjects in itertools.combinations(experiment.subjects, count):
            names = [subject.model.name for subject in subjects]
            batches = tuple(b for b in experiment.batch_tokens if not any((name, b) in left for name in names))
            parts.append((len(batches), subjects, batches))
        number, subjects, batches = max(parts, key=lambda part: part[0])
        if number >= FEWEST_BATCHES:
            return dataclasses.replace(experiment, subjects=subjects, batch_tokens=batches)
    return None


def searched(experiment: Experiment, cell: Cell, workdir: Path) -> list[Tried]:
    """The runs of a cell's search that has ended, also if the experiment now asks for more; [] if none has ended."""
    record = read_search(workdir, cell)
    names = record.runs if record is not None else finished_runs(experiment, cell, workdir) or ()
    folders = [workdir / "runs" / name for name in names]
    targets = experiment.subject(cell.model).target_losses
    results = [(folder, result) for folder in folders if (result := _result(folder)) is not None]
    return [look_at(targets, _outcome(folder, read_run_config(folder).run, result)) for folder, result in results]


def guides(experiment: Experiment, cell: Cell, workdir: Path) -> Inner:
    """What was tried in the cells that guide a search; their searches must have ended."""
    return [searched(experiment, inner, workdir) for inner in experiment.inner(cell)[:MOST_GUIDES]]


def find_outcome(run: Run, workdir: Path) -> Outcome | None:
    """The outcome of a run, or of one that differs only in where it ends and trained at least as far; else None."""
    own = run_folder(workdir, run)
    if (result := _result(own)) is not None:
        return _outcome(own, run, result)
    for folder in sorted((workdir / "runs").glob(f"{glob.escape(run.label)}-*")):
        with contextlib.suppress(UserError):  # an empty or damaged folder
            other, result = read_run_config(folder).run, whole_result(folder)
            if result is not None and other.without_limits == run.without_limits and _went_as_far(other, result, run):
                return _outcome(folder, run, result)
    return None


def _has_result(folder: Path) -> bool:
    return (folder / "result.json").exists()


def _is_done(folder: Path) -> bool:
    return _result(folder) is not None


def _result(folder: Path) -> RunResult | None:
    """The result of a run; None if the run isn't done or its records are damaged, which a note says."""
    try:
        return whole_result(folder)
    except DamagedRecords as damage:
        note(f"{damage.what}: this run is trained again")
        return None


def _write_down(tried: Iterable[Tried], experiment: Experiment, cell: Cell, workdir: Path) -> None:
    """Writes the record of a search that has ended, and publishes it to the bucket."""
    with together():
        if is_first():
            write_search(workdir, experiment, cell, [t.result.run_id for t in tried])
            publish(workdir / "cells")


def _went_as_far(done: Run, result: RunResult, wanted: Run) -> bool:
    """True if a finished run took every step that the wanted run would take."""
    if wanted.max_steps is not None:
        to_the_end = result.steps >= wanted.max_steps
    else:
        to_the_end = result.tokens + done.batch_tokens > (wanted.max_tokens or 0)
    to_the_target = result.status == "reached" and (done.target_loss or 0.0) <= (wanted.target_loss or 0.0)
    return to_the_end or to_the_target or result.status == "diverged"


def _outcome(folder: Path, run: Run, result: RunResult) -> Outcome:
    found = read_course(folder, result)
    return Outcome(run, result, found.eval_steps.tolist(), found.eval_losses.tolist())


def _shared(find: Callable[[], Outcome | None]) -> Outcome | None:
    """What the first process finds, in all processes."""
    found = find() if is_first() else None
    return next(iter(_from_first([] if found is None else [found])), None)


def _shared_guides(experiment: Experiment, cell: Cell, workdir: Path) -> Inner:
    """The first process's `guides`, in all processes."""
    targets = experiment.subject(cell.model).target_losses
    found = guides(experiment, cell, workdir) if is_first() else [[]] * len(experiment.inner(cell)[:MOST_GUIDES])
    outcomes = ([Outcome(t.run, t.result, t.steps.tolist(), t.losses.tolist()) for t in tried] for tried in found)
    return [[look_at(targets, outcome) for outcome in _from_first(inner)] for inner in outcomes]


def _from_first(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The outcomes of the first process, in all processes."""
    said: Any = from_first(
        [{"run": to_dict(o.run), "result": to_dict(o.result), "steps": o.steps, "losses": o.losses} for o in outcomes]
    )
    return [Outcome(from_dict(Run, o["run"]), from_dict(RunResult, o["result"]), o["steps"], o["losses"]) for o in said]


def _on_this_text(outcome: Outcome, corpus: Data, workdir: Path) -> Outcome:
    if outcome.result.corpus_sha256 != corpus.manifest["sha256"]:
        raise UserError(
            f"{workdir} holds runs on other text; the text {outcome.run.text} has changed since: use another folder"
        )
    return outcome


def _seats(experiment: Experiment, cells: Sequence[Cell]) -> int:
    """Number of runs that `train_alike` trains at once."""
    return len(cells) * experiment.subject(cells[0].model).learning_rates.together


class _Search:
    def __init__(self, inner: Inner) -> None:
        self.inner = inner
        self.tried: dict[int, Tried] = {}
        self.running = 0


def corpus_of(experiment: Experiment, cell: Cell) -> Data:
    """The packed text of a cell, or the examples of its task."""
    return data_of(experiment.run(cell, 0))
