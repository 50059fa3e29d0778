"""Advice from fitted critical batch sizes: a batch size or a batch ramp, and their cost in steps, tokens and time."""

from scaling_jax.advice.choices import (
    Adjusted,
    Choice,
    Hardware,
    choices,
    fastest,
    fewest_steps,
    largest_within,
    least_compute,
    powers_around,
)
from scaling_jax.advice.goal import Goal, goal
from scaling_jax.advice.late_switch import late_switch
from scaling_jax.advice.measured import losses_of, models_of
from scaling_jax.advice.ramp import Cost, Descent, Stage, cost, descent, ramp
from scaling_jax.advice.ramp_formats import ramp_as_text, ramp_from_text
from scaling_jax.advice.rates import Rate, Rates, best_rates
from scaling_jax.advice.seesaw import seesaw

__all__ = [
    "Adjusted",
    "Choice",
    "Cost",
    "Descent",
    "Goal",
    "Hardware",
    "Rate",
    "Rates",
    "Stage",
    "best_rates",
    "choices",
    "cost",
    "descent",
    "fastest",
    "fewest_steps",
    "goal",
    "largest_within",
    "late_switch",
    "least_compute",
    "losses_of",
    "models_of",
    "powers_around",
    "ramp",
    "ramp_as_text",
    "ramp_from_text",
    "seesaw",
]
