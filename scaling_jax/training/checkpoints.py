"""Saved states of a run: each with checksums, so that training never continues from one that is damaged."""

import contextlib
import functools
import gc
import logging
import sys
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath

from scaling_jax.parallel import agree, from_first
from scaling_jax.training.integrity import state_checksum
from scaling_jax.training.program import TrainState


class _Saved(NamedTuple):
    """What is saved of a state without a model state and a key: the fields that states had before these came."""

    params: Any
    opt_state: Any
    step: Any
    noise: Any
    average: Any


class Checkpoints:
    """Saved states of a run in a folder, named by their step.

    Beside each state lie its checksum and the SHA-256 of metrics.jsonl up to its step. States of the
    first version have neither, and are used as they are.
    """

    def __init__(self, folder: epath.PathLike, keep: int | None = 2):
        """`folder` is an absolute path or in a bucket. Keeps the newest `keep` states; None keeps all."""
        import orbax.checkpoint as ocp  # takes seconds

        self._ocp: Any = ocp
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs every save, and what `restore` says in a line
        self._folder = epath.Path(folder)
        self._manager = self._ocp.CheckpointManager(
            self._folder, options=self._ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        )
        self.passed_over: list[str] = []  # why `restore` didn't use states that were newer

    @property
    def steps(self) -> list[int]:
        """The steps of the saved states, the newest first."""
        return from_first(sorted(self._manager.all_steps(), reverse=True))

    def restore(self, like: TrainState, metrics: Mapping[int, str] | None = None) -> TrainState | None:
        """The newest state that is whole and agrees with the metrics, or None. Removes newer ones.

        Args:
          metrics: {step: SHA-256 of metrics.jsonl up to there} of its lines; None doesn't compare.
        """
        state, passed = None, []
        for step in self.steps:
            state, problem = self.restore_step(step, like, metrics)
            if state is not None:
                break
            self.passed_over.append(f"{self._folder / str(step)} {problem}")
            passed.append(step)
        for step in passed:  # as long as it is there, Orbax saves no earlier step
            self._manager.delete(step)
        return state

    def restore_step(
        self, step: int, like: TrainState, metrics: Mapping[int, str] | None = None
    ) -> tuple[TrainState | None, str]:
        """(the state of one step, ""), or (None, what is wrong with it). `like` gives shapes, types and placement."""
        state: TrainState | None = None
        checksums: dict[str, Any] = {}
        problem = ""
        _ignore_late_failures()  # before the read: some of it ends while its error is on its way here
        with _quiet():
            try:
                state, checksums = self._read(step, like)
            except Exception as error:  # Orbax may raise anything
                problem = f"is damaged ({type(error).__name__})"
        if agree(bool(problem))[0]:
            return None, problem or "is damaged (in another process)"
        if agree(bool(checksums) and checksums.get("state") != state_checksum(state))[0]:
            return None, "is damaged (checksum)"
        if metrics is not None and step not in metrics:
            return None, "is of a step that metrics.jsonl doesn't reach"
        if metrics is not None and checksums and checksums.get("metrics") != metrics[step]:
            return None, "doesn't belong to what metrics.jsonl holds"
        return state, ""

    def save(self, state: TrainState, metrics: str) -> None:
        """Starts to save a state; `close` waits for it.

        Args:
          metrics: the SHA-256 of metrics.jsonl up to this state.
        """
        checksums = {"state": state_checksum(state), "metrics": metrics}
        args = self._ocp.args
        self._manager.save(
            int(state.step),
            args=args.Composite(state=args.StandardSave(_on_disk(state)), checksums=args.JsonSave(checksums)),
        )

    def close(self) -> None:
        """Waits until all states are on disk."""
        self._manager.wait_until_finished()
        self._manager.close()

    def _read(self, step: int, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
        abstract = jax.tree.map(self._ocp.utils.to_shape_dtype_struct, _on_disk(like))
        items = {"state": self._ocp.args.StandardRestore(abstract)}
        if (self._folder / str(step) / "checksums").exists():
            items["checksums"] = self._ocp.args.JsonRestore()
        restored = self._manager.restore(step, args=self._ocp.args.Composite(**items))
        checksums = restored["checksums"] if "checksums" in items else {}
        if "checksums" in items and not (isinstance(checksums, dict) and checksums):
            raise ValueError("no checksums")
        return _in_memory(restored["state"], like), checksums


def _on_disk(state: TrainState) -> Any:
    """The state as Orbax saves it: in place of containers of other libraries, lists of their arrays."""
    fields: list[Any] = [field if _is_plain(field) else jax.tree.leaves(field) for field in state]
    return _Saved(*fields[:5]) if state.model_state is None and state.key is None else TrainState(*fields)


def _in_memory(found: Any, like: TrainState) -> TrainState:
    """The inverse of `_on_disk`."""
    fields: Any = zip(TrainState(*found), like, strict=True)
    fields = [x if _is_plain(as_in) else jax.tree.unflatten(jax.tree.structure(as_in), x) for x, as_in in fields]
    return TrainState(*fields)


def _is_plain(tree: Any) -> bool:
    """True if a pytree is of Python's own containers, or of Optax's and this package's tuples."""
    if tree is None or isinstance(tree, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct)):
        return True
    if isinstance(tree, dict):
        return all(isinstance(key, str) for key in tree) and all(map(_is_plain, tree.values()))
    return isinstance(tree, (list, tuple)) and all(map(_is_plain, tree))


@functools.cache
def _ignore_late_failures() -> None:
    """After a failed read, Python would print a traceback for each of Orbax's other reads, whenever they end."""
    before = sys.unraisablehook

    def hook(unraisable: Any) -> None:
        code = getattr(unraisable.object, "cr_code", None)  # of a coroutine
        of_orbax = code is not None and "orbax" in code.co_filename
        if not of_orbax and str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps asyncio from printing the tracebacks of Orbax's other tasks after one has failed."""
    log = logging.getLogger("asyncio")
    before = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        gc.collect()  # it prints when the tasks are collected
        log.setLevel(before)
