"""From fitted critical batch sizes to a batch size or a batch ramp, and what each costs in steps, tokens and time."""

from scaling_jax.advice.adjust import Adjusted, fewest_steps, least_compute
from scaling_jax.advice.choices import Choice, Hardware, choices, fastest, largest_within, powers_around
from scaling_jax.advice.goal import Goal, goal, losses_of, models_of
from scaling_jax.advice.ramp import Progress, Stage, progress, ramp, reach

__all__ = [
    "Adjusted",
    "Choice",
    "Goal",
    "Hardware",
    "Progress",
    "Stage",
    "choices",
    "fastest",
    "fewest_steps",
    "goal",
    "largest_within",
    "least_compute",
    "losses_of",
    "models_of",
    "powers_around",
    "progress",
    "ramp",
    "reach",
]
