import dataclasses

import jax
import numpy as np
import pytest

from scaling_jax.io import UserError
from scaling_jax.parallel import replicate
from scaling_jax.tasks import ModelConfig
from scaling_jax.training import OptimizerConfig, Run
from scaling_jax.training.program import Program, program_for
from scaling_jax.training.run import split_batch

MODEL = ModelConfig(n_layer=1, d_model=16, n_head=1, context=16)
PROGRAM = Program(MODEL, OptimizerConfig(), batch_sequences=8, num_microbatches=2, steps_per_call=4, num_devices=1)


def take_steps(program, corpus, num_steps=2, learning_rate=1e-2):
    order = np.arange(num_steps * program.batch_sequences).reshape(num_steps, -1)
    rows = replicate(corpus.train_RxT1, program.num_devices)
    state = replicate(program.init(0), program.num_devices)
    return program.steps(state, rows, order, learning_rate, 2)


def test_golden_metrics_of_two_steps(corpus):
    """Update the numbers only for a change that is meant to alter training: a new initialisation, rule or default."""
    _, metrics = take_steps(PROGRAM, corpus)
    golden = {
        "loss": [5.541707, 5.536775],
        "small_sq_norm": [0.6878085, 0.6634324],
        "big_sq_norm": [0.3204425, 0.3141208],
    }
    for name, values in golden.items():
        np.testing.assert_allclose(getattr(metrics, name), values, rtol=2e-5, err_msg=name)


QUICK = [(1, 4, "pmap"), (8, 1, "pmap"), (2, 2, "shard_map"), (4, 1, "vmap")]


def _slow(backend):
    return pytest.mark.slow if backend == "pmap" else pytest.mark.long


SPLITS = [(d, m, b) for d in (1, 2, 4, 8) for m in (1, 2, 4) for b in ("pmap", "shard_map", "vmap") if 1 < d * m <= 8]


@pytest.mark.parametrize(
    ("num_devices", "num_microbatches", "backend"),
    [pytest.param(*split, marks=() if split in QUICK else _slow(split[2])) for split in SPLITS],
)
def test_the_same_batch_gives_the_same_training_however_it_is_split(corpus, num_devices, num_microbatches, backend):
    reference_state, reference = take_steps(PROGRAM, corpus)
    program = dataclasses.replace(PROGRAM, num_devices=num_devices, num_microbatches=num_microbatches, backend=backend)
    state, metrics = take_steps(program, corpus)
    np.testing.assert_allclose(metrics.loss, reference.loss, rtol=1e-6)
    np.testing.assert_allclose(metrics.big_sq_norm, reference.big_sq_norm, rtol=1e-4)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), state.params, reference_state.params)
    np.testing.assert_allclose(metrics.big_sq_norm_by_layer, reference.big_sq_norm_by_layer, rtol=1e-3, atol=1e-7)
    assert (metrics.small_sq_norm > metrics.big_sq_norm).all()


@pytest.mark.parametrize(("num_devices", "num_microbatches"), [(1, 4), (2, 2), (4, 1)])
def test_equal_small_batches_give_equal_norms(corpus, num_devices, num_microbatches):
    """Four small batches of two sequences: the same ones, whether devices or microbatches hold them."""
    norms = [
        take_steps(dataclasses.replace(PROGRAM, num_devices=d, num_microbatches=m), corpus, 1)[1].small_sq_norm
        for d, m in ((1, 4), (num_devices, num_microbatches))
    ]
    np.testing.assert_allclose(*norms, rtol=1e-5)


def test_the_parts_norms_are_those_of_their_parameters_and_add_up(corpus):
    """By an independent way: one gradient step of SGD moves each parameter by its gradient."""
    model = dataclasses.replace(MODEL, n_layer=3)
    program = dataclasses.replace(PROGRAM, model=model, optimizer=OptimizerConfig("sgd"))
    start = jax.tree.map(np.array, program.init(0).params)
    order = np.arange(8).reshape(1, 8)
    state, metrics = program.steps(program.init(0), corpus.train_RxT1, order, 1.0, 0)
    grads = jax.tree.map(lambda a, b: np.float64(a) - b, start, state.params)

    def sq_norm(*trees):
        return sum(np.sum(np.square(x)) for x in jax.tree.leaves(trees))

    layers = [sq_norm(jax.tree.map(lambda x, k=k: x[k], grads["layers"])) for k in range(3)]
    ends = sq_norm(grads["embedding"], grads["position"]), sq_norm(grads["norm"], grads["unembedding"])
    np.testing.assert_allclose(metrics.big_sq_norm_by_layer, [[ends[0], *layers, ends[1]]], rtol=1e-3)
    np.testing.assert_allclose(metrics.small_sq_norm_by_layer.sum(1), metrics.small_sq_norm, rtol=1e-6)


def test_calls_of_any_length_take_the_same_steps(corpus):
    order = np.arange(4 * 8).reshape(4, 8)
    whole, _ = PROGRAM.steps(PROGRAM.init(0), corpus.train_RxT1, order, 1e-2, 2)
    state = PROGRAM.init(0)
    for part in (order[:1], order[1:]):
        state, _ = PROGRAM.steps(state, corpus.train_RxT1, part, 1e-2, 2)
    jax.tree.map(np.testing.assert_array_equal, state, whole)


def test_norms_are_measured_before_clipping(corpus):
    clipped = dataclasses.replace(PROGRAM, optimizer=OptimizerConfig("sgd", clip_norm=1e-3))
    free = dataclasses.replace(PROGRAM, optimizer=OptimizerConfig("sgd"))
    (state, metrics), (free_state, free_metrics) = (take_steps(p, corpus, 1) for p in (clipped, free))
    np.testing.assert_array_equal(metrics.big_sq_norm, free_metrics.big_sq_norm)
    start = PROGRAM.init(0).params

    def moved(params):
        return np.sqrt(
            sum(np.sum(np.square(a - b)) for a, b in zip(*map(jax.tree.leaves, (params, start)), strict=True))
        )

    assert moved(free_state.params) > 100 * moved(state.params)


@pytest.mark.parametrize("num_devices", [1, 8])
def test_the_state_is_donated(corpus, num_devices):
    program = dataclasses.replace(PROGRAM, num_devices=num_devices, num_microbatches=2 if num_devices == 1 else 1)
    state = replicate(program.init(0), num_devices)
    rows = replicate(corpus.train_RxT1, num_devices)
    with jax.debug_nans(False):  # which turns donation off
        program.steps(state, rows, np.zeros((1, 8), int), 1e-2, 2)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


@pytest.mark.parametrize(
    ("batch", "most", "devices", "expected"),
    [(2, 16, 1, 2), (128, 16, 1, 8), (128, 16, 8, 1), (6, 1, 1, 6), (24, 5, 2, 3)],
)
def test_batches_split_into_the_fewest_microbatches_that_leave_a_small_batch(batch, most, devices, expected):
    assert split_batch(batch, most, devices) == expected


def test_a_batch_that_devices_cannot_share_is_refused_with_the_nearest_that_they_can():
    with pytest.raises(UserError, match=r"64 sequences .*24 devices.* 48 or 72"):
        split_batch(64, 16, 24)


def test_runs_that_differ_in_learning_rate_and_seed_share_a_program():
    run = Run(MODEL, 128, 1e-3, max_steps=5)
    other = dataclasses.replace(run, learning_rate=2e-3, seed=1, max_steps=9, warmup_steps=3)
    assert program_for(run) == program_for(other)
    assert run.run_id != other.run_id
