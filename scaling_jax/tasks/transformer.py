"""Decoder-only transformers in sizes from 1x16, for laptops, to 12x768 (layers × width), the 85M of Kaplan et al.

They have learned positions, pre-LayerNorm, GELU, and feed-forward layers four times as wide as the model.
"""

import dataclasses
import math
import os
import re
from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling_jax.io import UserError
from scaling_jax.io.config import check_at_most
from scaling_jax.parallel import use_whole

_INIT = nn.initializers.normal(0.02)
_LARGEST_SIZE = 2**31 - 1  # of an axis: ids and positions are int32
_MOST_UNROLLED = 4  # layers
_MOST_UNROLLED_ON_GPU = 12
_MOST_LOGITS = 2**25  # at a time, 128 MiB; with more, the loss is computed in chunks
_MOST_LOGITS_ON_GPU = 2**31  # 4 GiB in bfloat16, and as much for their gradients
_ALIGNED = 128  # columns; to products of other widths cuBLAS is given padded copies of all logits
_NEVER = -1e30  # a logit whose probability is exactly zero


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer as in Kaplan et al. 2020 (arXiv 2001.08361, §2.1 and table 1)."""

    n_layer: int
    d_model: int
    n_head: int
    vocab_size: int = 257
    context: int = 64  # tokens
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # parameters, softmax and loss are always float32
    attention: Literal["auto", "xla", "cudnn"] = "auto"  # auto: cuDNN in bfloat16 on a GPU, else XLA

    def __post_init__(self):
        for field in ("n_layer", "d_model", "n_head", "vocab_size", "context"):
            if getattr(self, field) < 1:
                raise UserError(f"{field} = {getattr(self, field)} must be positive")
            check_at_most(field, getattr(self, field), _LARGEST_SIZE)
        if self.d_model % self.n_head:
            raise UserError(f"d_model = {self.d_model} must be a multiple of n_head = {self.n_head}")
        if self.attention == "cudnn" and self.compute_dtype != "bfloat16":
            raise UserError(
                'attention="cudnn" works in bfloat16 only: set compute_dtype="bfloat16", or attention="auto"'
            )

    @property
    def name(self) -> str:
        return f"{self.n_layer}x{self.d_model}"

    @property
    def unit(self) -> str:
        """What batches count."""
        return "tokens"

    @property
    def num_params(self) -> int:
        """N, the non-embedding parameters: 12·n_layer·d_model² (Kaplan et al. 2020, eq. 2.1)."""
        return 12 * self.n_layer * self.d_model**2


Model = ModelConfig  # the built-in models


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
MODELS = {config.name: config for config in (ModelConfig(*size) for size in _SIZES)}


def model_config(name: str, **changes) -> ModelConfig:
    """The model with a name of `MODELS`, with changes such as `context` or `vocab_size`.

    Raises:
      UserError: if there is no such name.
    """
    if name not in MODELS:
        raise UserError(f"unknown model size {name!r}: choose from {', '.join(MODELS)}")
    return dataclasses.replace(MODELS[name], **changes)


class Transformer(nn.Module):
    """`(tokens_BxT) -> logits_BxTxV` in float32. The parameters of all layers are stacked on a leading axis.

    With `targets_BxT`, returns their `next_token_loss` instead. With a large vocabulary, it then computes the logits in
    chunks, and never holds all of them.

    The layers run in a scan. Unrolled layers run up to 1.5 times faster, but many layers take long to compile. So up to
    4 layers are unrolled, on GPUs 12; this changes neither parameters nor results.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array, targets_BxT: jax.Array | None = None) -> jax.Array:
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        embedding_VxD = self.param("embedding", _INIT, (c.vocab_size, c.d_model))
        position_TxD = self.param("position", _INIT, (c.context, c.d_model))
        embedded_BxTxD = use_whole(lambda table_VxD: table_VxD[tokens_BxT], embedding_VxD)
        positions_TxD = use_whole(lambda table_TxD: table_TxD[: tokens_BxT.shape[1]], position_TxD)
        x_BxTxD = (embedded_BxTxD + positions_TxD[None]).astype(dtype)

        on_gpu = _on_gpu()
        most_unrolled = _MOST_UNROLLED_ON_GPU if on_gpu else _MOST_UNROLLED
        layers = nn.scan(
            Block,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=c.n_layer,
            unroll=c.n_layer if c.n_layer <= most_unrolled else 1,
        )(c, name="layers")
        x_BxTxD, _ = layers(x_BxTxD, None)

        x_BxTxD = _LayerNorm(dtype, name="norm")(x_BxTxD)
        aligned = -(-c.vocab_size // _ALIGNED) * _ALIGNED
        columns = aligned if on_gpu and dtype == jnp.bfloat16 and targets_BxT is not None else c.vocab_size
        unembedding = _Dense(c.vocab_size, dtype, columns=columns, name="unembedding")
        if targets_BxT is None:
            return unembedding(x_BxTxD).astype(jnp.float32)
        return _loss_in_chunks(unembedding, x_BxTxD, targets_BxT, _MOST_LOGITS_ON_GPU if on_gpu else _MOST_LOGITS)


def causal_attention(qkv_BxTx3D: jax.Array, n_head: int, implementation: Literal["xla", "cudnn"] = "xla") -> jax.Array:
    """Causal self-attention [B, T, D], with softmax in float32.

    "xla" splits the queries into up to four parts, and leaves out the keys after each part: 10/16 of the work. "cudnn"
    needs a GPU and bfloat16.
    """
    B, T, D3 = qkv_BxTx3D.shape
    q, k, v = jnp.split(qkv_BxTx3D.reshape(B, T, 3 * n_head, D3 // 3 // n_head), 3, axis=2)  # [B, T, H, K]
    if implementation == "cudnn":
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn").reshape(B, T, -1)
    size = max(64, math.ceil(T / 4))
    parts = [
        _attend(q[:, start : start + size], k[:, : start + size], v[:, : start + size]) for start in range(0, T, size)
    ]
    return jnp.concatenate(parts, axis=1).reshape(B, T, -1)


def next_token_loss(logits_BxTxV: jax.Array, targets_BxT: jax.Array) -> jax.Array:
    """Mean cross-entropy over all targets, in nats per token. Targets may have any number of axes."""
    log_normalizer_BxT = jax.nn.logsumexp(logits_BxTxV, axis=-1)
    # Not by indices: their gradient would be added to an array of zeros as large as the logits.
    index_BxTxV = jax.lax.broadcasted_iota(targets_BxT.dtype, logits_BxTxV.shape, logits_BxTxV.ndim - 1)
    chosen_BxTxV = index_BxTxV == targets_BxT[..., None]
    target_logit_BxT = jnp.sum(jnp.where(chosen_BxTxV, logits_BxTxV, 0), axis=-1)
    return (log_normalizer_BxT - target_logit_BxT).mean()


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


class Block(nn.Module):
    config: ModelConfig

    @nn.compact
    def __call__(self, x_BxTxD, _):
        c = self.config
        dtype = x_BxTxD.dtype
        residual_scale = (2 * c.n_layer) ** -0.5  # GPT-2: keeps the residual stream's variance independent of depth

        h_BxTxD = _LayerNorm(dtype, name="attention_norm")(x_BxTxD)
        qkv_BxTx3D = _Dense(3 * c.d_model, dtype, name="qkv")(h_BxTxD)
        h_BxTxD = causal_attention(qkv_BxTx3D, c.n_head, attention_of(c))
        x_BxTxD += _Dense(c.d_model, dtype, scale=residual_scale, name="attention_out")(h_BxTxD)

        h_BxTxD = _LayerNorm(dtype, name="feed_forward_norm")(x_BxTxD)
        h_BxTxF = jax.nn.gelu(_Dense(4 * c.d_model, dtype, name="feed_forward_in")(h_BxTxD))
        x_BxTxD += _Dense(c.d_model, dtype, scale=residual_scale, name="feed_forward_out")(h_BxTxF)
        return x_BxTxD, None


class _Dense(nn.Module):
    features: int
    dtype: jnp.dtype
    scale: float = 1.0
    columns: int | None = None  # of the output, if more than the features; those beyond hold `_NEVER`

    @nn.compact
    def __call__(self, x_BxTxD):
        # With batch and positions as one axis, XLA's CPU backend computes the weight gradient as one matrix product,
        # 3.7 times faster than with two axes.
        x_NxD = x_BxTxD.reshape(-1, x_BxTxD.shape[-1])
        init = nn.initializers.normal(0.02 * self.scale)
        more = (self.columns or self.features) - self.features
        if more:
            y_NxF = _Padded(self.features, self.dtype, more, init, name="dense")(x_NxD)
        else:
            y_NxF = nn.Dense(self.features, dtype=self.dtype, kernel_init=init, dot_general=_dot, name="dense")(x_NxD)
        return y_NxF.reshape(*x_BxTxD.shape[:-1], y_NxF.shape[-1])


class _Padded(nn.Module):
    """`nn.Dense` with the same parameters, and `more` columns of `_NEVER` in its output."""

    features: int
    dtype: jnp.dtype
    more: int
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_NxD):
        kernel_DxF = self.param("kernel", self.kernel_init, (x_NxD.shape[-1], self.features))
        bias_F = self.param("bias", nn.initializers.zeros, (self.features,))
        wide_DxF = jnp.pad(kernel_DxF.astype(self.dtype), ((0, 0), (0, self.more)))
        wide_F = jnp.pad(bias_F.astype(self.dtype), (0, self.more), constant_values=_NEVER)
        return _dot(x_NxD.astype(self.dtype), wide_DxF, (((1,), (0,)), ((), ()))) + wide_F[None]


def _dot(x_NxD, w_DxF, *args, **options):
    return use_whole(lambda w_DxF, x_NxD: jax.lax.dot_general(x_NxD, w_DxF, *args, **options), w_DxF, x_NxD)


class _LayerNorm(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_BxTxD):
        # E[x²] - E[x]² reads x once: on an H100, 2.5 % of a step of 85M parameters. Its error is far below bfloat16's.
        fast = self.dtype == jnp.bfloat16 and _on_gpu()
        return nn.LayerNorm(dtype=self.dtype, use_fast_variance=fast, name="layer_norm")(x_BxTxD)


def _on_gpu() -> bool:
    return jax.default_backend() == "gpu"


def _attend(q_BxTxHxK, k_BxSxHxK, v_BxSxHxK):
    """Attention of the last T of S positions to the positions up to their own."""
    T, S = q_BxTxHxK.shape[1], k_BxSxHxK.shape[1]
    scores_BxHxTxS = jnp.einsum("bthk,bshk->bhts", q_BxTxHxK, k_BxSxHxK).astype(jnp.float32)
    causal_TxS = jnp.tril(jnp.ones((T, S), bool), S - T)
    scores_BxHxTxS = jnp.where(causal_TxS[None, None], scores_BxHxTxS * q_BxTxHxK.shape[-1] ** -0.5, -jnp.inf)
    weights_BxHxTxS = jax.nn.softmax(scores_BxHxTxS, axis=-1).astype(v_BxSxHxK.dtype)
    return jnp.einsum("bhts,bshk->bthk", weights_BxHxTxS, v_BxSxHxK)


def attention_of(c: ModelConfig) -> Literal["xla", "cudnn"]:
    if c.attention != "auto":
        return c.attention
    # Its backward pass adds up in any order, and XLA fails if told not to (openxla/xla #46500, jax 0.11.2).
    deterministic = re.search(r"--xla_gpu_deterministic_ops(=true|=1)?(\s|$)", os.environ.get("XLA_FLAGS", ""))
    return "cudnn" if _on_gpu() and c.compute_dtype == "bfloat16" and not deterministic else "xla"


def _loss_in_chunks(unembedding, x_BxTxD, targets_BxT, most_logits: int):
    num_tokens, D = targets_BxT.size, x_BxTxD.shape[-1]
    fewest = math.ceil(num_tokens * unembedding.features / most_logits)
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
