"""The transformer and its size table."""

from scaling_jax.models.sizes import MODELS, ModelConfig, model_config
from scaling_jax.models.transformer import Transformer, next_token_loss

__all__ = ["MODELS", "ModelConfig", "Transformer", "model_config", "next_token_loss"]
