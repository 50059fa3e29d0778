"""What is trained: language modelling with a decoder-only transformer, tasks of your own, models of other trainers."""

from scaling_jax.tasks.evaluation import evaluator, fsdp_evaluator, held_out_rows, shared_evaluator
from scaling_jax.tasks.language_model import LanguageModel, batch_loss
from scaling_jax.tasks.other_model import OtherModel
from scaling_jax.tasks.task import Task, TaskModel
from scaling_jax.tasks.trainable import Trainable, record_of, trainable
from scaling_jax.tasks.transformer import (
    MODELS,
    Model,
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
    "LanguageModel",
    "Model",
    "ModelConfig",
    "OtherModel",
    "Task",
    "TaskModel",
    "Trainable",
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
    "record_of",
    "shared_evaluator",
    "trainable",
]
