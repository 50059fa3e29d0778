"""Training state on disk, through Orbax: written asynchronously, atomic, the newest two kept."""

import logging
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from scaling_jax.training.program import TrainState


class Checkpoints:
    """A run's checkpoints, named by step."""

    def __init__(self, folder: Path):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax narrates every save
        options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
        self._manager = ocp.CheckpointManager(folder.resolve(), options=options)

    def restore(self, like: TrainState) -> TrainState | None:
        """The newest state, or None if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restored = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(abstract)))
        return restored["state"]

    def save(self, state: TrainState) -> None:
        self._manager.save(int(state.step), args=ocp.args.Composite(state=ocp.args.StandardSave(state)))

    def close(self) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
