import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from scaling_jax.models.products import product


def factors(dtype=jnp.float32, rows=24):
    draws = np.random.default_rng(0)
    x, w, dy = (jnp.asarray(draws.normal(size=shape), dtype) for shape in ((rows, 128), (128, 160), (rows, 160)))
    return x, w, dy


def loss(multiply, x, w, dy):
    return jnp.sum(jnp.tanh(multiply(x, w)) * dy)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_those_of_the_plain_product(dtype):
    x, w, dy = factors(dtype)
    ours, plain = (
        jax.jit(jax.value_and_grad(loss, (1, 2)), static_argnums=0)(multiply, x, w, dy)
        for multiply in (product, jnp.matmul)
    )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *jax.tree.map(np.float32, (ours, plain))
    )
    assert {leaf.dtype for leaf in jax.tree.leaves(ours[1])} == {jnp.dtype(dtype)}


def test_runs_side_by_side_and_second_derivatives_are_those_of_the_plain_product():
    """As populations and the curvature take them."""
    x, w, dy = factors()
    ws = jnp.stack([w, 2 * w, -w])

    def curvature(multiply, w):
        gradient = jax.grad(loss, 2)
        return jax.jvp(lambda w: gradient(multiply, x, w, dy), (w,), (jnp.ones_like(w),))

    ours, plain = (jax.vmap(lambda w, m=m: curvature(m, w))(ws) for m in (product, jnp.matmul))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3), ours, plain)


def test_on_cpus_the_factor_is_transposed_on_its_own():
    """Where XLA saw through the conditional, the transposition would be fused with tanh, or be undone."""
    x, w, dy = factors(rows=512)
    gradient = jax.jit(jax.grad(lambda w, x, dy: loss(product, jnp.tanh(x), w, dy)))
    hlo = gradient.lower(w, x, dy).compile({"xla_backend_optimization_level": "3"}).as_text()
    assert "conditional(" in hlo
    (transposed,) = re.findall(r"= f32\[128,512\]\S* fusion\((.*?)\), kind=kLoop", hlo)
    assert transposed.count("%") == 1


def test_elsewhere_it_is_the_plain_product():
    x, w, dy = factors()
    lowered = jax.jit(jax.grad(lambda w: loss(product, x, w, dy))).trace(w).lower(lowering_platforms=("tpu",)).as_text()
    assert "optimization_barrier" not in lowered


def test_narrow_layers_are_left_to_xla():
    x, w, dy = factors()
    gradient = jax.jit(jax.grad(lambda w: loss(product, x[:, :127], w, dy)))
    assert "case" not in gradient.lower(w[:127]).as_text()
