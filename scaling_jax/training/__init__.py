"""One run: its configuration, its compiled step, its loop and its records."""

from scaling_jax.training.loop import Interrupted, Progress, train
from scaling_jax.training.optimizers import OptimizerConfig
from scaling_jax.training.ramp import LiveRamp, Stage
from scaling_jax.training.records import RunResult, read_metrics, read_result
from scaling_jax.training.run import Deadline, Run

__all__ = [
    "Deadline",
    "Interrupted",
    "LiveRamp",
    "OptimizerConfig",
    "Progress",
    "Run",
    "RunResult",
    "Stage",
    "read_metrics",
    "read_result",
    "train",
]
