"""A run's folder while the run trains: its lock, checkpoints, snapshots and journal, and its result at the end."""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from scaling_jax.io import UserError, note
from scaling_jax.io.config import from_dict, to_dict
from scaling_jax.io.files import refuse_links
from scaling_jax.io.locks import locked
from scaling_jax.io.stores import address, claim, in_bucket, publish
from scaling_jax.parallel import agree, from_first, is_first, together
from scaling_jax.tasks import TaskModel
from scaling_jax.training.checkpoints import Checkpoints
from scaling_jax.training.examples import Data, check_batch, check_data
from scaling_jax.training.integrity import LinesHash
from scaling_jax.training.journal import Journal, Progress, ending
from scaling_jax.training.live_ramp import next_stage
from scaling_jax.training.metrics import MetricsLine, jsonable
from scaling_jax.training.program import TrainState
from scaling_jax.training.records import (
    DamagedRecords,
    RunResult,
    Status,
    read_metrics,
    records_to_disk,
    run_folder,
    whole_lines,
    whole_result,
    with_checksum,
    write_metrics,
    write_result,
    write_run_config,
)
from scaling_jax.training.run import Run
from scaling_jax.training.stages import Stage


class Interrupted(Exception):
    """Training was asked to stop, and has saved its state. Calling `train` again continues it."""


class Place(NamedTuple):
    """A run's folder, its result if it is done, and its next stages. All processes that train the run get the same."""

    folder: Path
    done: RunResult | None  # None if the run isn't done
    next_stages: tuple[
        Stage, ...
    ]  # of the next step, and those after it; the stages before may not fit today's devices


def find_place(run: Run, workdir: str | Path, corpus: Data) -> Place:
    """The folder, the result and the next stages of a run, as the first process sees them.

    A run whose records are damaged isn't done: it is to be trained again, and a note says so.

    Raises:
      UserError: if the run was trained on other data, or the data don't fit the model or are fewer than a batch.
    """
    check_data(run, corpus)
    folder, result, stages = Path(workdir) / "runs", None, _next_stages(run, [])
    with together():
        if is_first():
            folder = run_folder(workdir, run)
            try:
                result = whole_result(folder)
            except DamagedRecords as damage:
                note(f"{damage.what}: this run is trained again")
            if result is None:
                stages = _next_stages(run, whole_lines(folder))
    said = {"result": None if result is None else to_dict(result), "stages": [to_dict(stage) for stage in stages]}
    found: Any = from_first({"name": folder.name, **said})
    folder = Path(workdir) / "runs" / found["name"]
    done = None if found["result"] is None else from_dict(RunResult, found["result"])
    if done is not None and done.corpus_sha256 != corpus.manifest["sha256"]:
        raise UserError(
            f"{folder} holds a run on other text; the text {run.text} has changed since: use another results folder"
        )
    next_stages = tuple(from_dict(Stage, stage) for stage in found["stages"])
    if done is None:
        check_batch(max(stage.batch_tokens for stage in next_stages), run, corpus)
    return Place(folder, done, next_stages)


class Attempt:
    """A run in training: its journal, its checkpoints, and the `state` from which training continues.

    With several processes, only the first writes; checkpoints are written by all together. The first process holds a
    lock in the folder until `close`.

    Args:
      folder: of the run, see `find_place`.
      state: the run's state before its first step.
        A result there is of damaged records, and is removed.
      branch_of: a finished run that has the same steps up to a snapshot that it kept. Training starts from the last
        such snapshot instead of `state`.

    Raises:
      UserError: if another process trains the run, or `branch_of` kept no such snapshot.
    """

    def __init__(
        self,
        run: Run,
        folder: Path,
        corpus: Data,
        state: TrainState,
        on_progress: Callable[[Progress], None] = lambda _: None,
        branch_of: Run | None = None,
    ):
        self.run, self.folder, self._manifest = run, folder, corpus.manifest
        if isinstance(run.model, TaskModel):
            self._manifest = {**corpus.manifest, "parts": list(run.trainable.parts)}
        with contextlib.ExitStack() as lock:
            with together():
                if is_first():
                    inside = (self.folder / name for name in ("checkpoints", "snapshots"))
                    refuse_links(self.folder.parent, self.folder, *inside)
                    lock.enter_context(locked(self.folder / ".lock", f"run {folder.name} in {folder.parents[1]}"))
                    claim(self.folder)
                    (self.folder / "result.json").unlink(missing_ok=True)
                    write_run_config(self.folder, run, self._manifest)
            self._checkpoints = Checkpoints(address(self.folder / "checkpoints"))
            snapshots = address(self.folder / "snapshots")
            self._snapshots = Checkpoints(snapshots, keep=None) if run.snapshot_tokens else None
            saved = self._checkpoints.restore(state, _hashes(self.folder, self._checkpoints.steps))
            if is_first() and self._checkpoints.passed_over:
                start = f"from step {int(saved.step):,}" if saved is not None else "from its start"
                note(f"{'; '.join(self._checkpoints.passed_over)}: training continues {start}")
            if saved is not None:
                self.state = saved
                _keep_until(self.folder, int(saved.step))
            elif branch_of is not None:
                parent = run_folder(folder.parents[1], branch_of)
                self.state = _snapshot(run, parent, self.folder, state)
            else:
                self.state = state
                _keep_until(self.folder, 0)
            self.journal = Journal(run, self.folder, corpus, on_progress)
            # Not None if only the result was lost: the saved state is the last one.
            self.ended = ending(run, self.journal.lines) if self.journal.lines else None
            self._lock = lock.pop_all()

    def save(self, state: TrainState) -> None:
        """Saves a checkpoint, and publishes the records to the bucket if the results are in one."""
        # Before the checkpoint, because continuing from it needs the records up to it.
        if is_first():
            records_to_disk(self.folder)
        self._publish()
        self._checkpoints.save(state, self.journal.written.digest)

    def keep_snapshot(self, state: TrainState) -> None:
        """Saves a state permanently, so that branches can start from it."""
        if self._snapshots is not None:
            self._snapshots.save(state, self.journal.written.digest)

    def finish(self, status: Status, keep_checkpoint: bool, state: TrainState) -> RunResult:
        """Writes the run's result, and releases the lock."""
        if keep_checkpoint:
            self.save(state)
        self._close_checkpoints()
        agree(False)  # waits until all processes have written their checkpoints
        last = self.journal.lines[-1]
        result = RunResult(
            run_id=self.folder.name,
            status=status,
            steps=last.step,
            tokens=last.tokens,
            test_loss=jsonable(last.test_loss),
            corpus_sha256=self._manifest["sha256"],
        )
        result = with_checksum(result, self.run, self._manifest, self.journal.written.digest)
        result = dataclasses.replace(result, checksum=from_first(result.checksum))
        if is_first():
            records_to_disk(self.folder)  # before what says that they are complete
            write_result(self.folder, result)
        self._publish()
        if not keep_checkpoint and is_first():
            with contextlib.suppress(OSError):  # leftovers do no harm
                address(self.folder / "checkpoints").rmtree()
        agree(False)  # all processes wait here, so that none reads the folder before it is complete
        self._lock.close()
        return result

    def close(self) -> None:
        """Waits until the checkpoints are on disk, and releases the lock."""
        with self._lock:
            self._close_checkpoints()

    def _publish(self) -> None:
        if in_bucket(self.folder):
            with together():
                if is_first():
                    publish(self.folder)

    def _close_checkpoints(self) -> None:
        for checkpoints in (self._checkpoints, self._snapshots):
            if checkpoints is not None:
                checkpoints.close()


def _snapshot(run: Run, parent: Path, folder: Path, like: TrainState) -> TrainState:
    """The last snapshot of `parent` before the run's first ramp stage or skip; copies the metrics up to it."""
    branch_tokens = run.parted_at
    whole = read_metrics(parent, whole_result(parent))
    lines = [line for line in whole if line.tokens <= branch_tokens]
    there = address(parent / "snapshots")
    kept = from_first([line.step for line in lines if (there / str(line.step)).exists()])
    if not kept:
        raise UserError(
            f"{parent} kept no state up to {branch_tokens:,} tokens: train it again with snapshot_tokens up to there"
        )
    snapshots = Checkpoints(there, keep=None)
    try:
        state, problem = snapshots.restore_step(kept[-1], like, LinesHash(lines).at_step)
    finally:
        snapshots.close()
    if state is None:
        raise UserError(f"{there / str(kept[-1])} {problem}: remove {parent}, then the same command trains it again")
    if is_first():
        write_metrics(folder, [line for line in lines if line.step <= kept[-1]])
    return state


def _keep_until(folder: Path, step: int) -> None:
    """Removes metrics after `step`. A run that resumes from there writes them again."""
    if is_first() and (folder / "metrics.jsonl").exists():
        write_metrics(folder, [line for line in whole_lines(folder) if line.step <= step])


def _hashes(folder: Path, steps: Sequence[int]) -> dict[int, str]:
    """{step: SHA-256 of metrics.jsonl up to there} for those steps at which a line ends."""
    there = LinesHash(whole_lines(folder)).at_step if is_first() else {}
    known: list[Any] = from_first([[step, there[step]] for step in steps if step in there])
    return {step: sha256 for step, sha256 in known}


def _next_stages(run: Run, lines: Sequence[MetricsLine]) -> tuple[Stage, ...]:
    now = next_stage(run.batch_tokens, run.ramp, run.live_ramp, lines, run.steps_of_warmup)
    before, end = (lines[-1].tokens if lines else 0), run.max_tokens or math.inf
    return now, *(stage for stage in run.ramp if before < stage.tokens < end)
