"""A run's folder from the start of an attempt at it to its result."""

import contextlib
from collections.abc import Callable
from pathlib import Path

from scaling_jax.config import from_dict, to_dict
from scaling_jax.data import Corpus
from scaling_jax.errors import UserError
from scaling_jax.parallel import agree, from_first, is_first, together
from scaling_jax.training.buckets import address, claim, in_bucket, publish
from scaling_jax.training.journal import Journal, Progress
from scaling_jax.training.locks import locked
from scaling_jax.training.program import TrainState
from scaling_jax.training.records import (
    RunResult,
    Status,
    keep_metrics_until,
    read_metrics,
    read_result,
    write_json,
    write_metrics,
    write_result,
)
from scaling_jax.training.run import Run


class Interrupted(Exception):
    """Training stopped when asked to, with its state saved; the same call continues it."""


def run_folder(workdir: str | Path, run: Run) -> Path:
    """Where a results folder keeps a run."""
    return Path(workdir) / "runs" / run.run_id


def finished_result(run: Run, workdir: str | Path, corpus: Corpus) -> RunResult | None:
    """The result of a run that is done, as the first process sees it; None if it isn't.

    Raises:
      UserError: if the run was on other text, or the text doesn't fit the model.
    """
    _check_corpus(run, corpus)
    folder = run_folder(workdir, run)
    with together():
        written = read_result(folder) if is_first() else None
    values = from_first(None if written is None else to_dict(written))
    done = None if values is None else from_dict(RunResult, values)
    if done is not None and done.corpus_sha256 != corpus.manifest["sha256"]:
        raise UserError(f"{folder} holds a run on other text ({run.text} has changed since): use another folder")
    return done


class Attempt:
    """A run that trains: its journal, its checkpoints, and `state`, from which it goes on.

    Of several processes the first alone writes, but for checkpoints, which they write together. It holds a lock in the
    folder until `close`.

    Args:
      state: the run's first one.
      branch_of: a finished run with the same steps up to a snapshot that it kept; the last such is started from
        instead of `state`.

    Raises:
      UserError: if another process trains the run, or `branch_of` has kept no such snapshot.
    """

    def __init__(
        self,
        run: Run,
        workdir: str | Path,
        corpus: Corpus,
        state: TrainState,
        on_progress: Callable[[Progress], None] = lambda _: None,
        branch_of: Run | None = None,
    ):
        from scaling_jax.training.checkpoints import Checkpoints  # Orbax takes seconds to import

        self.run, self.folder, self._corpus = run, run_folder(workdir, run), corpus
        with contextlib.ExitStack() as lock:
            with together():
                if is_first():
                    lock.enter_context(locked(self.folder / ".lock", f"run {run.run_id} in {workdir}"))
                    claim(self.folder)
                    write_json(self.folder / "config.json", {"run": to_dict(run), "corpus": corpus.manifest})
            self._checkpoints = Checkpoints(address(self.folder / "checkpoints"))
            snapshots = address(self.folder / "snapshots")
            self._snapshots = Checkpoints(snapshots, keep=None) if run.snapshot_tokens else None
            saved = self._checkpoints.restore(state)
            if saved is not None:
                self.state = saved
                _keep_metrics_until(self.folder, int(saved.step))
            elif branch_of is not None:
                self.state = _snapshot(run, branch_of, run_folder(workdir, branch_of), self.folder, state)
            else:
                self.state = state
                _keep_metrics_until(self.folder, 0)
            self.journal = Journal(run, self.folder, corpus, on_progress)
            self._lock = lock.pop_all()

    def save(self, state: TrainState) -> None:
        self._publish()  # before the state: who goes on from it needs the records up to it
        self._checkpoints.save(state)

    def keep_snapshot(self, state: TrainState) -> None:
        """Keeps a state for good, for branches to start from."""
        if self._snapshots is not None:
            self._snapshots.save(state)

    def finish(self, status: Status, keep_checkpoint: bool, state: TrainState) -> RunResult:
        if keep_checkpoint:
            self.save(state)
        self._close_checkpoints()
        agree(False)  # all have written theirs
        last = self.journal.lines[-1]
        result = RunResult(
            run_id=self.run.run_id,
            status=status,
            steps=last["step"],
            tokens=last["tokens"],
            test_loss=last["test_loss"],
            corpus_sha256=self._corpus.manifest["sha256"],
        )
        if is_first():
            write_result(self.folder, result)
        self._publish()
        if not keep_checkpoint and is_first():
            with contextlib.suppress(OSError):  # what stays of them does no harm
                address(self.folder / "checkpoints").rmtree()
        agree(False)  # all wait, so nobody reads the folder before all is written
        self._lock.close()
        return result

    def close(self) -> None:
        """Waits until what was saved is on disk."""
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


def _snapshot(run: Run, parent: Run, parent_folder: Path, folder: Path, like: TrainState) -> TrainState:
    from scaling_jax.training.checkpoints import Checkpoints

    branch_tokens = run.ramp[0].tokens if run.ramp else 0
    lines = [line for line in read_metrics(parent_folder) if line["tokens"] <= branch_tokens]
    there = address(parent_folder / "snapshots")
    kept = from_first([line["step"] for line in lines if (there / str(line["step"])).exists()])
    if not kept:
        raise UserError(f"{parent_folder} kept no state up to {branch_tokens:,} tokens: see Run.snapshot_tokens")
    snapshots = Checkpoints(there, keep=None)
    try:
        state = snapshots.restore_step(kept[-1], like)
    finally:
        snapshots.close()
    if is_first():
        write_metrics(folder, [line for line in lines if line["step"] <= kept[-1]])
    return state


def _keep_metrics_until(folder: Path, step: int) -> None:
    if is_first():
        keep_metrics_until(folder, step)


def _check_corpus(run: Run, corpus: Corpus) -> None:
    if corpus.vocab_size > run.model.vocab_size:
        raise UserError(
            f"the tokenizer has {corpus.vocab_size:,} tokens but the model's vocab_size is {run.model.vocab_size:,}"
        )
    if corpus.train_RxT1.shape[1] != run.model.context + 1:
        raise UserError(
            f"rows of {corpus.train_RxT1.shape[1] - 1} tokens don't fit the model's context of {run.model.context}"
        )
