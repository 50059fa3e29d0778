"""Advice from fitted critical batch sizes: a batch size or a batch ramp, and their cost in steps, tokens and time."""

from scaling_jax.advice.goal import (
    Adjusted,
    Choice,
    Goal,
    Hardware,
    choices,
    fastest,
    fewest_steps,
    goal,
    largest_within,
    least_compute,
    losses_of,
    models_of,
    powers_around,
)
from scaling_jax.advice.ramp import Cost, Descent, Stage, cost, descent, ramp

__all__ = [
    "Adjusted",
    "Choice",
    "Cost",
    "Descent",
    "Goal",
    "Hardware",
    "Stage",
    "choices",
    "cost",
    "descent",
    "fastest",
    "fewest_steps",
    "goal",
    "largest_within",
    "least_compute",
    "losses_of",
    "models_of",
    "powers_around",
    "ramp",
]
