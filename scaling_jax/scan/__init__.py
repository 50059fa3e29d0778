"""An experiment into runs, groups that share a program, and results on disk."""

from scaling_jax.scan.experiment import Experiment, Group, LearningRates, Subject, log_spaced, powers_of_two
from scaling_jax.scan.scan import relative_cost, scan

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
