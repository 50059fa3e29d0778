"""What is trained: language modelling with two families of models, tasks of your own, models of other trainers."""

from scaling_jax.tasks.evaluation import evaluator, fsdp_evaluator, held_out_rows, shared_evaluator
from scaling_jax.tasks.language_model import LanguageModel, batch_loss
from scaling_jax.tasks.layers import is_stacked, next_token_loss, part_names, part_of
from scaling_jax.tasks.llama import Llama, LlamaConfig
from scaling_jax.tasks.models import MODELS, Model, model_config, network, rate_factor, renamed
from scaling_jax.tasks.other_model import OtherModel
from scaling_jax.tasks.task import Task, TaskModel
from scaling_jax.tasks.trainable import Trainable, record_of, trainable
from scaling_jax.tasks.transformer import ModelConfig, Transformer

__all__ = [
    "MODELS",
    "LanguageModel",
    "Llama",
    "LlamaConfig",
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
    "network",
    "next_token_loss",
    "part_names",
    "part_of",
    "rate_factor",
    "record_of",
    "renamed",
    "shared_evaluator",
    "trainable",
]
