"""The llama family: its parts against closed forms and against each other, its counts, and its taps."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from scaling_jax.io import UserError
from scaling_jax.noise_scale import sq_norm, value_and_grad
from scaling_jax.noise_scale.norms import leaf_sq_norms, with_example_norms
from scaling_jax.tasks import (
    LlamaConfig,
    batch_loss,
    evaluator,
    is_stacked,
    layers,
    model_config,
    network,
    next_token_loss,
    part_names,
    part_of,
    rate_factor,
)
from scaling_jax.tasks.llama import rotate, unbalance
from scaling_jax.training.optimizers import OptimizerConfig, make_optimizer

SMALL = LlamaConfig(n_layer=2, d_model=16, n_head=4, n_kv_head=2, d_ff=24, rope_theta=100.0, vocab_size=11, context=8)
EXPERTS = dataclasses.replace(SMALL, num_experts=4, active_experts=2, d_ff=12)
KINDS = {
    "dense": SMALL,
    "tied": dataclasses.replace(SMALL, tied=True, qk_norm=False, n_kv_head=4),
    "experts": EXPERTS,
    "all": dataclasses.replace(EXPERTS, tied=True, remat=True, mup_base_width=8),
}
all_kinds = pytest.mark.parametrize("model", KINDS.values(), ids=KINDS)
two_kinds = pytest.mark.parametrize(
    "model", [pytest.param(KINDS[k], id=k, marks=() if k in ("dense", "all") else pytest.mark.slow) for k in KINDS]
)


@pytest.fixture(autouse=True)
def layers_in_a_loop(monkeypatch):
    """They compile faster."""
    monkeypatch.setattr(layers, "_MOST_UNROLLED", 0)


def initialised(model, scale=5.0):
    """Parameters larger than at the start, so that every part of the model matters."""
    tokens = jax.random.randint(jax.random.key(1), (3, model.context + 1), 0, model.vocab_size)
    params = jax.jit(lambda key: network(model).init(key, tokens[:, :-1])["params"])(jax.random.key(0))
    return jax.tree.map(lambda x: x if x.ndim < 2 else scale * x, params), tokens


def logits_of(model, params, tokens):
    return jax.jit(lambda params, tokens: network(model).apply({"params": params}, tokens))(params, tokens)


@two_kinds
def test_a_position_sees_itself_and_the_past_only(model):
    params, tokens = initialised(model)
    before, after = (logits_of(model, params, t) for t in (tokens, tokens.at[:, 5].add(1) % model.vocab_size))
    np.testing.assert_array_equal(before[:, :5], after[:, :5])
    assert (np.abs(before[:, 5:] - after[:, 5:]).max(axis=-1) > 0).all()


def test_rotated_products_depend_on_the_distance_of_positions_alone():
    q, k = (jnp.tile(jax.random.normal(jax.random.key(i), (1, 1, 1, 8)), (1, 6, 1, 1)) for i in (0, 1))
    near, far = (
        jnp.einsum("bthk,bshk->ts", rotate(q, at, 100.0), rotate(k, at, 100.0))
        for at in (jnp.arange(6), jnp.arange(6) + 1_000)
    )
    np.testing.assert_allclose(near, far, atol=1e-3)
    for distance in range(6):
        np.testing.assert_allclose(np.diagonal(near, distance), near[0, distance], atol=1e-5)
    assert np.ptp(near[0]) > 0.1
    np.testing.assert_allclose(near[0, 0], jnp.vdot(q[0, 0], k[0, 0]), rtol=1e-5)


def test_positions_turn_pairs_by_known_angles():
    turned = rotate(jnp.ones((1, 3, 1, 4)), jnp.arange(3), 100.0)[0, 2, 0]
    angles = 2 * np.array([1.0, 0.1])
    want = [*(np.cos(angles) - np.sin(angles)), *(np.cos(angles) + np.sin(angles))]
    np.testing.assert_allclose(turned, want, rtol=1e-5)


def test_grouped_queries_are_attention_with_repeated_keys_and_values():
    model = dataclasses.replace(SMALL, qk_norm=False)
    params, tokens = initialised(model)
    q, k, v = np.split(np.asarray(params["layers"]["attention"]["qkv"]).reshape(2, 16, 8, 4), [4, 6], axis=2)
    whole = np.concatenate([q, np.repeat(k, 2, axis=2), np.repeat(v, 2, axis=2)], axis=2).reshape(2, 16, 48)
    repeated = params | {"layers": params["layers"] | {"attention": params["layers"]["attention"] | {"qkv": whole}}}
    want = logits_of(dataclasses.replace(model, n_kv_head=4), repeated, tokens)
    np.testing.assert_allclose(logits_of(model, params, tokens), want, atol=1e-5)


def test_one_expert_is_the_dense_layer():
    params, tokens = initialised(SMALL)
    dense = params["layers"]["feed_forward"]
    expert = {name: x[:, None] for name, x in dense.items()} | {"router": jnp.ones((2, 16, 1))}
    others = {name: x for name, x in params["layers"].items() if name != "feed_forward"}
    one = dataclasses.replace(SMALL, num_experts=1)
    got = logits_of(one, params | {"layers": others | {"experts": expert}}, tokens)
    np.testing.assert_allclose(got, logits_of(SMALL, params, tokens), atol=1e-5)


def test_each_token_uses_its_best_experts_weighted_by_their_probabilities():
    """Token by token in numpy."""
    model = dataclasses.replace(EXPERTS, n_layer=1)
    params, tokens = initialised(model, scale=20.0)
    _, seen = jax.jit(
        lambda: network(model).apply({"params": params}, tokens, capture_intermediates=True, mutable=["intermediates"])
    )()
    inside = seen["intermediates"]["layers"]
    (x,), ((got, _),) = inside["feed_forward_norm"]["__call__"], inside["experts"]["__call__"]
    w = {name: np.asarray(value[0], np.float64) for name, value in params["layers"]["experts"].items()}
    for x_D, got_D in zip(
        np.asarray(x[0], np.float64).reshape(-1, 16), np.asarray(got[0]).reshape(-1, 16), strict=True
    ):
        probabilities = np.exp(x_D @ w["router"])
        probabilities /= probabilities.sum()
        want = np.zeros(16)
        for e in np.argsort(-probabilities)[:2]:
            gate, up = np.split(x_D @ w["in"][e], 2)
            want += probabilities[e] * (gate / (1 + np.exp(-gate)) * up) @ w["out"][e]
        np.testing.assert_allclose(got_D, want, atol=1e-5 * np.abs(want).max())


def test_the_router_learns_from_the_text_and_from_the_balance():
    """Also if a token uses one expert, where probabilities among the chosen ones would be 1."""
    params, tokens = initialised(EXPERTS)
    norms = []
    for balance in (0.0, 1.0):
        model = dataclasses.replace(EXPERTS, active_experts=1, balance=balance)
        grads = jax.jit(jax.grad(batch_loss(model)))(params, tokens)
        norms.append(float(sq_norm(grads["layers"]["experts"]["router"])))
    assert norms[0] > 1e-6
    assert norms[1] != pytest.approx(norms[0], rel=0.01)


def test_balance_is_0_if_experts_are_used_evenly_and_most_if_one_is_used():
    even, one = jnp.full((2, 8, 4), 0.25), jnp.tile(jnp.eye(4)[0], (2, 8, 1))
    in_turns = jnp.tile(jnp.eye(4), (2, 2, 1))
    np.testing.assert_allclose(unbalance(even, in_turns), 0, atol=1e-6)
    np.testing.assert_allclose(unbalance(one, one), 3, atol=1e-6)
    np.testing.assert_allclose(unbalance(even, 1.0 * jnp.tile(jnp.arange(4) < 2, (2, 8, 1))), 0, atol=1e-6)


def test_the_test_loss_is_of_the_next_token_alone():
    params, tokens = initialised(EXPERTS)
    plain = next_token_loss(logits_of(EXPERTS, params, tokens[:, :-1]), tokens[:, 1:])
    np.testing.assert_allclose(evaluator(EXPERTS)(params, np.asarray(tokens)), plain, rtol=1e-5)
    assert float(jax.jit(batch_loss(EXPERTS))(params, tokens)) > plain + 1e-4


@all_kinds
def test_counts_are_those_of_the_parameters(model):
    params = jax.eval_shape(lambda: initialised(model)[0])
    assert model.total_params == sum(x.size for x in jax.tree.leaves(params))
    matrices = [x for x in jax.tree.leaves(params["layers"]) if x.ndim == 3]
    experts = [x for x in jax.tree.leaves(params["layers"]) if x.ndim == 4]
    of_experts = sum(x.size for x in experts) * model.active_experts // max(1, model.num_experts)
    assert model.num_params == sum(x.size for x in matrices) + of_experts


@pytest.mark.long
@all_kinds
def test_the_formula_of_flops_is_near_what_xla_counts(model):
    params, tokens = jax.eval_shape(lambda: initialised(model))
    model = dataclasses.replace(model, n_layer=1)
    params = params | {
        "layers": jax.tree.map(lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), params["layers"])
    }
    wide = dataclasses.replace(model, context=64)
    tokens = jax.ShapeDtypeStruct((1, 65), jnp.int32)
    counted = jax.jit(jax.grad(batch_loss(wide))).lower(params, tokens).compile().cost_analysis()["flops"]
    assert wide.flops_per_token * 64 == pytest.approx(counted, rel=0.45)  # activations weigh in so small a model


def tapped_and_exact(model, params, tokens):
    loss = batch_loss(model)

    def grads(example):
        return jax.grad(loss)(params, example[None])

    _, tapped_grads, tapped = with_example_norms(
        lambda params, batch: (loss(params, batch), ()), params, tokens, lambda name: True, is_stacked
    )
    each = jax.vmap(grads)(tokens)
    norms = jax.vmap(lambda grads: leaf_sq_norms(grads, is_stacked))(each)
    exact, mean = jax.tree.map(lambda x: x.mean(0), (norms, each))
    return (tapped, exact), (tapped_grads, mean)


@two_kinds
def test_taps_cover_every_parameter(model):
    """Norms of every example's gradient, by parameter and layer, against `jax.vmap(jax.grad)`."""
    params, tokens = initialised(model)
    (got, want), (grads, mean) = jax.jit(lambda p, t: tapped_and_exact(model, p, t))(params, tokens)
    assert got.keys() == want.keys()
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
    assert sq_norm(jax.tree.map(jnp.subtract, grads, mean)) < 1e-10 * sq_norm(mean)


@pytest.mark.long
def test_value_and_grad_measures_single_examples_of_the_model_as_it_is():
    params, tokens = initialised(EXPERTS)
    (_, want), _ = jax.jit(lambda p, t: tapped_and_exact(EXPERTS, p, t))(params, tokens)
    fn = value_and_grad(batch_loss(EXPERTS), method="per_example", stacked=is_stacked)
    (_, moments), _ = jax.jit(fn)(params, tokens)
    np.testing.assert_allclose(moments.small_sq_norm, sum(x.sum() for x in want.values()), rtol=1e-5)


@pytest.mark.slow
def test_parts_and_remat_change_nothing():
    model = dataclasses.replace(EXPERTS, remat=True)
    params, tokens = initialised(EXPERTS)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(params)]
    assert {part_of(f"{name}/1" if is_stacked(name) else name) for name in names} | {"layer 1"} == set(part_names(2))
    got, want = (jax.jit(jax.value_and_grad(batch_loss(m)))(params, tokens) for m in (model, EXPERTS))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), got, want)


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True])
def test_the_loss_in_chunks_and_with_more_columns_is_the_loss(monkeypatch, tied):
    model = dataclasses.replace(SMALL, tied=tied)
    params, tokens = initialised(model)

    def value_and_grads():
        return jax.jit(jax.value_and_grad(batch_loss(model)))(params, tokens)

    want = value_and_grads()
    monkeypatch.setattr(layers, "_MOST_LOGITS", 100)
    monkeypatch.setattr("scaling_jax.tasks.llama.columns_of_logits", lambda c: 16)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), value_and_grads(), want)


@pytest.mark.slow
def test_bfloat16_computes_close_to_float32_with_float32_parameters_and_logits():
    params, tokens = initialised(EXPERTS, scale=1.0)
    half = dataclasses.replace(EXPERTS, compute_dtype="bfloat16")
    logits = logits_of(half, params, tokens)
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, logits_of(EXPERTS, params, tokens), atol=0.02)


def growth(widths, mup_base_width, num_experts, steps=4):
    """Exponents in the width of how far `steps` steps of Adam move the residual stream and the logits (RMS)."""
    tokens = jax.random.randint(jax.random.key(1), (8, 17), 0, 64)

    def moved(width):
        model = LlamaConfig(
            1, width, width // 16, max(1, width // 32), 2 * width, num_experts, mup_base_width=mup_base_width,
            vocab_size=64, context=16,
        )  # fmt: skip
        optimizer = make_optimizer(OptimizerConfig(), rate_factor(model))

        def activations(params):
            logits, seen = network(model).apply(
                {"params": params}, tokens[:, :-1], capture_intermediates=True, mutable=["intermediates"]
            )
            return seen["intermediates"]["layers"]["__call__"][0][0], logits

        def step(carry, _):
            params, state = carry
            grads = jax.grad(batch_loss(model))(params, tokens)
            updates, state = optimizer.update(grads, state, params, learning_rate=1e-2)
            return (optax.apply_updates(params, updates), state), None

        @jax.jit
        def run():
            params = network(model).init(jax.random.key(0), tokens[:1, :-1])["params"]
            (after, _), _ = jax.lax.scan(step, (params, optimizer.init(params)), None, length=steps)
            pairs = zip(activations(after), activations(params), strict=True)
            return [jnp.sqrt(jnp.mean(jnp.square(a - b))) for a, b in pairs]

        return [float(x) for x in run()]

    return np.polyfit(np.log(widths), np.log([moved(width) for width in widths]), 1)[0]


@pytest.mark.parametrize(
    ("widths", "num_experts"),
    [((32, 128), 0), pytest.param((64, 128, 256, 512), 4, marks=pytest.mark.long)],
)
def test_activations_change_alike_at_all_widths_with_mup_and_more_at_large_ones_without(widths, num_experts):
    """The coordinate check of Yang et al. 2022, appendix D.1."""
    with_it, without = (growth(widths, base, num_experts) for base in (widths[0], None))
    assert (np.abs(with_it) < 0.2).all()
    assert (without > 0.5).all()


def test_mup_changes_nothing_at_its_base_width():
    model, base = SMALL, dataclasses.replace(SMALL, mup_base_width=16)
    assert {base.rate_factor(path) for path in ("embedding", "layers/attention/qkv", "norm/scale")} == {1.0}
    (params, tokens), (others, _) = initialised(model), initialised(base)
    jax.tree.map(np.testing.assert_array_equal, params, others)
    np.testing.assert_array_equal(logits_of(model, params, tokens), logits_of(base, params, tokens))
    wide = dataclasses.replace(base, mup_base_width=4)
    assert {path: wide.rate_factor(path) for path in ("embedding", "layers/attention/qkv", "layers/norm/scale")} == {
        "embedding": 1.0,
        "layers/attention/qkv": 0.25,
        "layers/norm/scale": 1.0,
    }


@pytest.mark.parametrize(
    ("name", "active"),
    [("llama-4x256", 2_875_392), ("llama-4x256-8e2", 2_908_160), ("llama-1x32", 11_520)],
)
def test_names_give_sizes_near_kaplans(name, active):
    model = model_config(name)
    assert model.name == name
    assert model.num_params == active
    assert 0.85 < active / model_config(name.removeprefix("llama-").split("-")[0]).num_params < 1.0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"n_kv_head": 3}, "n_kv_head = 3 must divide n_head = 4"),
        ({"n_head": 16}, "d_model / n_head = 1 must be even"),
        ({"num_experts": 2, "active_experts": 3}, "active_experts = 3"),
        ({"balance": -1.0}, "balance = -1.0"),
        ({"mup_base_width": 0}, "mup_base_width = 0"),
    ],
)
def test_impossible_models_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(SMALL, **values)


@pytest.mark.parametrize("name", ["llama-4x250", "llama-4x0", "llama-4", "llama-4x256-2e8", "4x256-8e2"])
def test_impossible_names_are_refused_in_one_line(name):
    with pytest.raises(UserError) as refused:
        model_config(name)
    assert "\n" not in str(refused.value)


def test_an_untrained_model_guesses_uniformly():
    params, tokens = initialised(SMALL, scale=1.0)
    loss = next_token_loss(logits_of(SMALL, params, tokens[:, :-1]), tokens[:, 1:])
    assert abs(loss - math.log(SMALL.vocab_size)) < 0.05
    assert isinstance(network(SMALL), nn.Module)
