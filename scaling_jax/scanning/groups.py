"""Training of one group: its learning-rate search, run by run."""

from collections.abc import Callable
from pathlib import Path

from scaling_jax.data import prepare
from scaling_jax.scanning.experiment import Experiment, Group
from scaling_jax.scanning.search import search
from scaling_jax.training import Progress, train


def run_group(
    experiment: Experiment,
    group: Group,
    workdir: Path,
    should_stop: Callable[[], bool],
    on_progress: Callable[[Progress], None],
    num_devices: int = 1,
) -> None:
    """Trains what is missing of a group and leaves its runs' results in `workdir`.

    Args:
      should_stop, on_progress: see `train`.

    Raises:
      Interrupted, UserError: see `train`.
    """
    corpora = {}

    def train_one(run):
        key = (run.text, run.model.context, run.tokenizer)
        if key not in corpora:
            corpora[key] = prepare(*key)
        return train(
            run,
            workdir,
            corpus=corpora[key],
            num_devices=num_devices,
            keep_checkpoint=False,
            should_stop=should_stop,
            on_progress=on_progress,
        )

    search(experiment, group, workdir, train_one)
