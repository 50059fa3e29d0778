"""Where arrays lie in a program that XLA divides over devices: `jax.jit` over sharded arrays.

Every microbatch must lie on all devices. So microbatch j of m takes the examples j, j + m, j + 2m, …: a device that
holds consecutive examples then has its share of each. Consecutive examples would lie on a part of the devices, and each
device would compute every microbatch.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def microbatches(batch, num_microbatches: int, strided: bool, batch_sharding: Any = None) -> Any:
    """The batch cut into microbatches, [M, B, …] for each array [M·B, …].

    Args:
      strided: cut a batch that lies on many devices, so that each microbatch lies on all of them.
      batch_sharding: where the batch lies, if Auto axes of a mesh divide it: a sharding or a pytree prefix of them.

    Raises:
      ValueError: if a device's share doesn't split into microbatches.
    """

    def cut(x, said):
        if isinstance(said, NamedSharding) and len(said.spec) > x.ndim:
            raise ValueError(f"batch_sharding {said.spec} has more dimensions than an array of the batch, {x.shape}")
        if num_microbatches == 1:
            return x[None]
        if not strided:
            return x.reshape(num_microbatches, -1, *x.shape[1:])
        shape = x.shape[0] // num_microbatches, num_microbatches, *x.shape[1:]
        if (spec := explicit_spec(x)) is not None:
            _check_shares(x, jax.typeof(x).sharding, num_microbatches)
            y = jax.lax.reshape(x, shape, out_sharding=PartitionSpec(spec[0], None, *spec[1:]))
            return jnp.swapaxes(y, 0, 1)
        y = jnp.swapaxes(x.reshape(shape), 0, 1)
        if said is None:
            return y
        if isinstance(said, PartitionSpec):
            return jax.lax.with_sharding_constraint(y, PartitionSpec(None, *said))
        _check_shares(x, said, num_microbatches)
        return jax.lax.with_sharding_constraint(y, NamedSharding(said.mesh, PartitionSpec(None, *said.spec)))

    if batch_sharding is None:
        return jax.tree.map(lambda x: cut(x, None), batch)
    is_sharding = lambda s: s is None or isinstance(s, (NamedSharding, PartitionSpec))  # noqa: E731
    return jax.tree.map(
        lambda said, part: jax.tree.map(lambda x: cut(x, said), part), batch_sharding, batch, is_leaf=is_sharding
    )


def _check_shares(x, sharding, num_microbatches):
    share = sharding.shard_shape(x.shape)[0]
    if share % num_microbatches:
        raise ValueError(
            f"each device holds {share} of {x.shape[0]} examples: they don't split into {num_microbatches} microbatches"
        )


def explicit_spec(x) -> PartitionSpec | None:
    """How the Explicit axes of a mesh divide x; None if they don't."""
    sharding = getattr(type_of(x), "sharding", None)
    spec = getattr(sharding, "spec", None)
    return spec if spec is not None and any(part is not None for part in spec) else None


def mapped(axes: tuple[str, ...]) -> bool:
    """True if all axes are mapped here, by pmap, shard_map or vmap."""
    try:
        jax.lax.axis_size(axes)
    except NameError:
        return False
    return True


def on_mesh(local: Callable, axes: tuple[str, ...], batch_sharding: Any, params: Any) -> Callable:
    """`local(params, batch, *more) -> (means, grads)`, on every device along axes of the mesh that aren't mapped here.

    Inside, these axes are mapped. A parameter that Explicit axes divide along them arrives as a shard; with Auto axes
    every device gets the whole parameter. The other axes of the mesh are left to XLA.

    Raises:
      ValueError: if there is no mesh with these axes.
    """
    shardings = jax.tree.leaves(batch_sharding, is_leaf=lambda s: isinstance(s, NamedSharding))
    meshes = [s.mesh for s in shardings if isinstance(s, NamedSharding)] or [jax.sharding.get_abstract_mesh()]
    if missing := sorted(set(axes) - set(meshes[0].axis_names)):
        raise ValueError(
            f"axis_name={missing[0]!r} isn't a mapped axis here, nor an axis of the mesh: pass the axis name of pmap, "
            "shard_map or vmap; under jit, pass batch_sharding or set the mesh with jax.set_mesh"
        )
    of_params = jax.tree.map(lambda x: _along(explicit_spec(x), axes), params)

    def mapped_over(*args):
        in_specs = (of_params, PartitionSpec(axes), *(PartitionSpec(),) * (len(args) - 2))
        out_specs = PartitionSpec(), of_params
        return jax.shard_map(local, mesh=meshes[0], in_specs=in_specs, out_specs=out_specs, axis_names=set(axes))(*args)

    return mapped_over


def sharded_dimensions(params, axes: tuple[str, ...]) -> list[tuple[int, tuple[str, ...]] | None]:
    """For each parameter the dimension that Explicit axes divide along `axes`, and these axes; None if they don't."""
    found = []
    for x in jax.tree.leaves(params):
        parts = [(k, part) for k, part in enumerate(_along(explicit_spec(x), axes)) if part]
        found.append((parts[0][0], parts[0][1]) if parts else None)
    return found


def _along(spec: PartitionSpec | None, axes: tuple[str, ...]) -> PartitionSpec:
    """The part of a sharding that these axes make."""
    named = [part if isinstance(part, tuple) else (part,) for part in spec or ()]
    return PartitionSpec(*(tuple(axis for axis in part if axis in axes) or None for part in named))


def left_to_xla(fn: Callable, *args, like: tuple) -> Any:
    """`fn(*args)`, whose results lie as the arrays `like` do. XLA places what is in between, whatever the axes."""
    if not (axes := _explicit_axes()):
        return fn(*args)
    return jax.sharding.auto_axes(fn, axes=axes, out_sharding=tuple(type_of(x).sharding for x in like))(*args)


def explicit_mesh() -> bool:
    """True if the types of arrays say here how a mesh divides them."""
    return bool(_explicit_axes())


def _explicit_axes() -> tuple[str, ...]:
    mesh = jax.sharding.get_abstract_mesh()
    return tuple(name for name, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)


def examples_of(batch) -> jax.Array:
    """A float32 zero for each example, where the examples lie."""
    x = jax.tree.leaves(batch)[0]
    spec = explicit_spec(x)
    if spec is None:
        return jnp.zeros(x.shape[0])
    return jax.lax.full(x.shape[:1], 0.0, sharding=NamedSharding(type_of(x).sharding.mesh, PartitionSpec(spec[0])))


def type_of(x) -> Any:
    """The abstract value of an array, or the shape that `jax.eval_shape` gave."""
    return x if isinstance(x, jax.ShapeDtypeStruct) else jax.typeof(x)
