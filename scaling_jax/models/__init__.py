"""The transformer and its size table."""

from scaling_jax.models.parts import is_stacked, part_names, part_of
from scaling_jax.models.sizes import MODELS, ModelConfig, model_config
from scaling_jax.models.transformer import Transformer, next_token_loss

__all__ = [
    "MODELS",
    "ModelConfig",
    "Transformer",
    "is_stacked",
    "model_config",
    "next_token_loss",
    "part_names",
    "part_of",
]
