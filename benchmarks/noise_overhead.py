"""What does the noise scale cost a training step, estimator by estimator?

    python benchmarks/noise_overhead.py [2x64 | 4x256]

Each line is a training step (gradient and Adam, many in one compiled call) with the estimator, over the same step
without it, in interleaved rounds in one process. "every=100" lines measure at every step and count a hundredth of what
that adds, as so little is lost in the noise of whole steps: ℓ1 on an eighth of the batch, spectral on all of it. The
model is the project's transformer written with `taps`, given plain arrays wherever nothing is tapped.

On CPUs it has one thread, as a scan's workers have, and processor time is compared: others on the machine disturb it
less than wall time.
"""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"

import statistics
import sys
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax

from scaling_jax.noise_scale import every, geometries, taps, value_and_grad
from scaling_jax.tasks import model_config, next_token_loss
from scaling_jax.tasks.layers import attention_of, causal_attention

ROUNDS = 9
BATCH_TOKENS = 4_096
STEPS = 8  # a call
EVERY = 100
SIZES = {"2x64": (64, 4), "4x256": (256, 4)}  # context, microbatches


def clock() -> float:
    return time.process_time() if jax.default_backend() == "cpu" else time.perf_counter()


def init(model) -> dict:
    """Parameters as the project's transformer has them; layers unrolled."""
    draws = np.random.default_rng(0)
    D, V = model.d_model, model.vocab_size

    def normal(*shape):
        return jnp.asarray(0.02 * draws.standard_normal(shape), jnp.float32)

    def dense(d_in, d_out):
        return {"kernel": normal(d_in, d_out), "bias": jnp.zeros(d_out)}

    def norm():
        return {"scale": jnp.ones(D), "bias": jnp.zeros(D)}

    layers = [
        {
            "attention_norm": norm(),
            "qkv": dense(D, 3 * D),
            "attention_out": dense(D, D),
            "feed_forward_norm": norm(),
            "feed_forward_in": dense(D, 4 * D),
            "feed_forward_out": dense(4 * D, D),
        }
        for _ in range(model.n_layer)
    ]
    return {
        "embedding": normal(V, D),
        "position": normal(model.context, D),
        "layers": layers,
        "norm": norm(),
        "unembedding": dense(D, V),
    }


def loss_of(model, params, tokens_BxT1):
    def dense(x, p):
        return taps.add(taps.einsum("btd,df->btf", x, p["kernel"].astype(x.dtype)), p["bias"].astype(x.dtype))

    def norm(x, p):
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        wide = wide - wide.mean(-1, keepdims=True)
        wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), -1, keepdims=True) + 1e-6)
        return taps.add(taps.scale(wide, p["scale"]), p["bias"]).astype(x.dtype)

    tokens_BxT1 = tokens_BxT1.astype(jnp.int32)
    x = taps.add(taps.embed(params["embedding"], tokens_BxT1[:, :-1]), params["position"])
    if model.compute_dtype == "bfloat16":
        x = x.astype(jnp.bfloat16)
    for p in params["layers"]:
        qkv = dense(norm(x, p["attention_norm"]), p["qkv"])
        per_head = qkv.reshape(*qkv.shape[:2], 3 * model.n_head, -1)
        h = causal_attention(*jnp.split(per_head, 3, axis=2), attention_of(model))
        x = x + dense(h, p["attention_out"])
        h = jax.nn.gelu(dense(norm(x, p["feed_forward_norm"]), p["feed_forward_in"]))
        x = x + dense(h, p["feed_forward_out"])
    logits_BxTxV = dense(norm(x, params["norm"]), params["unembedding"])
    return next_token_loss(logits_BxTxV.astype(jnp.promote_types(x.dtype, jnp.float32)), tokens_BxT1[:, 1:])


def plain(loss, num_microbatches):
    """Gradient accumulation as one writes it without a noise scale."""
    grad = jax.value_and_grad(loss)

    def of_batch(params, batch, step):
        if num_microbatches == 1:
            return grad(params, batch)
        parts = batch.reshape(num_microbatches, -1, *batch.shape[1:])
        zeros = jax.tree.map(jnp.zeros_like, (jnp.float32(0), params))
        total, _ = jax.lax.scan(lambda t, b: (jax.tree.map(jnp.add, t, grad(params, b)), None), zeros, parts)
        return jax.tree.map(lambda x: x / num_microbatches, total)

    return of_batch


def measured(loss, num_microbatches=1, **options):
    grad = value_and_grad(loss, num_microbatches=num_microbatches, **options)

    def of_batch(params, batch, step):
        (value, moments), grads = grad(params, batch)
        return value + 1e-9 * sum(map(jnp.sum, jax.tree.leaves(moments))), grads

    return of_batch


def also(base, measure, part):
    def of_batch(params, batch, step):
        value, grads = base(params, batch, step)
        _, bounds = every(1, step, measure, params, batch[: len(batch) // part])
        return value + 1e-9 * sum(bounds), grads

    return of_batch


def program(of_batch, steps, rows):
    """`params -> seconds for `steps` steps`, compiled."""
    optimizer = optax.adam(1e-3, b2=0.98)

    @partial(jax.jit, donate_argnums=(0,))
    def run(state, rows_SxBxT1):
        def body(i, carry):
            params, opt_state, total = carry
            value, grads = of_batch(params, rows_SxBxT1[i % len(rows_SxBxT1)], i)
            updates, opt_state = optimizer.update(grads, opt_state)
            return optax.apply_updates(params, updates), opt_state, total + value

        return jax.lax.fori_loop(0, steps, body, state)

    def seconds(params):
        state = jax.tree.map(jnp.copy, (params, optimizer.init(params), jnp.float32(0)))
        jax.block_until_ready(state)
        start = clock()
        jax.block_until_ready(run(state, rows))
        return clock() - start

    return seconds


def main(size: str) -> None:
    context, parts = SIZES[size]
    model = model_config(size, vocab_size=256, context=context)
    params, loss = init(model), partial(loss_of, model)
    draws = np.random.default_rng(0)
    rows = jnp.asarray(draws.integers(0, 256, (4, BATCH_TOKENS // context, context + 1)), jnp.uint16)
    l1 = geometries.l1(loss, num_microbatches=2)
    spectral = geometries.spectral(loss, num_microbatches=parts, select=lambda name: name.startswith("layers"))
    split, whole = plain(loss, parts), plain(loss, 1)
    lines = {  # what: with, without, one step in how many measures
        "two-batch, microbatches anyway": (measured(loss, parts), split, 1),
        "two-batch, two microbatches for it": (measured(loss, 2), whole, 1),
        "two-batch in groups": (measured(loss, parts, groups=lambda name: name.split("/")[0]), split, 1),
        "norm layers": (measured(loss, method="norm_layers"), whole, 1),
        "per example": (measured(loss, method="per_example"), whole, 1),
        "per example, in microbatches": (measured(loss, parts, method="per_example"), split, 1),
        f"ℓ1 every={EVERY}": (also(split, l1, 8), split, EVERY),
        f"spectral every={EVERY}": (also(split, spectral, 1), split, EVERY),
    }
    print(f"{size}, {BATCH_TOKENS:,} tokens of context {context}; {jax.devices()}; medians of {ROUNDS} rounds")
    for what, (with_it, without, one_in) in lines.items():
        a, b = program(with_it, STEPS, rows), program(without, STEPS, rows)
        a(params), b(params)  # compile
        pairs = [(a(params), b(params)) for _ in range(ROUNDS)]
        ratios = [1 + (x / y - 1) / one_in for x, y in pairs]
        base = BATCH_TOKENS * STEPS / statistics.median(y for _, y in pairs)
        print(
            f"{what:36} {statistics.median(ratios):7.4f} [{min(ratios):.4f}, {max(ratios):.4f}]  "
            f"baseline {base / 1e3:.1f}k tokens/s",
            flush=True,
        )


if __name__ == "__main__":
    main(*(sys.argv[1:] or ["2x64"]))
