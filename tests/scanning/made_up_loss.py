"""Losses of a trainer that is made up. Imports nothing large, so that it starts as a program at once."""

import math

B_CRIT = 64.0


def loss_after(step: int, batch: int, learning_rate: float) -> float:
    """Steps to a loss L are 100·((3/L)^6 - 1)·(1 + B_CRIT/B), and more at rates other than the best, 0.12 of a rule."""
    best = 0.12 / math.sqrt(1 + 128 / batch)
    slower = math.exp(math.log(learning_rate / best) ** 2)
    return 3 * (1 + step / (100 * (1 + B_CRIT / batch) * slower)) ** (-1 / 6)
