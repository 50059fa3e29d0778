"""Critical batch sizes and their power law, with confidence intervals, from steps-to-loss data of any training code."""

from scaling_jax.fitting.budget import Budget, BudgetFit, fit_budget
from scaling_jax.fitting.budget_law import BudgetLaw
from scaling_jax.fitting.crossings import Crossings, steps_to_loss
from scaling_jax.fitting.forms import FormFit, compare_forms, further_fits
from scaling_jax.fitting.joint import JointFit, fit_joint
from scaling_jax.fitting.linear_scaling import cbs20
from scaling_jax.fitting.loss_law import LossLaw, PowerLaw, fit_data_law, fit_loss_law, fit_size_law
from scaling_jax.fitting.published_laws import PublishedLaw, published
from scaling_jax.fitting.scan_fit import CriticalBatch, ScanFit, fit_scan
from scaling_jax.fitting.to_steps import steps_from_budgets
from scaling_jax.fitting.tradeoff import Tradeoff, fit_tradeoff

__all__ = [
    "Budget",
    "BudgetFit",
    "BudgetLaw",
    "CriticalBatch",
    "Crossings",
    "FormFit",
    "JointFit",
    "LossLaw",
    "PowerLaw",
    "PublishedLaw",
    "ScanFit",
    "Tradeoff",
    "cbs20",
    "compare_forms",
    "fit_budget",
    "fit_data_law",
    "fit_joint",
    "fit_loss_law",
    "fit_scan",
    "fit_size_law",
    "fit_tradeoff",
    "further_fits",
    "published",
    "steps_from_budgets",
    "steps_to_loss",
]
