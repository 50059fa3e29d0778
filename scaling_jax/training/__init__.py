"""Training a run: its configuration, its compiled step, its loop and its records on disk."""

from scaling_jax.training.attempt import Interrupted
from scaling_jax.training.journal import Progress
from scaling_jax.training.loop import train
from scaling_jax.training.metrics import SquaredNorms
from scaling_jax.training.optimizers import OptimizerConfig
from scaling_jax.training.population import train_many
from scaling_jax.training.records import RunResult, read_metrics, read_result, run_folder
from scaling_jax.training.run import Deadline, Recipe, Run, Skip, next_evaluation
from scaling_jax.training.schedules import Schedule
from scaling_jax.training.stages import LiveRamp, Stage

__all__ = [
    "Deadline",
    "Interrupted",
    "LiveRamp",
    "OptimizerConfig",
    "Progress",
    "Recipe",
    "Run",
    "RunResult",
    "Schedule",
    "Skip",
    "SquaredNorms",
    "Stage",
    "next_evaluation",
    "read_metrics",
    "read_result",
    "run_folder",
    "train",
    "train_many",
]
