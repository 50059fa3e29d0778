import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_jax.errors import UserError
from scaling_jax.models import MODELS, ModelConfig, Transformer, model_config, next_token_loss, transformer

SMALL = ModelConfig(n_layer=2, d_model=16, n_head=2, context=8, vocab_size=11)


def initialised(config):
    tokens = jax.random.randint(jax.random.key(1), (3, config.context), 0, config.vocab_size)
    params = Transformer(config).init(jax.random.key(0), tokens)["params"]
    return params, tokens


def test_a_position_sees_itself_and_the_past_only():
    params, tokens = initialised(SMALL)
    changed = tokens.at[:, 5].add(1) % SMALL.vocab_size
    before, after = (Transformer(SMALL).apply({"params": params}, t) for t in (tokens, changed))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before[:, 5:] - after[:, 5:]).max(axis=-1) > 0).all()


def test_loss_of_an_untrained_model_is_that_of_a_uniform_guess():
    params, tokens = initialised(SMALL)
    loss = next_token_loss(Transformer(SMALL).apply({"params": params}, tokens), tokens)
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
    unrolled = Transformer(SMALL).apply({"params": params}, tokens)
    monkeypatch.setattr(transformer, "_MOST_UNROLLED", 0)
    looped_params, _ = initialised(SMALL)
    jax.tree.map(np.testing.assert_array_equal, looped_params, params)
    np.testing.assert_allclose(Transformer(SMALL).apply({"params": params}, tokens), unrolled, atol=1e-6)


def test_bfloat16_computes_close_to_float32_with_float32_parameters_and_logits():
    params, tokens = initialised(SMALL)
    half = Transformer(dataclasses.replace(SMALL, compute_dtype="bfloat16"))
    logits = half.apply({"params": params}, tokens)
    assert logits.dtype == jnp.float32
    assert {x.dtype for x in jax.tree.leaves(half.init(jax.random.key(0), tokens))} == {jnp.dtype("float32")}
    np.testing.assert_allclose(logits, Transformer(SMALL).apply({"params": params}, tokens), atol=0.02)


def test_an_unknown_size_is_answered_with_the_table():
    with pytest.raises(UserError, match=r"'3x64'.*2x64, 4x128"):
        model_config("3x64")
