"""What all families of models here have: attention, a stack of layers, the loss, and the names of their parts."""

import math
import os
import re
from collections.abc import Callable
from typing import Any, Literal, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling_jax.io import UserError
from scaling_jax.io.config import check_at_most

Attention = Literal["auto", "xla", "cudnn"]

STD = 0.02  # of initial parameters
NEVER = -1e30  # a logit whose probability is exactly zero
_LARGEST_SIZE = 2**31 - 1  # of an axis: ids and positions are int32
_MOST_UNROLLED = 4  # layers
_MOST_UNROLLED_ON_GPU = 12
_MOST_LOGITS = 2**25  # at a time, 128 MiB; with more, the loss is computed in chunks
_MOST_LOGITS_ON_GPU = 2**31  # 4 GiB in bfloat16, and as much for their gradients
_ALIGNED = 128  # columns; to products of other widths cuBLAS is given padded copies of all logits


class Sizes(Protocol):
    """What this module reads of a model's configuration."""

    @property
    def n_layer(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def n_head(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def compute_dtype(self) -> Literal["float32", "bfloat16"]: ...
    @property
    def attention(self) -> Attention: ...


def check_sizes(c: Sizes, *fields: str) -> None:
    """Raises UserError if one of the fields isn't positive, heads don't divide the width, or cuDNN lacks its type."""
    for field in fields:
        if getattr(c, field) < 1:
            raise UserError(f"{field} = {getattr(c, field)} must be positive")
        check_at_most(field, getattr(c, field), _LARGEST_SIZE)
    if c.d_model % c.n_head:
        raise UserError(f"d_model = {c.d_model} must be a multiple of n_head = {c.n_head}")
    if c.attention == "cudnn" and c.compute_dtype != "bfloat16":
        raise UserError('attention="cudnn" works in bfloat16 only: set compute_dtype="bfloat16", or attention="auto"')


def stack_of(block: Any, c: Sizes) -> nn.Module:
    """All layers, `(x, None) -> (x, what each layer returns besides)`. Their parameters are stacked on a leading axis.

    The layers run in a scan. Unrolled layers run up to 1.5 times faster, but many layers take long to compile. So up to
    4 layers are unrolled, on GPUs 12; this changes neither parameters nor results.

    Args:
      block: a module of one layer, whose only field is the configuration.
    """
    most_unrolled = _MOST_UNROLLED_ON_GPU if on_gpu() else _MOST_UNROLLED
    return nn.scan(
        block,
        variable_axes={"params": 0, "intermediates": 0},
        split_rngs={"params": True},
        length=c.n_layer,
        unroll=c.n_layer if c.n_layer <= most_unrolled else 1,
    )(c, name="layers")


def causal_attention(
    q_BxTxHxK: jax.Array, k_BxTxGxK: jax.Array, v_BxTxGxK: jax.Array, implementation: Literal["xla", "cudnn"] = "xla"
) -> jax.Array:
    """Causal self-attention [B, T, H·K], with softmax in float32. Each head of keys and values serves H/G of queries.

    "xla" splits the queries into up to four parts, and leaves out the keys after each part: 10/16 of the work. "cudnn"
    needs a GPU and bfloat16.
    """
    B, T, H, _ = q_BxTxHxK.shape
    if implementation == "cudnn":
        attended = jax.nn.dot_product_attention(q_BxTxHxK, k_BxTxGxK, v_BxTxGxK, is_causal=True, implementation="cudnn")
        return attended.reshape(B, T, -1)
    if (times := H // k_BxTxGxK.shape[2]) > 1:
        k_BxTxGxK, v_BxTxGxK = (jnp.repeat(x, times, axis=2) for x in (k_BxTxGxK, v_BxTxGxK))
    q, k, v = q_BxTxHxK, k_BxTxGxK, v_BxTxGxK
    size = max(64, math.ceil(T / 4))
    parts = [
        _attend(q[:, start : start + size], k[:, : start + size], v[:, : start + size]) for start in range(0, T, size)
    ]
    return jnp.concatenate(parts, axis=1).reshape(B, T, -1)


def attention_of(c: Sizes) -> Literal["xla", "cudnn"]:
    """The attention that "auto" means on this machine."""
    if c.attention != "auto":
        return c.attention
    # Its backward pass adds up in any order, and XLA fails if told not to (openxla/xla #46500, jax 0.11.2).
    deterministic = re.search(r"--xla_gpu_deterministic_ops(=true|=1)?(\s|$)", os.environ.get("XLA_FLAGS", ""))
    return "cudnn" if on_gpu() and c.compute_dtype == "bfloat16" and not deterministic else "xla"


def next_token_loss(logits_BxTxV: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """Mean cross-entropy over all targets, in nats per token. Targets may have any number of axes."""
    log_normalizer_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1)
    # Not by indices: their gradient would be added to an array of zeros as large as the logits.
    index_BxTxV = jax.lax.broadcasted_iota(targets_BxT.dtype, logits_BxTxV.shape, logits_BxTxV.ndim - 1)
    chosen_BxTxV = index_BxTxV == targets_BxT[..., None]
    target_logit_BxT = jnp.sum(jnp.where(chosen_BxTxV, logits_BxTxV, 0), axis=-1)
    return (log_normalizer_BxT - target_logit_BxT).mean()


def residual_scale(c: Sizes) -> float:
    """Factor of `STD` in matrices whose products are added to the residual stream.

    It keeps the stream's variance independent of depth, as in GPT-2.
    """
    return (2 * c.n_layer) ** -0.5


def columns_of_logits(c: Sizes) -> int:
    """Number of columns of the logits that the loss computes: the vocabulary, or more on GPUs."""
    aligned = -(-c.vocab_size // _ALIGNED) * _ALIGNED
    return aligned if on_gpu() and c.compute_dtype == "bfloat16" else c.vocab_size


def loss_in_chunks(unembedding: Callable, vocab_size: int, x_BxTxD: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """`next_token_loss` of `unembedding(x)`, a module's logits. With a large vocabulary, never holds all of them."""
    most_logits = _MOST_LOGITS_ON_GPU if on_gpu() else _MOST_LOGITS
    num_tokens, D = targets_BxT.size, x_BxTxD.shape[-1]
    fewest = math.ceil(num_tokens * vocab_size / most_logits)
    num_chunks = next(n for n in range(min(fewest, num_tokens), num_tokens + 1) if num_tokens % n == 0)

    def add_chunk(unembedding, total, chunk):
        x_NxD, targets_N = chunk
        return total + next_token_loss(unembedding(x_NxD).astype(jnp.float32), targets_N), None

    if num_chunks == 1:
        return add_chunk(unembedding, 0.0, (x_BxTxD, targets_BxT))[0]
    # nn.remat: the backward pass computes the logits of each chunk again, so that they needn't be kept.
    loop = nn.scan(nn.remat(add_chunk), variable_broadcast="params", split_rngs={"params": False})
    chunks = x_BxTxD.reshape(num_chunks, -1, D), targets_BxT.reshape(num_chunks, -1)
    return loop(unembedding, jnp.float32(0), chunks)[0] / num_chunks


def part_names(n_layer: int) -> tuple[str, ...]:
    """Names of the parts of a model, from input to output."""
    return ("embedding", *(f"layer {k}" for k in range(1, n_layer + 1)), "unembedding")


def part_of(path: str) -> str:
    """The part that a parameter belongs to. In its path, layers have a number: `layers/qkv/dense/kernel/0`."""
    if is_stacked(path):
        return f"layer {int(path.rpartition('/')[2]) + 1}"
    return "embedding" if path in ("embedding", "position") else "unembedding"


def is_stacked(path: str) -> bool:
    """True if the leading axis of a parameter counts layers."""
    return path.startswith("layers/")


def on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _attend(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK):
    """Attention of the last T of S positions to the positions up to their own."""
    T, S = q_BxTxHxK.shape[1], k_BxSxHxK.shape[1]
    scores_BxHxTxS = jnp.einsum("bthk,bshk->bhts", q_BxTxHxK, k_BxSxHxK).astype(jnp.float32)
    causal_TxS = jnp.tril(jnp.ones((T, S), bool), S - T)
    scores_BxHxTxS = jnp.where(causal_TxS[None, None], scores_BxHxTxS * q_BxTxHxK.shape[-1] ** -0.5, -jnp.inf)
    weights_BxHxTxS = jax.nn.softmax(scores_BxHxTxS, axis=-1).astype(v_BxSxHxK.dtype)
    return jnp.einsum("bhts,bshk->bthk", weights_BxHxTxS, v_BxSxHxK)
