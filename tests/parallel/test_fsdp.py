import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from scaling_jax.parallel import AXIS, data_mesh, use_whole
from scaling_jax.parallel.devices import device_by_device, fsdp_shardings, over_mesh, rows_of_devices

MESH = data_mesh(jax.devices())  # of eight


def is_stacked(path) -> bool:
    return path[0].key == "layers"


@pytest.mark.parametrize(
    ("name", "shape", "spec"),
    [
        ("w", (16, 64), PartitionSpec(None, AXIS)),
        ("w", (64, 16), PartitionSpec(AXIS)),
        ("w", (257, 16), PartitionSpec(None, AXIS)),  # 257 doesn't divide
        ("w", (257, 12), PartitionSpec()),
        ("w", (64,), PartitionSpec()),
        ("w", (), PartitionSpec()),
        ("layers", (64, 16, 32), PartitionSpec(None, None, AXIS)),  # not along the layers
        ("layers", (8, 12, 12), PartitionSpec()),
        ("layers", (8, 64), PartitionSpec()),  # a vector for each layer
    ],
)
def test_the_largest_dimension_that_devices_divide_is_sharded(name, shape, spec):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    found = fsdp_shardings({name: x}, MESH, is_stacked)[name]
    assert found.is_equivalent_to(jax.sharding.NamedSharding(MESH, spec), len(shape))


def test_on_one_device_nothing_is_sharded():
    mesh = data_mesh(jax.devices()[:1])
    assert fsdp_shardings(jnp.zeros((8, 8)), mesh).spec == PartitionSpec()


@pytest.mark.parametrize("own_rows", [False, True])
def test_each_device_takes_its_rows(own_rows):
    rows, order = np.arange(8 * 10 * 3).reshape(8, 10, 3), np.random.default_rng(0).integers(0, 10, (8, 4))
    whole = rows if own_rows else rows[0]
    batch = jax.jit(rows_of_devices(MESH, own_rows))(whole, order)
    expected = np.concatenate([(rows[d] if own_rows else whole)[order[d]] for d in range(8)])
    np.testing.assert_array_equal(batch, expected)
    assert batch.sharding.spec[0] == AXIS


def loss(w, x_BxD):
    return jnp.mean(jnp.square(use_whole(lambda w, x: x @ w, w, x_BxD)))


def test_the_mean_over_devices_has_the_gradient_of_the_whole_batch_where_the_parameter_lies():
    draws = np.random.default_rng(0)
    w, x = draws.normal(size=(16, 24)).astype(np.float32), draws.normal(size=(32, 16)).astype(np.float32)
    sharding = fsdp_shardings(w, MESH)
    losses = device_by_device(loss, MESH, sharding)
    value, grad = jax.jit(jax.value_and_grad(lambda w, x: jnp.mean(losses(w, x))))(jax.device_put(w, sharding), x)
    expected, expected_grad = jax.value_and_grad(loss)(w, x)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    np.testing.assert_allclose(grad, expected_grad, rtol=1e-5, atol=1e-7)
    assert grad.sharding.is_equivalent_to(sharding, 2)


def test_a_state_goes_around_without_being_traced_or_compiled_again():
    traced = []

    def body(state, x):
        traced.append(1)
        return state + jnp.mean(x), jnp.sum(state)

    start = np.ones((16, 24), np.float32)
    sharding = fsdp_shardings(start, MESH)
    step = over_mesh(body, MESH, state=sharding, split=(True,))
    state = jax.device_put(start, sharding)
    with jax.debug_nans(False):  # which turns donation off
        for _ in range(3):
            before = state
            state, total = step(state, np.ones((8, 2), np.float32))
    assert len(traced) == step._cache_size() == 1
    assert float(total) == 3 * start.size
    assert state.sharding.is_equivalent_to(sharding, 2)
    assert before.is_deleted()


def test_outside_a_parameter_is_used_as_it_is():
    assert use_whole(lambda w, x: (w, x), "w", 3) == ("w", 3)
