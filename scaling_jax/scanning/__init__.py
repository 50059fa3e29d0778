"""Batch-size scans: experiments, cells, learning-rate searches, executors, plans; branches of runs; budget scans."""

from scaling_jax.scanning.annealing import log_horizons
from scaling_jax.scanning.budget_runs import scan_budgets
from scaling_jax.scanning.budget_scan import BudgetScan, BudgetSubject
from scaling_jax.scanning.experiment import Cell, Experiment, LearningRates, Subject, log_spaced, powers_of_two
from scaling_jax.scanning.scan import relative_cost, scan
from scaling_jax.scanning.study import Setting, Study
from scaling_jax.scanning.worker import Event

__all__ = [
    "BudgetScan",
    "BudgetSubject",
    "Cell",
    "Event",
    "Experiment",
    "LearningRates",
    "Setting",
    "Study",
    "Subject",
    "log_horizons",
    "log_spaced",
    "powers_of_two",
    "relative_cost",
    "scan",
    "scan_budgets",
]
