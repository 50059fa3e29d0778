"""A modern family of decoder-only transformers: RMSNorm, rotary positions, SwiGLU, grouped-query attention, experts.

As in Llama 2 (Touvron et al. 2023, arXiv 2307.09288), with norms of queries and keys (Henry et al. 2020, arXiv
2010.04245) and, if asked for, experts (OLMoE: Muennighoff et al. 2024, arXiv 2409.02060). Every layer is made of
`noise_scale.taps`, so that `value_and_grad(method="per_example")` measures the models as they are.
"""

import dataclasses
import math
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from scaling_jax.io import UserError
from scaling_jax.io.config import check_positive
from scaling_jax.noise_scale import taps
from scaling_jax.noise_scale.norms import Tapped
from scaling_jax.parallel import use_whole
from scaling_jax.tasks.layers import (
    NEVER,
    STD,
    Attention,
    attention_of,
    causal_attention,
    check_sizes,
    columns_of_logits,
    loss_in_chunks,
    next_token_loss,
    residual_scale,
    stack_of,
)

_NORM_EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A transformer like Llama. `tasks.model_config("llama-4x256")` fills in the sizes.

    `mup_base_width` turns on μP for Adam (Yang et al. 2022, arXiv 2203.03466, tables 3 and 8): what is best at this
    width stays best at others. At the base width itself nothing changes. Keep the size of heads as the width grows.
    """

    n_layer: int
    d_model: int
    n_head: int
    n_kv_head: int  # heads of keys and values; each serves n_head / n_kv_head heads of queries
    d_ff: int  # width of the feed-forward layer, or of each expert
    num_experts: int = 0  # in place of each feed-forward layer; 0 for one layer that serves every token
    active_experts: int = 1  # experts that each token uses
    balance: float = 0.01  # weight of the loss that keeps experts in use; only in training
    tied: bool = False  # the embedding is also the unembedding
    qk_norm: bool = True  # RMSNorm of the queries and keys of each head
    rope_theta: float = 10_000.0
    remat: bool = False  # keep only the input of each layer; the backward pass computes the layer again
    mup_base_width: int | None = None
    vocab_size: int = 257
    context: int = 64  # tokens
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # parameters, norms, softmax and loss: always float32
    attention: Attention = "auto"  # auto: cuDNN in bfloat16 on a GPU, else XLA

    def __post_init__(self):
        check_sizes(
            self, "n_layer", "d_model", "n_head", "n_kv_head", "d_ff", "active_experts", "vocab_size", "context"
        )
        check_positive("rope_theta", self.rope_theta)
        if self.mup_base_width is not None:
            check_positive("mup_base_width", self.mup_base_width)
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_kv_head = {self.n_kv_head} must divide n_head = {self.n_head}")
        if self.head_size % 2:
            raise UserError(f"d_model / n_head = {self.head_size} must be even: rotary positions turn pairs of numbers")
        if self.num_experts < 0 or self.active_experts > max(1, self.num_experts):
            raise UserError(
                f"num_experts = {self.num_experts} must be 0 or more, and active_experts = {self.active_experts} at "
                "most as many"
            )
        if not 0 <= self.balance < math.inf:
            raise UserError(f"balance = {self.balance} must be 0 or more")

    @property
    def name(self) -> str:
        experts = f"-{self.num_experts}e{self.active_experts}" if self.num_experts else ""
        return f"llama-{self.n_layer}x{self.d_model}{experts}"

    @property
    def unit(self) -> str:
        """What batches count."""
        return "tokens"

    @property
    def head_size(self) -> int:
        return self.d_model // self.n_head

    @property
    def num_params(self) -> int:
        """N: the weights inside layers by which one token is multiplied. Of experts, only the active ones count."""
        return self._weights(self.active_experts)

    @property
    def total_params(self) -> int:
        """All numbers that training changes: with all experts, embeddings and norms."""
        norms = self.n_layer * (2 * self.d_model + 2 * self.head_size * self.qk_norm) + self.d_model
        return self._weights(self.num_experts) + (1 if self.tied else 2) * self.vocab_size * self.d_model + norms

    @property
    def flops_per_token(self) -> float:
        """FLOPs per training token, as for `ModelConfig`. All experts count, because all are computed."""
        attention = 12.0 * self.n_layer * self.context * self.d_model
        layers = 6.0 * self._weights(self.num_experts) + attention
        return layers * (4 / 3 if self.remat else 1) + 6.0 * self.vocab_size * self.d_model

    @property
    def kept_per_token(self) -> int:
        """About how many float32 numbers per token the backward pass needs."""
        experts = max(1, self.num_experts)
        heads = 2 * (self.n_head + 2 * self.n_kv_head) * self.head_size + 2 * self.n_head * self.context
        layer = 8 * self.d_model + heads + 4 * self.d_ff * experts
        layers = layer + self.n_layer * self.d_model if self.remat else self.n_layer * layer
        return layers + 3 * self.vocab_size

    @property
    def width_factor(self) -> float:
        """Width relative to μP's base; 1 without μP."""
        return 1.0 if self.mup_base_width is None else self.d_model / self.mup_base_width

    def rate_factor(self, path: str) -> float:
        """The factor of a parameter's learning rate, by its path. μP: matrices inside layers learn at rate/width."""
        inside = path.startswith("layers/") and not path.endswith("scale")
        return 1 / self.width_factor if inside else 1.0

    def _weights(self, experts: int) -> int:
        attention = self.d_model * self.head_size * (2 * self.n_head + 2 * self.n_kv_head)
        feed_forward = 3 * self.d_model * self.d_ff * (experts if self.num_experts else 1)
        return self.n_layer * (attention + feed_forward + self.d_model * self.num_experts)


class Llama(nn.Module):
    """`(tokens_BxT) -> logits_BxTxV` in float32; with `targets_BxT`, the training loss instead, as `Transformer`.

    The training loss is `next_token_loss`, plus `LlamaConfig.balance` times `unbalance` of the experts of each layer.
    """

    config: LlamaConfig

    @nn.compact
    def __call__(self, tokens_BxT: jax.Array, targets_BxT: jax.Array | None = None) -> jax.Array:
        c = self.config
        dtype = jnp.dtype(c.compute_dtype)
        init = nn.initializers.normal(STD)
        table_VxD: Any = self.param("embedding", init, (c.vocab_size, c.d_model))
        embed = taps.embed_tied if c.tied else lambda w, ids: (taps.embed(w, ids), None)
        x_BxTxD, link = use_whole(lambda w: embed(w, tokens_BxT), table_VxD)
        x_BxTxD = x_BxTxD.astype(dtype)

        block = nn.remat(_Block) if c.remat else _Block
        x_BxTxD, unbalance_LxB = stack_of(block, c)(x_BxTxD, None)

        x_BxTxD = _RMSNorm(name="norm")(x_BxTxD) / c.width_factor
        tied = (table_VxD, tokens_BxT, link) if c.tied else None
        tapped = isinstance(table_VxD, Tapped)
        columns = c.vocab_size if targets_BxT is None or tapped else columns_of_logits(c)
        unembedding = _Unembedding(c, columns, tied, name="unembedding")
        if targets_BxT is None:
            return unembedding(x_BxTxD).astype(jnp.float32)
        if tapped:  # each chunk would be one more use of the unembedding
            loss = next_token_loss(unembedding(x_BxTxD).astype(jnp.float32), targets_BxT)
        else:
            loss = loss_in_chunks(unembedding, c.vocab_size, x_BxTxD, targets_BxT)
        return loss if unbalance_LxB is None else loss + c.balance * jnp.sum(jnp.mean(unbalance_LxB, axis=1))


def rotate(x_BxTxHxK: jax.Array, positions_T: jax.Array, theta: float) -> jax.Array:
    """Rotary positions (Su et al. 2021, arXiv 2104.09864): turns the pairs (k, k + K/2) by position · theta^(-2k/K).

    The inner product of two rotated vectors depends on the difference of their positions alone.
    """
    half = x_BxTxHxK.shape[-1] // 2
    frequency = theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = (positions_T.astype(jnp.float32)[:, None] * frequency[None])[None, :, None]
    first, second = jnp.split(x_BxTxHxK.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_BxTxHxK.dtype)


def unbalance(probabilities_BxTxE: jax.Array, chosen_BxTxE: jax.Array) -> jax.Array:
    """How unevenly each sequence uses the experts [B]; 0 if evenly.

    E·Σ_e f_e·P_e − 1, with f_e the part of the choices that fall on expert e, and P_e its mean probability (Fedus et
    al. 2021, arXiv 2101.03961, eq. 4). It is of each sequence, as in DeepSeek-V3 (arXiv 2412.19437, eq. 17), not of a
    batch: so the loss stays a mean over examples, which the noise scale needs.
    """
    chosen_BxE = jnp.mean(chosen_BxTxE, axis=1) / jnp.mean(jnp.sum(chosen_BxTxE, axis=2), axis=1, keepdims=True)
    return probabilities_BxTxE.shape[-1] * jnp.sum(chosen_BxE * jnp.mean(probabilities_BxTxE, axis=1), axis=-1) - 1


class _Block(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BxTxD, _):
        c = self.config
        x_BxTxD += _Attention(c, name="attention")(_RMSNorm(name="attention_norm")(x_BxTxD))
        h_BxTxD = _RMSNorm(name="feed_forward_norm")(x_BxTxD)
        if c.num_experts:
            y_BxTxD, unbalance_B = _Experts(c, name="experts")(h_BxTxD)
        else:
            y_BxTxD, unbalance_B = _FeedForward(c, name="feed_forward")(h_BxTxD), None
        return x_BxTxD + y_BxTxD, unbalance_B


class _Attention(nn.Module):
    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BxTxD):
        c = self.config
        B, T, D = x_BxTxD.shape
        heads, size = c.n_head + 2 * c.n_kv_head, c.head_size
        qkv_BxTxF = _product("btd,df->btf", x_BxTxD, _matrix(self, "qkv", (D, heads * size)))
        qkv = qkv_BxTxF.reshape(B, T, heads, size)
        q, k, v = jnp.split(qkv, [c.n_head, c.n_head + c.n_kv_head], axis=2)
        if c.qk_norm:
            q, k = _RMSNorm(name="query_norm")(q), _RMSNorm(name="key_norm")(k)
        q, k = (rotate(x, jnp.arange(T), c.rope_theta) for x in (q, k))
        attended_BxTxD = causal_attention(q, k, v, attention_of(c))
        return _product("btd,df->btf", attended_BxTxD, _matrix(self, "out", (D, D), residual_scale(c)))


class _FeedForward(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv 2002.05202)."""

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BxTxD):
        c = self.config
        h_BxTxF2 = _product("btd,df->btf", x_BxTxD, _matrix(self, "in", (c.d_model, 2 * c.d_ff)))
        w_out = _matrix(self, "out", (c.d_ff, c.d_model), residual_scale(c))
        return _product("btf,fd->btd", _gated(h_BxTxF2), w_out)


class _Experts(nn.Module):
    """A mixture of feed-forward layers: each token takes the experts with the largest probabilities, times these.

    No token is dropped. All experts are computed for all tokens, and those that a token doesn't use get a weight of
    zero. On a CPU, that took half the time of sorting tokens for `jax.lax.ragged_dot`, with 8 experts of which 2 are
    used, at widths of 32 to 256.
    """

    config: LlamaConfig

    @nn.compact
    def __call__(self, x_BxTxD):
        c, E = self.config, self.config.num_experts
        router_DxE = _matrix(self, "router", (c.d_model, E), c.width_factor**-0.5)
        logits_BxTxE = _product("btd,de->bte", x_BxTxD.astype(jnp.float32), router_DxE)
        probabilities_BxTxE = jax.nn.softmax(logits_BxTxE)
        _, best_BxTxA = jax.lax.top_k(probabilities_BxTxE, c.active_experts)
        chosen_BxTxE = jnp.sum(jax.nn.one_hot(best_BxTxA, E), axis=2)
        weight_BxTxE = (probabilities_BxTxE * chosen_BxTxE).astype(x_BxTxD.dtype)

        h_BxTxExF2 = _product("btd,edf->btef", x_BxTxD, _matrix(self, "in", (E, c.d_model, 2 * c.d_ff)))
        h_BxTxExF = _gated(h_BxTxExF2) * weight_BxTxE[..., None]
        w_out = _matrix(self, "out", (E, c.d_ff, c.d_model), residual_scale(c))
        return _product("btef,efd->btd", h_BxTxExF, w_out), unbalance(probabilities_BxTxE, chosen_BxTxE)


class _RMSNorm(nn.Module):
    """x / √(mean x²) · scale over the last axis (Zhang and Sennrich 2019, arXiv 1910.07467), in float32."""

    @nn.compact
    def __call__(self, x):
        scale: Any = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + _NORM_EPS)
        return taps.scale(normed.astype(x.dtype), scale.astype(x.dtype))


class _Unembedding(nn.Module):
    """Logits; columns beyond the vocabulary hold `NEVER`."""

    config: LlamaConfig
    columns: int
    tied: Any = None  # the embedding, the tokens and the link of `taps.embed_tied`

    @nn.compact
    def __call__(self, x):
        c, more = self.config, self.columns - self.config.vocab_size
        if self.tied is None:
            w: Any = self.param("kernel", nn.initializers.normal(STD), (c.d_model, c.vocab_size))
        else:
            w, tokens_BxT, link = self.tied
            if link is not None:
                return taps.unembed_tied(x, w.astype(x.dtype), tokens_BxT, link)
        axes, w_axes = "btd" if x.ndim == 3 else "nd", "dv" if self.tied is None else "vd"

        def logits(w, x):
            padded = jnp.pad(w, [(0, more if axis == "v" else 0) for axis in w_axes]) if more else w
            y = taps.einsum(f"{axes},{w_axes}->{axes[:-1]}v", x, padded.astype(x.dtype))
            never_V = jnp.where(jnp.arange(self.columns) < c.vocab_size, 0, NEVER).astype(y.dtype)
            return y + never_V.reshape((1,) * (y.ndim - 1) + (-1,)) if more else y

        return use_whole(logits, w, x)


def _matrix(module: nn.Module, name: str, shape: tuple[int, ...], scale: float = 1.0) -> Any:
    """A matrix inside a layer, or a stack of them. μP: its initial values fall with the width as 1/√width."""
    std = STD * scale * module.config.width_factor**-0.5  # type: ignore[attr-defined]
    return module.param(name, nn.initializers.normal(std), shape)


def _product(spec: str, x, w):
    return use_whole(lambda w, x: taps.einsum(spec, x, w.astype(x.dtype)), w, x)


def _gated(h):
    gate, up = jnp.split(h, 2, axis=-1)
    return jax.nn.silu(gate) * up
