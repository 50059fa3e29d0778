"""Training state on disk, through Orbax: written asynchronously and atomically."""

import logging
import warnings

import jax
import orbax.checkpoint as ocp
from etils import epath

from scaling_jax.parallel import agree, from_first
from scaling_jax.training.program import TrainState


class Checkpoints:
    """States of a run in a folder, named by step."""

    def __init__(self, folder: epath.PathLike, keep: int | None = 2):
        """`folder` is absolute, or in a bucket; `keep` is how many of the newest stay, None for all."""
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save
        self._folder = epath.Path(folder)
        self._manager = ocp.CheckpointManager(
            self._folder, options=ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
        )

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest state that can be read, or None if there is none; a warning names those that can't."""
        damaged: list[int] = []
        for step in from_first(sorted(self._manager.all_steps(), reverse=True)):
            state, problem = None, ""
            try:
                state = self.restore_step(step, like)
            except Exception as error:  # Orbax raises whatever its readers do
                problem = type(error).__name__
            if not agree(bool(problem))[0]:
                for newer in damaged:  # Orbax would save none until past it
                    self._manager.delete(newer)
                return state
            damaged.append(step)
            folder = self._folder / str(step)
            warnings.warn(f"{folder} is damaged ({problem or 'for others'}): using an earlier state", stacklevel=2)
        return None

    def restore_step(self, step: int, like: TrainState) -> TrainState:
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return restored["state"]

    def save(self, state: TrainState) -> None:
        self._manager.save(int(state.step), args=ocp.args.Composite(state=ocp.args.StandardSave(state)))

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
