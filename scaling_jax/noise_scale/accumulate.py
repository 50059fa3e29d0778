"""Split a batch into parts (microbatches and devices) and average over them.

`jax.shard_map` with `check_vma=True` sums the gradient of replicated parameters over devices. This module first marks
the parameters as varying, so every device keeps its own gradient, whatever `check_vma` is.

Where XLA divides the work, under `jax.jit` over sharded arrays, every microbatch must lie on all devices. So microbatch
j of m takes the examples j, j + m, j + 2m, …: a device that holds consecutive examples has its share of each.
Consecutive examples would lie on a part of the devices, and each device would compute every microbatch.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec


class Split(NamedTuple):
    """The parameters and one device's share of a batch, cut into microbatches."""

    params: Any  # marked as varying over the `tracked` axes
    batch_MxB: Any  # M microbatches of B examples
    axes: tuple[str, ...]
    tracked: frozenset[str]  # those of `axes` along which shard_map tracks which values differ
    own_params: list[frozenset[str]]  # for each parameter, those of `tracked` along which it differs
    local_batch: int  # examples on this device
    num_devices: int


def split(params, batch, num_microbatches, axis_name, batch_sharding=None) -> Split:
    """Cut this device's batch, or without `axis_name` the whole batch, into microbatches.

    Args:
      axis_name: None, or a mapped axis, or a tuple of them. With (), the batch is all on this device.
      batch_sharding: where the batch lies on a mesh with Auto axes: a sharding, or a pytree prefix of them.

    Raises:
      ValueError, TypeError: at trace time, if the batch, the parameters or the mapped axes don't fit together.
    """
    axes = axes_of(axis_name)
    if not mapped(axes):
        raise ValueError(f"axis_name={axis_name!r} isn't a mapped axis here: pass that of pmap, shard_map or vmap")
    num_devices = jax.lax.axis_size(axes) if axes else 1
    local_batch = check_batch(batch, num_microbatches)
    _check_params(params)
    tracked = tracked_axes(axes)
    _check_axes(params, batch, axes, tracked)
    own_params = [varying(x) & tracked for x in jax.tree.leaves(params)]
    params = jax.tree.map(lambda x: mark_varying(x, tracked), params)
    batch_MxB = microbatches(batch, num_microbatches, axis_name is None, batch_sharding)
    return Split(params, batch_MxB, axes, tracked, own_params, local_batch, num_devices)


def mean(one, split: Split):
    """Mean of `one(microbatch)` over all microbatches and devices; sums are float32 or wider."""
    return mean_over_devices(mean_over_microbatches(one, split)[0], split)


def mean_over_microbatches(one, split: Split, of_sum=lambda total: ()):
    """(mean of `one(microbatch)` over this device's microbatches, `of_sum` of the sum); sums are float32 or wider.

    `of_sum` is computed with each microbatch, so that XLA can send what it needs from other devices along with what
    `one` needs.
    """
    num_microbatches = jax.tree.leaves(split.batch_MxB)[0].shape[0]
    first = jax.tree.map(lambda x: x[0], split.batch_MxB)
    if num_microbatches == 1:
        total = jax.tree.map(_widen, one(first))
        return total, of_sum(total)
    zeros = jax.tree.map(lambda s: zeros_like(s, wide(s.dtype)), jax.eval_shape(one, first))

    def add(carry, microbatch):
        total = jax.tree.map(lambda t, x: t + _widen(x), carry[0], one(microbatch))
        return (total, of_sum(total)), None

    nothing = jax.tree.map(zeros_like, jax.eval_shape(of_sum, zeros))
    (total, found), _ = jax.lax.scan(add, (zeros, nothing), split.batch_MxB)
    return jax.tree.map(lambda x: x / num_microbatches, total), found


def mean_over_devices(tree, split: Split):
    """`jax.lax.pmean` of the tree along the split's axes; the tree itself if there are no axes."""
    if not split.axes:
        return tree
    return jax.lax.pmean(jax.tree.map(lambda x: mark_varying(x, split.tracked), tree), split.axes)


def path_name(path) -> str:
    """A parameter's path as text: `layers/0/attention/query`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def names(params) -> list[str]:
    """Paths of all parameters."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def check_aux(aux):
    """Returns aux as arrays.

    Raises:
      TypeError: if a leaf isn't floating point, so it can't be averaged.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(aux):
        if not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
            raise TypeError(
                f"aux leaf {path_name(path)!r} is {jnp.result_type(leaf)}: aux is averaged, so return floats"
            )
    return jax.tree.map(jnp.asarray, aux)


def varying(x) -> frozenset[str]:
    """The mapped axes along which shard_map knows that x differs between devices; empty if it doesn't track this."""
    aval = type_of(x)
    if not hasattr(aval, "manual_axis_type"):
        return aval.vma  # before JAX 0.10.2; with an unknown JAX this fails, which is better than summed gradients
    return aval.manual_axis_type.varying if aval.manual_axis_type else frozenset()


def mark_varying(x, axes):
    """x, marked as differing between devices along the given axes."""
    missing = tuple(sorted(frozenset(axes) - varying(x)))
    return jax.lax.pcast(x, missing, to="varying") if missing else x


def zeros_like(x, dtype=None):
    """Zeros of the shape of x, an array or its shape; they differ between devices, and lie on them, as x does."""
    spec, dtype = explicit_spec(x), dtype or x.dtype
    zeros = jnp.zeros(x.shape, dtype) if spec is None else jax.lax.full(x.shape, 0, dtype, sharding=type_of(x).sharding)
    return mark_varying(zeros, varying(x))


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


def axes_of(axis_name: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The names of axes, given as one name, several, or None."""
    return () if axis_name is None else axis_name if isinstance(axis_name, tuple) else (axis_name,)


def tracked_axes(axes: tuple[str, ...]) -> frozenset[str]:
    """Those of the mapped axes along which shard_map tracks which values differ."""
    return frozenset(axis for axis in axes if axis in varying(jax.lax.axis_index(axis)))


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
    num_devices = math.prod(meshes[0].shape[axis] for axis in axes)

    def mapped_over(*args):
        if rest := len(jax.tree.leaves(args[1])[0]) % num_devices:
            raise ValueError(f"the batch has {rest} examples too many for {num_devices} devices along {axes}")
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


def check_batch(batch, num_microbatches) -> int:
    """The number of examples in a batch.

    Raises:
      ValueError: if its arrays don't have one, or it doesn't split into the microbatches.
    """
    if num_microbatches < 1:
        raise ValueError(f"num_microbatches={num_microbatches} must be at least 1")
    shapes = {path_name(path): jnp.shape(x) for path, x in jax.tree_util.tree_leaves_with_path(batch)}
    if not shapes:
        raise ValueError("the batch has no arrays")
    if any(not shape for shape in shapes.values()) or len({shape[0] for shape in shapes.values()}) > 1:
        raise ValueError(f"the batch's leaves need one common leading axis of examples, not shapes {shapes}")
    local_batch = next(iter(shapes.values()))[0]
    if local_batch == 0 or local_batch % num_microbatches:
        raise ValueError(
            f"a device's batch of {local_batch} examples doesn't split into {num_microbatches} microbatches"
        )
    return local_batch


def _check_params(params):
    leaves = jax.tree_util.tree_leaves_with_path(params)
    if not leaves:
        raise ValueError("the parameters have no arrays")
    paths = names(params)
    if twice := sorted({path for path in paths if paths.count(path) > 1}):
        raise ValueError(f"two parameters have the path {twice[0]!r}: rename one of them")
    for path, x in leaves:
        if not jnp.issubdtype(jnp.result_type(x), jnp.inexact):
            raise TypeError(
                f"parameter {path_name(path)!r} is {jnp.result_type(x)}: gradients need floats; pass it in `extra`"
            )


def _check_axes(params, batch, axes, tracked):
    batch_axes = frozenset().union(*map(varying, jax.tree.leaves(batch)))
    if same := tracked - batch_axes:
        raise ValueError(
            f"every device along {sorted(same)} holds the same batch: shard it, or leave the axis out of axis_name"
        )
    own_params = frozenset.intersection(*map(varying, jax.tree.leaves(params)))
    if unnamed := batch_axes - frozenset(axes) - own_params:
        raise ValueError(
            f"the batch differs along {sorted(unnamed)}, which axis_name doesn't name: add it to axis_name, or its "
            "gradients would be summed"
        )


def wide(dtype):
    """The dtype of sums: float32 or wider."""
    return jnp.promote_types(dtype, jnp.float32)


def _widen(x):
    return x.astype(wide(x.dtype))
