"""The training task: language modelling with a decoder-only transformer; two families of models; models of others."""

from scaling_jax.tasks.language_model import batch_loss, evaluator, fsdp_evaluator, held_out_rows, shared_evaluator
from scaling_jax.tasks.layers import is_stacked, next_token_loss, part_names, part_of
from scaling_jax.tasks.llama import Llama, LlamaConfig
from scaling_jax.tasks.models import MODELS, Model, model_config, network, rate_factor, renamed
from scaling_jax.tasks.other_model import OtherModel
from scaling_jax.tasks.transformer import ModelConfig, Transformer

__all__ = [
    "MODELS",
    "Llama",
    "LlamaConfig",
    "Model",
    "ModelConfig",
    "OtherModel",
    "Transformer",
    "batch_loss",
    "evaluator",
    "fsdp_evaluator",
    "held_out_rows",
    "is_stacked",
    "model_config",
    "network",
    "next_token_loss",
    "part_names",
    "part_of",
    "rate_factor",
    "renamed",
    "shared_evaluator",
]
