"""Language modelling: the built-in task, with a built-in model or one of your own."""

from typing import Any

import jax
import jax.numpy as jnp

from scaling_jax.io import UserError
from scaling_jax.tasks.task import Task
from scaling_jax.tasks.transformer import (
    Model,
    Transformer,
    is_stacked,
    next_token_loss,
    part_names,
    part_of,
)

_EVALUATED = 16  # rows at a time; few enough for a CPU's cache


class LanguageModel(Task):
    """Predicts the next token of a text.

    Args:
      model: a built-in model's config, or an object with `init(key, tokens [B, T]) -> params` and
        `apply(params, tokens [B, T]) -> logits [B, T, V]`, such as a Flax Linen module.
      text, tokenizer: as those of an experiment, which takes them from here.
      context: tokens per example; a built-in model says it.
      name: for folders and tables.
    """

    unit = "tokens"
    evaluation_batch = _EVALUATED

    def __init__(
        self,
        model: Any,
        text: str = "python",
        tokenizer: str = "bytes",
        *,
        context: int | None = None,
        name: str = "",
    ):
        self.model, self.text, self.tokenizer = model, text, tokenizer
        if isinstance(model, Model):
            if context not in (None, model.context):
                raise UserError(f"context = {context} isn't that of the model, {model.context}: change the model's")
            self.name, self.units_per_example, self.num_params = model.name, model.context, model.num_params
            self.part_of, self.is_stacked = part_of, is_stacked  # type: ignore[method-assign]
            self.parts: tuple[str, ...] | None = part_names(model.n_layer)
            self.loss = batch_loss(model)  # type: ignore[method-assign]
        else:
            if context is None:
                raise UserError("LanguageModel needs context=…, the tokens per example, for a model of your own")
            self.name, self.units_per_example = name or type(model).__name__, context
            self.parts = None

    def init(self, key) -> Any:
        found = self.model
        if isinstance(found, Model):
            return Transformer(found).init(key, jnp.zeros((1, found.context), jnp.int32))["params"]
        return found.init(key, jnp.zeros((1, self.units_per_example), jnp.int32))

    def logits(self, params, tokens_BxT) -> jax.Array:
        """Those of the model, in float32: [B, T, V]."""
        return self.model.apply(params, tokens_BxT).astype(jnp.float32)

    def loss(self, params, batch):
        tokens_BxT1 = batch.astype(jnp.int32)
        return next_token_loss(self.logits(params, tokens_BxT1[:, :-1]), tokens_BxT1[:, 1:])


def batch_loss(model: Model):
    """The training loss of a built-in model: `(params, tokens [B, T + 1]) -> nats per token`."""
    transformer = Transformer(model)

    def loss(params, batch):
        tokens_BxT1 = batch.astype(jnp.int32)
        return transformer.apply({"params": params}, tokens_BxT1[:, :-1], tokens_BxT1[:, 1:])

    return loss
