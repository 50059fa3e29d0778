"""Language modelling: the loss of a batch of rows, and of the same held-out rows at every evaluation of every run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from scaling_jax.tasks.transformer import ModelConfig, Transformer

_CHUNK = 16  # rows at a time: small enough for a CPU's cache


def batch_loss(model: ModelConfig):
    """`(params, tokens [B, T + 1]) -> nats per token`."""
    transformer = Transformer(model)

    def loss(params, tokens_BxT1):
        tokens_BxT1 = tokens_BxT1.astype(jnp.int32)
        return transformer.apply({"params": params}, tokens_BxT1[:, :-1], tokens_BxT1[:, 1:])

    return loss


def held_out_rows(test_RxT1: np.ndarray, eval_tokens: int) -> np.ndarray:
    """A fixed random choice of about `eval_tokens` tokens, in whole rows, from all over the test split."""
    context = test_RxT1.shape[1] - 1
    count = max(1, min(len(test_RxT1), eval_tokens // context))
    if count > _CHUNK:
        count -= count % _CHUNK
    return test_RxT1[np.sort(np.random.default_rng(0).permutation(len(test_RxT1))[:count])]


@functools.cache
def evaluator(model: ModelConfig):
    """`(params, rows [R, T + 1]) -> mean loss in nats per token`, compiled; R a multiple of the chunk, or below it."""
    loss = batch_loss(model)

    def evaluate(params, rows_RxT1):
        chunks = rows_RxT1.reshape(-1, min(_CHUNK, len(rows_RxT1)), rows_RxT1.shape[1])
        return jnp.mean(jax.lax.map(lambda chunk: loss(params, chunk), chunks))

    return jax.jit(evaluate)
