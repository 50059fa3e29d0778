"""The training task: language modelling with a decoder-only transformer; the table of sizes; models of others."""

from scaling_jax.tasks.language_model import batch_loss, evaluator, fsdp_evaluator, held_out_rows, shared_evaluator
from scaling_jax.tasks.other_model import OtherModel
from scaling_jax.tasks.transformer import (
    MODELS,
    ModelConfig,
    Transformer,
    is_stacked,
    model_config,
    next_token_loss,
    part_names,
    part_of,
)

__all__ = [
    "MODELS",
    "ModelConfig",
    "OtherModel",
    "Transformer",
    "batch_loss",
    "evaluator",
    "fsdp_evaluator",
    "held_out_rows",
    "is_stacked",
    "model_config",
    "next_token_loss",
    "part_names",
    "part_of",
    "shared_evaluator",
]
