import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_jax.io import UserError
from scaling_jax.tasks import MODELS, ModelConfig, Transformer, layers, model_config, next_token_loss

SMALL = ModelConfig(n_layer=2, d_model=16, n_head=2, context=8, vocab_size=11)


def initialised(config):
    tokens = jax.random.randint(jax.random.key(1), (3, config.context), 0, config.vocab_size)
    # A function of its own each time: what tests change in the module must be traced anew.
    params = jax.jit(lambda key, tokens: Transformer(config).init(key, tokens)["params"])(jax.random.key(0), tokens)
    return params, tokens


def logits_of(config, params, tokens):
    return jax.jit(lambda params, tokens: Transformer(config).apply({"params": params}, tokens))(params, tokens)


def causal_attention(qkv_BxTx3D, *implementation):
    """Of two heads."""
    qkv = qkv_BxTx3D.reshape(*qkv_BxTx3D.shape[:2], 6, -1)
    return layers.causal_attention(*jnp.split(qkv, 3, axis=2), *implementation)


def test_a_position_sees_itself_and_the_past_only():
    params, tokens = initialised(SMALL)
    changed = tokens.at[:, 5].add(1) % SMALL.vocab_size
    before, after = (logits_of(SMALL, params, t) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before[:, 5:] - after[:, 5:]).max(axis=-1) > 0).all()


@pytest.mark.parametrize("context", [7, 64, 130, 256])
def test_attention_in_parts_is_attention(context):
    """Against JAX's own, for contexts of one part, of four, and of parts that don't divide them."""
    qkv = jax.random.normal(jax.random.key(0), (2, context, 3 * 16))
    cotangent = jax.random.normal(jax.random.key(1), (2, context, 16))

    def reference(qkv):
        q, k, v = (x.reshape(2, context, 2, 8) for x in jnp.split(qkv, 3, axis=-1))
        return jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(2, context, 16)

    def value_and_pullback(attention):
        value, pullback = jax.vjp(attention, qkv)
        return value, pullback(cotangent)[0]

    got, got_pulled_back = jax.jit(lambda: value_and_pullback(causal_attention))()
    want, want_pulled_back = jax.jit(lambda: value_and_pullback(reference))()
    np.testing.assert_allclose(got, want, atol=2e-6)
    np.testing.assert_allclose(got_pulled_back, want_pulled_back, atol=1e-5)


def test_cudnn_attention_gets_the_same_queries_keys_and_values(monkeypatch):
    """There is no GPU here: JAX's own implementation stands in for cuDNN's behind the same call."""
    qkv = jax.random.normal(jax.random.key(0), (2, 6, 3 * 16))
    attention = jax.nn.dot_product_attention
    asked = []

    def stand_in(*args, implementation, **kwargs):
        asked.append(implementation)
        return attention(*args, **kwargs, implementation="xla")

    monkeypatch.setattr(jax.nn, "dot_product_attention", stand_in)
    np.testing.assert_allclose(causal_attention(qkv, "cudnn"), causal_attention(qkv), atol=2e-6)
    assert asked == ["cudnn"]


def test_cudnn_attention_in_float32_is_refused():
    with pytest.raises(UserError, match="bfloat16"):
        ModelConfig(2, 16, 2, attention="cudnn")


@pytest.mark.parametrize(
    ("flags", "attention"),
    [
        ("", "cudnn"),
        ("--xla_gpu_autotune_level=0 --xla_gpu_deterministic_ops=false", "cudnn"),
        ("--xla_gpu_deterministic_ops=true --xla_gpu_autotune_level=0", "xla"),
        ("--xla_gpu_deterministic_ops", "xla"),
    ],
)
def test_on_a_gpu_attention_is_cudnns_unless_xla_is_to_be_deterministic(monkeypatch, flags, attention):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setenv("XLA_FLAGS", flags)
    half = dataclasses.replace(SMALL, compute_dtype="bfloat16")
    assert layers.attention_of(half) == attention
    assert layers.attention_of(SMALL) == "xla"
    assert layers.attention_of(dataclasses.replace(half, attention="cudnn")) == "cudnn"


def test_gpus_compute_what_cpus_do_in_bfloat16(monkeypatch):
    """What differs there (layers, logits, variance) changes loss and gradient by less than bfloat16's rounding."""
    half = dataclasses.replace(SMALL, compute_dtype="bfloat16", attention="xla")
    params, tokens = initialised(half)

    def value_and_grad():
        loss = jax.value_and_grad(lambda params: Transformer(half).apply({"params": params}, tokens, tokens))
        return jax.jit(loss)(params)

    loss, grads = value_and_grad()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    loss_on_gpu, grads_on_gpu = value_and_grad()
    assert abs(loss_on_gpu - loss) < 1e-3
    norm, difference = (
        np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(tree)))
        for tree in (grads, jax.tree.map(jnp.subtract, grads_on_gpu, grads))
    )
    assert difference < 0.01 * norm


@pytest.mark.parametrize("most_logits", [24 * 11, 100, 1])
def test_the_loss_in_chunks_is_the_loss(monkeypatch, most_logits):
    """24 tokens, a vocabulary of 11: in one chunk, in three, and token by token."""
    params, tokens = initialised(SMALL)

    def whole(params):
        return next_token_loss(Transformer(SMALL).apply({"params": params}, tokens), tokens)

    def chunked(params):
        return Transformer(SMALL).apply({"params": params}, tokens, tokens)

    monkeypatch.setattr(layers, "_MOST_LOGITS", most_logits)
    loss, grads = jax.jit(jax.value_and_grad(chunked))(params)
    want_loss, want_grads = jax.jit(jax.value_and_grad(whole))(params)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), grads, want_grads)
    assert ("f32[3,8,11]" in str(jax.make_jaxpr(chunked)(params))) == (most_logits == 24 * 11)


def test_loss_of_an_untrained_model_is_that_of_a_uniform_guess():
    params, tokens = initialised(SMALL)
    loss = next_token_loss(logits_of(SMALL, params, tokens), tokens)
    assert abs(loss - math.log(SMALL.vocab_size)) < 0.05


def test_loss_is_the_mean_negative_log_probability():
    logits = jax.random.normal(jax.random.key(0), (2, 3, 5))
    targets = jnp.array([[0, 1, 2], [4, 3, 0]])
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    expected = -np.mean([log_probs[b, t, targets[b, t]] for b in range(2) for t in range(3)])
    assert abs(next_token_loss(logits, targets) - expected) < 1e-6


@pytest.mark.parametrize(("name", "num_params"), [("4x256", 3_145_728), ("12x768", 84_934_656), ("2x64", 98_304)])
def test_sizes_count_their_non_embedding_parameters_as_kaplan_does(name, num_params):
    assert MODELS[name].num_params == num_params


def test_n_is_the_matrices_of_the_layers():
    params, _ = initialised(SMALL)
    matrices = [x for x in jax.tree.leaves(params["layers"]) if x.ndim == 3]
    assert sum(x.size for x in matrices) == SMALL.num_params


def test_unrolling_the_layers_changes_neither_parameters_nor_results(monkeypatch):
    params, tokens = initialised(SMALL)
    assert params["layers"]["qkv"]["dense"]["kernel"].shape == (2, 16, 48)
    unrolled = logits_of(SMALL, params, tokens)
    monkeypatch.setattr(layers, "_MOST_UNROLLED", 0)
    looped_params, _ = initialised(SMALL)
    jax.tree.map(np.testing.assert_array_equal, looped_params, params)
    np.testing.assert_allclose(logits_of(SMALL, params, tokens), unrolled, atol=1e-6)


def test_bfloat16_computes_close_to_float32_with_float32_parameters_and_logits():
    params, tokens = initialised(SMALL)
    half = dataclasses.replace(SMALL, compute_dtype="bfloat16")
    logits = logits_of(half, params, tokens)
    assert logits.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(initialised(half)[0])} == {jnp.dtype("float32")}
    np.testing.assert_allclose(logits, logits_of(SMALL, params, tokens), atol=0.02)


def test_an_unknown_size_is_answered_with_the_table():
    with pytest.raises(UserError, match=r"'3x64'.*2x64, 4x128"):
        model_config("3x64")
