"""The built-in models by name: Kaplan et al.'s, such as 4x256, and Llama's, such as llama-4x256 or llama-4x256-8e2."""

import dataclasses
import re
from typing import Any

import flax.linen as nn

from scaling_jax.io import UserError
from scaling_jax.tasks.llama import Llama, LlamaConfig
from scaling_jax.tasks.other_model import OtherModel
from scaling_jax.tasks.task import TaskModel
from scaling_jax.tasks.transformer import ModelConfig, Transformer

Model = ModelConfig | LlamaConfig

_LLAMA = re.compile(r"llama-(\d{1,4})x(\d{1,6})(?:-(\d{1,4})e(\d{1,4}))?")
# (n_layer, d_model, n_head); a head has a width of 16 … 64
_SIZES = [
    (1, 16, 1),
    (1, 32, 1),
    (2, 32, 1),
    (2, 48, 2),
    (2, 64, 2),
    (4, 128, 4),
    (4, 256, 4),  # 3M
    (6, 384, 6),  # 11M
    (8, 512, 8),  # 25M
    (12, 768, 12),  # 85M
]


def llama(n_layer: int, d_model: int, num_experts: int = 0, active_experts: int = 1) -> LlamaConfig:
    """The model called llama-{n_layer}x{d_model}, or …-{num_experts}e{active_experts}.

    Heads have a size of 16 below a width of 128, 32 below 256, else 64, and there are half as many heads of keys and
    values. Feed-forward layers are 8/3 as wide as the model, so that N is about that of Kaplan's size. Active experts
    share this width.
    """
    head_size = 16 if d_model < 128 else 32 if d_model < 256 else 64
    if not d_model or d_model % head_size:
        raise UserError(f"a llama of width {d_model} needs a multiple of {head_size}, the size of its heads")
    n_head = d_model // head_size
    return LlamaConfig(
        n_layer,
        d_model,
        n_head,
        n_kv_head=max(n for n in range(1, max(1, n_head // 2) + 1) if n_head % n == 0),
        d_ff=8 * max(1, round(d_model / (3 * max(1, active_experts)))),
        num_experts=num_experts,
        active_experts=active_experts,
    )


_ALL: list[Model] = [*(ModelConfig(*size) for size in _SIZES), *(llama(*size[:2]) for size in _SIZES)]
MODELS = {model.name: model for model in _ALL}


def model_config(name: str, **changes: Any) -> Any:
    """The model with a name of `MODELS`, or a llama of another size, with changes such as `context` or `vocab_size`.

    Returns:
      `ModelConfig`, or `LlamaConfig` for names such as llama-4x256 and, with 2 of 8 experts for each token,
      llama-4x256-8e2.

    Raises:
      UserError: if there is no such name.
    """
    if match := _LLAMA.fullmatch(name):
        n_layer, d_model, *experts = (int(x) for x in match.groups() if x is not None)
        model: Model = llama(n_layer, d_model, *experts)
    elif name in MODELS:
        model = MODELS[name]
    else:
        sizes = ", ".join(n for n in MODELS if not n.startswith("llama"))
        raise UserError(
            f"unknown model size {name!r}: choose from {sizes}, or llama- with any size, such as llama-4x256, or "
            "llama-4x256-8e2 for 8 experts of which each token uses 2"
        )
    return dataclasses.replace(model, **changes)


def renamed(model: Model | OtherModel | TaskModel, name: str) -> Model:
    """The model with another name, and with the vocabulary, context and type of this one. Raises as `model_config`."""
    same = ("vocab_size", "context", "compute_dtype") if isinstance(model, Model) else ()
    return model_config(name, **{field: getattr(model, field) for field in same})


def network(model: Model) -> nn.Module:
    """The Flax module of a model: `(tokens_BxT) -> logits_BxTxV`; with `targets_BxT`, the training loss instead."""
    return Llama(model) if isinstance(model, LlamaConfig) else Transformer(model)


def as_evaluated(model: Model) -> Model:
    """The model whose loss is that of the next token alone: without the balance of experts."""
    return dataclasses.replace(model, balance=0.0) if isinstance(model, LlamaConfig) else model


def rate_factor(model: Any):
    """`path -> factor` of a parameter's learning rate; None if all parameters have the same, as those of a task."""
    return model.rate_factor if isinstance(model, LlamaConfig) and model.mup_base_width is not None else None
