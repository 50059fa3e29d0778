"""Optimizers by name, or by the import path of a factory, for a traced learning rate, so that each compiles once."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import optax
from optax import contrib

from scaling_jax.io import UserError
from scaling_jax.io.config import Settings
from scaling_jax.training.factories import check_factory, imported, path_of

NAMES = ("adam", "adamw", "sgd", "signum", "muon", "adafactor")
LIKE_ADAM = ("adam", "adamw", "signum")  # every number moves by about the learning rate; μP's rates are for these
WeightDecayRule = Literal["run", "sqrt", "timescale"]
WEIGHT_DECAY_RULES: tuple[WeightDecayRule, ...] = get_args(WeightDecayRule)
_ALIKE_RMS = 0.2  # of Muon's update, so that it works with Adam's learning rates (Liu et al. 2025, arXiv 2502.16982)


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """An optimizer and its settings; an optimizer ignores the settings that it doesn't have.

    Besides the names of `NAMES`, `name` takes the import path of a function `(learning_rate, **settings)` that returns
    an Optax transformation: "optax:lion", "mymodule:make"; or the function itself, if it has an import path. It sees
    each layer's parameters as arrays of their own. Of the other values here, only `clip_norm` applies to it.

    For the optimizers of `NAMES`: give β's per step, or as half-lives in tokens. Half-lives make them comparable across
    batch sizes (Marek et al. 2025, arXiv 2507.07101). Weight decay is decoupled, multiplied by the learning rate, and
    applied to matrices only.
    """

    name: str = "adam"
    beta1: float = 0.9  # momentum of adam, adamw, signum and muon
    beta2: float = 0.98  # second moment of adam, adamw, and of muon except for matrices inside layers
    beta1_half_life_tokens: float | None = None
    beta2_half_life_tokens: float | None = None
    weight_decay: float = 0.0
    clip_norm: float | None = None  # applied after the noise scale is measured
    settings: Settings = Settings()  # of an imported optimizer: {"b1": 0.95}

    def __post_init__(self):
        if callable(self.name):
            object.__setattr__(self, "name", path_of(self.name))
        object.__setattr__(self, "settings", Settings(self.settings))
        if not self.is_imported and self.name not in NAMES:
            raise UserError(
                f"optimizer.name = {self.name!r}: choose from {', '.join(NAMES)}, or give the import path of a "
                "factory, such as optax:lion"
            )
        if self.settings and not self.is_imported:
            raise UserError(
                f"optimizer.settings = {dict(self.settings)} are for an optimizer by import path, such as optax:lion; "
                f"{self.name} has beta1, beta2 and weight_decay"
            )
        if self.is_imported and self.weight_decay:
            raise UserError(
                f"optimizer.weight_decay = {self.weight_decay} isn't for {self.name}: give it as "
                "optimizer.settings.weight_decay, if it takes one"
            )
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

    @property
    def is_imported(self) -> bool:
        """True if the name is an import path."""
        return ":" in self.name

    def at(self, batch_tokens: int, growth: float = 1.0, decay: float = 1.0) -> "OptimizerConfig":
        """The config with β's per step for a batch of `growth · batch_tokens`, without half-lives.

        β's that are given per step belong to `batch_tokens`. Weight decay is multiplied by `decay`.
        """
        betas = {}
        for name in ("beta1", "beta2"):
            half_life = getattr(self, f"{name}_half_life_tokens")
            beta = getattr(self, name) if half_life is None else 0.5 ** (batch_tokens / half_life)
            betas[name] = beta**growth
        return dataclasses.replace(
            self,
            **betas,
            beta1_half_life_tokens=None,
            beta2_half_life_tokens=None,
            weight_decay=self.weight_decay * decay,
        )


def weight_decay_growth(rule: WeightDecayRule, batch_growth: float, rate_growth: float) -> float:
    """The factor of weight decay λ where the batch B grows by one factor and the learning rate η by another.

    "run": 1. "sqrt": √ of the batch's. "timescale": λ keeps B/(ηλ), the tokens over which AdamW's weights are an
    average of its updates (Wang and Aitchison 2024, arXiv 2405.13698; Bergsma et al. 2025, arXiv 2505.13738). With η as
    √B both rules are the same; with η as it is, the timescale needs λ as B.
    """
    return {"run": 1.0, "sqrt": batch_growth**0.5, "timescale": batch_growth / rate_growth}[rule]


def check_weight_decay_rule(rule: WeightDecayRule, config: OptimizerConfig) -> None:
    """Raises UserError for a rule that there isn't, or that has no weight decay to change."""
    if rule not in WEIGHT_DECAY_RULES:
        raise UserError(f"weight_decay_rule = {rule!r}: choose from {', '.join(WEIGHT_DECAY_RULES)}")
    if rule != "run" and not config.weight_decay:
        own = f"{config.name} has settings of its own, which no rule changes" if config.is_imported else "it is 0"
        raise UserError(f"weight_decay_rule = {rule!r} is for optimizer.weight_decay, and {own}: use run")


def make_optimizer(
    config: OptimizerConfig, rate_factor: Callable[[str], float] | None = None
) -> optax.GradientTransformationExtraArgs:
    """The optimizer: `update(grads, state, params, learning_rate=…)` gives the updates to add to the parameters.

    Needs β's per step (see `OptimizerConfig.at`).

    Args:
      rate_factor: path of a parameter -> factor of its learning rate. Weight decay keeps the learning rate as it is.

    Raises:
      UserError: if the import path of an optimizer doesn't lead to one that works.
    """
    clip = [optax.clip_by_global_norm(config.clip_norm)] if config.clip_norm is not None else []
    if config.is_imported:
        return _from_factory(clip, _factory(config.name, config.settings))
    chain = [
        *clip,
        _direction(config),
        _times(rate_factor) if rate_factor is not None else None,
        optax.add_decayed_weights(config.weight_decay, mask=_is_matrix) if config.weight_decay else None,
    ]
    # Built for a rate of 1: all of these are linear in the learning rate.
    direction = optax.chain(*(part for part in chain if part is not None))

    def update(grads, state, params=None, *, learning_rate, **_):
        updates, state = direction.update(grads, state, params)
        return jax.tree.map(lambda u: -learning_rate * u, updates), state

    return optax.GradientTransformationExtraArgs(direction.init, update)


def check_optimizer(config: OptimizerConfig) -> None:
    """Raises UserError if the import path of an optimizer doesn't lead to one that works. Imports its module."""
    if config.is_imported:
        _factory(config.name, config.settings)


def counts_layers(path) -> bool:
    """True if the leading axis of an array counts layers, by its key path in parameters or in an optimizer's state."""
    return any(getattr(key, "key", None) == "layers" for key in path)


@functools.cache
def _factory(path: str, settings: Settings) -> Callable[[Any], optax.GradientTransformation]:
    """`learning_rate -> transformation`, checked."""
    factory = functools.partial(imported(path), **settings)
    return check_factory(path, lambda learning_rate: factory(learning_rate=learning_rate))


def _from_factory(clip, factory) -> optax.GradientTransformationExtraArgs:
    """The transformation is made anew from the traced learning rate at every step; its state doesn't depend on it."""

    def at(learning_rate):
        return optax.chain(*clip, factory(learning_rate))

    def update(grads, state, params=None, *, learning_rate, **_):
        updates, state = at(learning_rate).update(_layer_by_layer(grads), state, _layer_by_layer(params))
        return _stacked(updates, like=grads), state

    return optax.GradientTransformationExtraArgs(lambda params: at(1.0).init(_layer_by_layer(params)), update)


def _layer_by_layer(params):
    """The parameters with "layer_1", "layer_2" … in place of "layers", whose arrays have a leading axis of layers.

    So an optimizer that treats matrices, or norms of arrays, in its own way sees the arrays that the model has.
    """
    if not _has_layers(params):
        return params
    rest = {name: x for name, x in params.items() if name != "layers"}
    count = len(jax.tree.leaves(params["layers"])[0])
    return rest | {f"layer_{k + 1}": jax.tree.map(lambda x, k=k: x[k], params["layers"]) for k in range(count)}


def _has_layers(params) -> bool:
    return isinstance(params, dict) and bool(jax.tree.leaves(params.get("layers")))


def _stacked(updates, like):
    """The inverse of `_layer_by_layer`."""
    if not _has_layers(like):
        return updates
    layers = [x for name, x in updates.items() if name not in like]
    return {name: updates[name] for name in like if name != "layers"} | {
        "layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)
    }


def _times(factor: Callable[[str], float]) -> optax.GradientTransformation:
    def times(path, update):
        return factor(jax.tree_util.keystr(path, simple=True, separator="/")) * update

    return optax.stateless(lambda updates, params: jax.tree.map_with_path(times, updates))


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
        inside = counts_layers(path) and x.ndim >= 3  # layers, perhaps experts, and a matrix
        return contrib.MuonDimensionNumbers(reduction_axis=x.ndim - 2, output_axis=x.ndim - 1) if inside else None

    return jax.tree.map_with_path(axes, params)
