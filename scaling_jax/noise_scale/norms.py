"""Squared norms of gradient pytrees: of all parameters at once, or group by group."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp


def sq_norm(tree: Any) -> jax.Array:
    """Squared Euclidean norm of a pytree, accumulated in float32 or wider."""
    return sum((_sum_sq(x) for x in jax.tree.leaves(tree)), start=jnp.zeros(()))


def path_name(path) -> str:
    """A parameter's path as text: `layers/0/attention/query`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def leaf_sq_norms(tree: Any, stacked: Callable[[str], bool]) -> dict[str, jax.Array]:
    """Squared norm of every leaf by its path; (L,) of them, layer by layer, where the leaf is stacked."""
    leaves = ((path_name(path), x) for path, x in jax.tree_util.tree_leaves_with_path(tree))
    return {name: _sum_sq(x, keep_first=stacked(name)) for name, x in leaves}


def add_up(sq_norms: Mapping[str, jax.Array], groups: Callable[[str], str] | None) -> Any:
    """Leaf norms -> their sum; or, by group of their parameter path, {group: sum}.

    The layers of a stacked leaf `layers/query` are grouped one by one, as `layers/query/0`, `layers/query/1`, ...
    """
    if groups is None:
        return sum((jnp.sum(x) for x in sq_norms.values()), start=jnp.zeros(()))
    total: dict[str, jax.Array] = {}
    for name, value in sq_norms.items():
        for part, sq in [(name, value)] if value.ndim == 0 else [(f"{name}/{i}", x) for i, x in enumerate(value)]:
            total[groups(part)] = total.get(groups(part), 0.0) + sq
    return total


def _sum_sq(x, keep_first=False):
    # Not jnp.vdot: TPUs and GPUs may round the inputs of a dot product to bfloat16 or tf32.
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    squares = jnp.square(x.real) + jnp.square(x.imag) if jnp.iscomplexobj(x) else jnp.square(x)
    return jnp.sum(squares, axis=tuple(range(int(keep_first), x.ndim)))
