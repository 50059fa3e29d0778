"""Optimizers by name, from Optax; the learning rate is applied outside, so that it can be a traced value."""

import dataclasses
from typing import Literal

import optax


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    name: Literal["adam", "sgd"] = "adam"
    beta1: float = 0.9
    beta2: float = 0.98
    clip_norm: float | None = None  # applied after the noise scale is measured


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Update directions of unit learning rate, to be subtracted."""
    direction = {
        "adam": lambda: optax.scale_by_adam(config.beta1, config.beta2),
        "sgd": optax.identity,
    }[config.name]()
    if config.clip_norm is None:
        return direction
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), direction)
