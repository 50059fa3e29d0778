"""A small tied transformer written with taps: scanned layers, optional remat and bfloat16."""

import jax
import jax.numpy as jnp

from scaling_jax.noise_scale import taps

LAYERS, VOCAB, WIDTH, HEADS, POSITIONS = 2, 11, 8, 2, 6


def init(key):
    def normal(i, *shape):
        return 0.5 * jax.random.normal(jax.random.fold_in(key, i), shape)

    return {
        "embedding": normal(0, VOCAB, WIDTH),
        "position": normal(1, POSITIONS, WIDTH),
        "layers": {
            "norm_scale": 1 + normal(2, LAYERS, WIDTH),
            "norm_bias": normal(3, LAYERS, WIDTH),
            "query": normal(4, LAYERS, WIDTH, HEADS, WIDTH // HEADS),
            "out": normal(5, LAYERS, HEADS, WIDTH // HEADS, WIDTH),
            "per_head": normal(6, LAYERS, HEADS, WIDTH // HEADS, WIDTH // HEADS),
            "wide": normal(7, LAYERS, WIDTH, 64 * WIDTH),
            "narrow": normal(8, LAYERS, 64 * WIDTH, WIDTH) / 8,
        },
        "final_norm_scale": 1 + normal(9, WIDTH),
    }


def is_stacked(name):
    return name.startswith("layers/")


def make_loss(remat=False, dtype=jnp.float32):
    """`(params, tokens (B, T + 1)) -> mean loss`."""

    def block(x, layer):
        p = {name: w.astype(dtype) for name, w in layer.items()}
        h = taps.add(taps.scale(_normalise(x), p["norm_scale"]), p["norm_bias"])
        q = taps.einsum("btd,dhk->bthk", h, p["query"])
        q = taps.einsum("bthk,hkj->bthj", q, p["per_head"])
        weights = jax.nn.softmax(_widen(jnp.einsum("bthk,bshk->bhts", q, q))).astype(dtype)
        x = x + taps.einsum("bthk,hkd->btd", jnp.einsum("bhts,bshk->bthk", weights, q), p["out"])
        return x + taps.einsum("btf,fd->btd", jax.nn.gelu(taps.einsum("btd,df->btf", x, p["wide"])), p["narrow"]), None

    def loss(params, tokens):
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        x, link = taps.embed_tied(params["embedding"].astype(dtype), inputs)
        x = taps.add(x, params["position"].astype(dtype))
        x, _ = jax.lax.scan(jax.checkpoint(block) if remat else block, x, params["layers"])
        x = taps.scale(_normalise(x), params["final_norm_scale"].astype(dtype))
        logits = _widen(taps.unembed_tied(x, params["embedding"].astype(dtype), inputs, link))
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1))

    return loss


def _normalise(x):
    wide = _widen(x)
    return (wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)).astype(x.dtype)


def _widen(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def tokens(key, batch):
    return jax.random.randint(key, (batch, POSITIONS + 1), 0, VOCAB)
