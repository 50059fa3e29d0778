"""Batch-size scans: experiments, their cells and learning-rate searches, executors, plans, and branches of runs."""

from scaling_jax.scanning.experiment import Cell, Experiment, LearningRates, Subject, log_spaced, powers_of_two
from scaling_jax.scanning.scan import relative_cost, scan
from scaling_jax.scanning.study import Setting, Study
from scaling_jax.scanning.worker import Event

__all__ = [
    "Cell",
    "Event",
    "Experiment",
    "LearningRates",
    "Setting",
    "Study",
    "Subject",
    "log_spaced",
    "powers_of_two",
    "relative_cost",
    "scan",
]
