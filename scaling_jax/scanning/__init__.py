"""An experiment into runs, groups that share a program, and results on disk."""

from scaling_jax.scanning.experiment import Experiment, Group, LearningRates, Subject, log_spaced, powers_of_two
from scaling_jax.scanning.schedule import relative_cost, scan

__all__ = [
    "Experiment",
    "Group",
    "LearningRates",
    "Subject",
    "log_spaced",
    "powers_of_two",
    "relative_cost",
    "scan",
]
