"""Optimizers of Optax by name. They don't include the learning rate, so that it can be a traced value."""

import dataclasses
from typing import Literal, get_args

import jax
import optax
from optax import contrib

from scaling_jax.io import UserError

Name = Literal["adam", "adamw", "sgd", "signum", "muon", "adafactor"]
NAMES: tuple[Name, ...] = get_args(Name)
_ALIKE_RMS = 0.2  # of Muon's update, so that it works with Adam's learning rates (Liu et al. 2025, arXiv 2502.16982)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and its settings; an optimizer ignores the settings that it doesn't have.

    Give β's per step, or as half-lives in tokens. Half-lives make them comparable across batch sizes (Marek et al.
    2025, arXiv 2507.07101). Weight decay is decoupled, multiplied by the learning rate, and applied to matrices only.
    """

    name: Name = "adam"
    beta1: float = 0.9  # momentum of adam, adamw, signum and muon
    beta2: float = 0.98  # second moment of adam, adamw, and of muon except for matrices inside layers
    beta1_half_life_tokens: float | None = None
    beta2_half_life_tokens: float | None = None
    weight_decay: float = 0.0
    clip_norm: float | None = None  # applied after the noise scale is measured

    def __post_init__(self):
        if self.name not in NAMES:
            raise UserError(f"optimizer.name = {self.name!r}: choose from {', '.join(NAMES)}")
        for beta in ("beta1", "beta2"):
            if not 0 <= getattr(self, beta) < 1:
                raise UserError(f"optimizer.{beta} = {getattr(self, beta)} must be at least 0 and below 1")
            half_life = getattr(self, f"{beta}_half_life_tokens")
            if half_life is not None and not half_life > 0:
                raise UserError(f"optimizer.{beta}_half_life_tokens = {half_life} must be positive")
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise UserError(f"optimizer.clip_norm = {self.clip_norm} must be positive")
        decays = self.weight_decay > 0
        if self.weight_decay < 0 or (self.name == "adam" and decays) or (self.name == "adamw" and not decays):
            raise UserError(
                f"optimizer.weight_decay = {self.weight_decay} with {self.name}: it must be positive for adamw, 0 for "
                "adam, and never negative"
            )

    def at(self, batch_tokens: int, growth: float = 1.0) -> "OptimizerConfig":
        """The config with β's per step for a batch of `growth · batch_tokens`, without half-lives.

        β's that are given per step belong to `batch_tokens`.
        """
        betas = {}
        for name in ("beta1", "beta2"):
            half_life = getattr(self, f"{name}_half_life_tokens")
            beta = getattr(self, name) if half_life is None else 0.5 ** (batch_tokens / half_life)
            betas[name] = beta**growth
        return dataclasses.replace(self, **betas, beta1_half_life_tokens=None, beta2_half_life_tokens=None)


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """The optimizer with a learning rate of 1; subtract its updates. Needs β's per step (see `OptimizerConfig.at`)."""
    chain = [
        optax.clip_by_global_norm(config.clip_norm) if config.clip_norm is not None else None,
        _direction(config),
        optax.add_decayed_weights(config.weight_decay, mask=_is_matrix) if config.weight_decay else None,
    ]
    return optax.chain(*(part for part in chain if part is not None))


def counts_layers(path) -> bool:
    """True if the leading axis of an array counts layers, by its key path in parameters or in an optimizer's state."""
    return any(getattr(key, "key", None) == "layers" for key in path)


def _direction(config: OptimizerConfig) -> optax.GradientTransformation:
    if config.name == "sgd":
        return optax.identity()
    if config.name == "signum":  # Bernstein et al. 2018, arXiv 1802.04434
        return optax.chain(optax.ema(config.beta1, debias=False), optax.scale_by_sign())
    if config.name == "adafactor":  # Shazeer and Stern 2018, arXiv 1804.04235, without the relative step size
        return optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0))
    if config.name == "muon":
        muon = contrib.muon(
            1.0,
            beta=config.beta1,
            adam_b1=config.beta1,
            adam_b2=config.beta2,
            muon_weight_dimension_numbers=_muon_axes,
            consistent_rms=_ALIKE_RMS,
        )
        return optax.chain(muon, optax.scale(-1.0))
    return optax.scale_by_adam(config.beta1, config.beta2)


def _is_matrix(params):
    return jax.tree.map_with_path(lambda path, x: x.ndim - counts_layers(path) >= 2, params)


def _muon_axes(params):
    """Muon orthogonalises each matrix inside layers; embeddings, norms and biases use Adam."""

    def axes(path, x):
        inside = counts_layers(path) and x.ndim == 3
        return contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2) if inside else None

    return jax.tree.map_with_path(axes, params)
